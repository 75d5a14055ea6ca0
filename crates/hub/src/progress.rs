//! What a transfer reports while it runs.

use std::sync::{Mutex, MutexGuard};

use crate::lock::lock;

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
    bytes: Mutex<Bytes>,
}

struct Bytes {
    /// Bytes that are there.
    done: u64,
    /// Bytes that came, those that had to be thrown away included.
    received: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(progress: &'a dyn Progress, done: u64) -> Self {
        Self { progress, bytes: Mutex::new(Bytes { done, received: 0 }) }
    }

    pub(crate) fn add(&self, count: u64) {
        let mut bytes = self.bytes();
        bytes.received += count;
        bytes.done += count;
        self.announce(&bytes);
    }

    /// Bytes that were counted and are not there after all.
    pub(crate) fn take_back(&self, count: u64) {
        let mut bytes = self.bytes();
        bytes.done = bytes.done.saturating_sub(count);
        self.announce(&bytes);
    }

    pub(crate) fn received(&self) -> u64 {
        self.bytes().received
    }

    /// Told under the lock, so that positions arrive in order.
    fn announce(&self, bytes: &Bytes) {
        self.progress.position(bytes.done);
    }

    fn bytes(&self) -> MutexGuard<'_, Bytes> {
        lock(&self.bytes)
    }

    pub(crate) fn progress(&self) -> &'a dyn Progress {
        self.progress
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::stop::Stop;

    /// Listens to nothing.
    pub(crate) struct Silent;

    impl Progress for Silent {
        fn begin(&self, _: &str, _: u64, _: u64) {}
        fn position(&self, _: u64) {}
        fn file(&self, _: &str, _: u64) {}
        fn note(&self, _: &str) {}
        fn end(&self) {}
    }

    /// Stops a transfer at the first thing that a person is told.
    pub(crate) struct Impatient(pub(crate) Stop);

    impl Progress for Impatient {
        fn begin(&self, _: &str, _: u64, _: u64) {}
        fn position(&self, _: u64) {}
        fn file(&self, _: &str, _: u64) {}
        fn note(&self, _: &str) {
            self.0.set();
        }
        fn end(&self) {}
    }

    #[test]
    fn what_came_is_counted_although_it_was_of_no_use() {
        let meter = Meter::new(&Silent, 10);
        meter.take_back(10);
        meter.add(7);
        meter.take_back(7);
        meter.add(10);
        assert_eq!(meter.received(), 17);
    }
}
