//! Requests that wait for the engine.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::job::Job;

/// A bounded queue between the thread that speaks HTTP and the one that has the engine.
#[derive(Debug)]
pub(crate) struct Queue {
    most: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
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
    pub(crate) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), changed: Condvar::new() }
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
        state.jobs.retain(|job| !job.parts.is_closed());
        if state.jobs.len() >= self.most {
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
            while let Some(job) = state.jobs.pop_front() {
                if !job.parts.is_closed() {
                    return Taken::Job(Box::new(job));
                }
            }
            match () {
                () if state.closed => return Taken::Over,
                () if !wait => return Taken::Nothing,
                () => {}
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        let mut state = self.state();
        state.jobs.retain(|job| !job.parts.is_closed());
        state.jobs.len()
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
