//! Which windows are trained on, in what batches, and which are only judged by.

use std::ops::Range;

/// Windows of a batch.
pub(super) const BATCH: usize = 8;
/// One window of so many is held out.
const HELD_OUT: usize = 8;

/// Windows in order, which are drawn at random places of the text: the last are as good as any others to hold
/// out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    windows: usize,
    held_out: usize,
}

impl Split {
    /// Of so many windows; `None` of fewer than two.
    pub(crate) fn of(windows: usize) -> Option<Self> {
        let held_out = (windows / HELD_OUT).max(1);
        (windows > held_out).then_some(Self { windows, held_out })
    }

    /// Windows that are trained on: the first ones.
    pub(crate) fn trained(&self) -> usize {
        self.windows - self.held_out
    }

    /// Windows that are held out: the others.
    pub(crate) fn held_out(&self) -> usize {
        self.held_out
    }

    /// Steps that see every window once.
    pub(crate) fn epoch(&self) -> u32 {
        self.trained().div_ceil(BATCH) as u32
    }

    /// Windows of the largest batch, or of what is held out.
    pub(crate) fn largest(&self) -> usize {
        self.trained().div_ceil(self.epoch() as usize).max(self.held_out)
    }

    /// Places of the batches of an epoch, which are as alike as they can be.
    pub(crate) fn batches(&self) -> impl Iterator<Item = Range<usize>> {
        let (trained, batches) = (self.trained(), self.epoch() as usize);
        let at = move |batch: usize| batch * trained / batches;
        (0..batches).map(move |batch| at(batch)..at(batch + 1))
    }

    /// The number of the batch that a step, from 0, takes.
    pub(crate) fn batch(&self, step: u32) -> usize {
        (step % self.epoch()) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_is_trained_on_once_an_epoch_or_held_out() {
        assert_eq!((Split::of(0), Split::of(1)), (None, None));
        for (windows, trained, epoch) in
            [(2, 1, 1), (8, 7, 1), (9, 8, 1), (16, 14, 2), (128, 112, 14)]
        {
            let split = Split::of(windows).unwrap();
            assert_eq!((split.trained(), split.epoch()), (trained, epoch), "{windows}");
            assert_eq!(split.trained() + split.held_out(), windows);
            let batches: Vec<_> = split.batches().collect();
            let whole: Vec<usize> = batches.iter().cloned().flatten().collect();
            assert_eq!(whole, (0..trained).collect::<Vec<_>>(), "{windows}");
            assert!(batches.iter().all(|batch| (1..=BATCH).contains(&batch.len())), "{batches:?}");
            let taken: Vec<usize> = (0..2 * epoch).map(|step| split.batch(step)).collect();
            assert_eq!(taken[..epoch as usize], taken[epoch as usize..]);
        }
    }
}
