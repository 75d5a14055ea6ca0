//! Counting device memory: what this process holds, its peak, and the budget it was given.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free on the card for all processes, and what the driver keeps of memory that this one has freed.
    pub free: usize,
    /// On the card.
    pub total: usize,
    /// Held by tensors and workspaces of this device.
    pub held: usize,
    /// The most held at any time since the device was created or the peak was reset.
    pub peak: usize,
    /// The most that may be held; `usize::MAX` when no budget was set.
    pub budget: usize,
}

/// Counters shared by all buffers of a device.
#[derive(Debug)]
pub(super) struct Memory {
    held: AtomicUsize,
    peak: AtomicUsize,
    budget: AtomicUsize,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            held: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            budget: AtomicUsize::new(usize::MAX),
        }
    }
}

impl Memory {
    /// Counts `bytes` as held; false when that would pass the budget.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if held > self.budget.load(Ordering::Relaxed) {
            self.give(bytes);
            return false;
        }
        self.peak.fetch_max(held, Ordering::Relaxed);
        true
    }

    pub(super) fn give(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    pub(super) fn reset_peak(&self) {
        self.peak.store(self.held(), Ordering::Relaxed);
    }

    pub(super) fn set_budget(&self, bytes: usize) {
        self.budget.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn budget(&self) -> usize {
        self.budget.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_allocation_is_not_counted() {
        let memory = Memory::default();
        memory.set_budget(100);
        assert!(memory.take(60));
        assert!(!memory.take(50));
        assert!(memory.take(40));
        memory.give(60);
        assert_eq!((memory.held(), memory.peak()), (40, 100));
        memory.reset_peak();
        assert_eq!(memory.peak(), 40);
    }
}
