//! What ends the waiting of all ranks when one of them is lost.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use crate::cuda::nccl::Communicator;
use crate::error::{Error, Result};
use crate::lock::lock;

/// How often a wait looks whether another rank has failed.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// Raised once, by the first rank that fails; shared by the ranks of a process.
#[derive(Default)]
pub(super) struct Abort {
    state: Mutex<State>,
    cards: Mutex<Vec<Weak<Communicator>>>,
}

#[derive(Default)]
struct State {
    lost: Option<usize>,
    /// Ranks of this process that are through with their parts; nothing can be lost any more for
    /// those.
    over: bool,
}

impl Abort {
    /// Says that `rank` is lost. What this process's cards wait for is given up.
    pub(super) fn raise(&self, rank: usize) {
        {
            let mut state = lock(&self.state);
            if state.over || state.lost.is_some() {
                return;
            }
            state.lost = Some(rank);
        }
        let cards: Vec<Arc<Communicator>> =
            lock(&self.cards).iter().filter_map(Weak::upgrade).collect();
        for card in cards {
            card.abort();
        }
    }

    /// The lost rank.
    pub(super) fn lost(&self) -> Option<usize> {
        lock(&self.state).lost
    }

    /// An error when a rank is lost.
    pub(super) fn check(&self) -> Result<()> {
        self.lost().map_or(Ok(()), |rank| Err(Error::RankLost { rank: Some(rank) }))
    }

    /// The run is over: all ranks have said so.
    pub(super) fn end(&self) {
        lock(&self.state).over = true;
    }

    /// Gives a card's communicator up when the abort flag is raised.
    pub(super) fn watch(&self, card: &Arc<Communicator>) {
        lock(&self.cards).push(Arc::downgrade(card));
    }

    /// Raises the abort flag when NCCL has noticed a failure by itself.
    pub(super) fn look_at_cards(&self) {
        let cards: Vec<Arc<Communicator>> =
            lock(&self.cards).iter().filter_map(Weak::upgrade).collect();
        if let Some(card) = cards.iter().find(|card| card.has_failed()) {
            self.raise(card.rank());
        }
    }
}
