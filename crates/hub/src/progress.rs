//! What a transfer tells while it runs.

use std::sync::Mutex;

/// Listens to a transfer; called from several threads.
pub trait Progress: Sync {
    /// `total` bytes are going to be moved, of which `done` are there already.
    fn begin(&self, action: &str, total: u64, done: u64);
    /// So many bytes are there now; less than before where a part had to be thrown away.
    fn position(&self, done: u64);
    /// A file of so many bytes is complete.
    fn file(&self, name: &str, bytes: u64);
    /// Something that a person may want to know, such as a retry.
    fn note(&self, message: &str);
    /// The transfer begun last is over.
    fn end(&self);
}

/// The bytes of a transfer that several threads share.
pub(crate) struct Meter<'a> {
    progress: &'a dyn Progress,
    done: Mutex<u64>,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(progress: &'a dyn Progress, done: u64) -> Self {
        Self { progress, done: Mutex::new(done) }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.change(|done| done + bytes);
    }

    /// Bytes that were counted and are not there after all.
    pub(crate) fn take_back(&self, bytes: u64) {
        self.change(|done| done.saturating_sub(bytes));
    }

    /// Told under the lock, so that positions arrive in order.
    fn change(&self, to: impl FnOnce(u64) -> u64) {
        let mut done = self.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *done = to(*done);
        self.progress.position(*done);
    }

    pub(crate) fn progress(&self) -> &'a dyn Progress {
        self.progress
    }
}
