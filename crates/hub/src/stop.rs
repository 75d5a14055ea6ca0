//! The end of a transfer that others may be waiting in.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::lock::lock;

/// Set once, when what is under way is of no use any more.
pub(crate) struct Stop {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub(crate) fn new() -> Self {
        Self { set: Mutex::new(false), changed: Condvar::new() }
    }

    pub(crate) fn set(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    pub(crate) fn is_set(&self) -> bool {
        *self.lock()
    }

    /// Waits so long, or until it is set.
    pub(crate) fn wait(&self, time: Duration) {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |set| !*set);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        lock(&self.set)
    }
}
