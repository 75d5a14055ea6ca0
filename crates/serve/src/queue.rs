//! Requests that wait for the engine.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::job::Job;

/// A bounded queue between the thread that speaks HTTP and the one that has the engine. A request for
/// which a slot is free does not count: the engine takes it up as soon as it comes to that.
#[derive(Debug)]
pub(crate) struct Queue {
    most: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Slots of the engine that no text has or is about to have.
    free: usize,
    /// Texts whose clients went away while they waited here.
    cancelled: u64,
    closed: bool,
    aborted: bool,
}

/// Why a request may not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Full,
    Closed,
}

/// What the engine gets.
pub(crate) enum Taken {
    Job(Box<Job>),
    /// Nothing waits.
    Nothing,
    /// Nothing waits, and nothing will.
    Over,
}

impl Queue {
    /// Of requests for an engine of so many slots.
    pub(crate) fn new(most: usize, slots: usize) -> Self {
        let state = State { free: slots, ..State::default() };
        Self { most, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Waits its turn. Those whose clients have gone make room.
    pub(crate) fn push(&self, job: Job) -> Result<(), Refused> {
        let mut state = self.state();
        if state.closed {
            return Err(Refused::Closed);
        }
        state.forget_the_gone();
        if state.is_full(self.most) {
            return Err(Refused::Full);
        }
        state.jobs.push_back(job);
        self.changed.notify_all();
        Ok(())
    }

    /// The request that came first; `wait`s for one where there is none.
    pub(crate) fn take(&self, wait: bool) -> Taken {
        let mut state = self.state();
        loop {
            state.forget_the_gone();
            if let Some(job) = state.jobs.pop_front() {
                state.free = state.free.saturating_sub(job.texts_in_all());
                return Taken::Job(Box::new(job));
            }
            match () {
                () if state.closed => return Taken::Over,
                () if !wait => return Taken::Nothing,
                () => {}
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// So many slots have no text, and none that waits for them elsewhere.
    pub(crate) fn set_free(&self, free: usize) {
        self.state().free = free;
    }

    /// How many wait, and how many texts have gone from here with their clients.
    pub(crate) fn counts(&self) -> (usize, u64) {
        let mut state = self.state();
        state.forget_the_gone();
        (state.jobs.len(), state.cancelled)
    }

    /// Takes no more requests; those that wait and run go on.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Ends what waits and runs, too.
    pub(crate) fn abort(&self) {
        let mut state = self.state();
        (state.closed, state.aborted) = (true, true);
        state.jobs.clear();
        self.changed.notify_all();
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.state().aborted
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic leaves is a list of requests all the same.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether every slot has or will have a text, and as many requests wait besides as may.
    fn is_full(&self, most: usize) -> bool {
        let (mut free, mut waiting) = (self.free, 0);
        for job in &self.jobs {
            // A request begins with its first text.
            waiting += usize::from(free == 0);
            free = free.saturating_sub(job.texts_in_all());
        }
        free == 0 && waiting >= most
    }

    /// Drops requests whose clients went away, and counts their texts.
    fn forget_the_gone(&mut self) {
        let cancelled = &mut self.cancelled;
        self.jobs.retain(|job| {
            let gone = job.parts.is_closed();
            *cancelled += if gone { job.texts_in_all() as u64 } else { 0 };
            !gone
        });
    }
}
