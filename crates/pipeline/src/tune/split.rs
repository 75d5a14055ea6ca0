//! Which windows are trained on, in what batches, and which are only judged by.

use std::ops::Range;

use gptq_text::calibration::HELD_OUT;

/// Windows of a batch.
pub(super) const BATCH: usize = 8;
/// Windows to judge by are none of the calibration's, where its text has room for others. Else they are its last
/// ones: windows are drawn at random places of the text, so these are as good as any others to hold out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    trained: usize,
    held_out: usize,
    unseen: bool,
}

impl Split {
    /// Of so many windows, and `others` that are none of them; `None` of fewer than two in all.
    pub(crate) fn of(windows: usize, others: usize) -> Option<Self> {
        if others > 0 {
            let split = Self { trained: windows, held_out: others, unseen: true };
            return (windows > 0).then_some(split);
        }
        let held_out = (windows / HELD_OUT).max(1);
        let split = |trained| Self { trained, held_out, unseen: false };
        windows.checked_sub(held_out).filter(|&trained| trained > 0).map(split)
    }

    /// Of a run that is not begun: of windows of one text that has room for all.
    pub(crate) fn planned(windows: usize) -> Option<Self> {
        Self::of(windows, windows.div_ceil(HELD_OUT))
    }

    /// Windows that are trained on: the first ones.
    pub(crate) fn trained(&self) -> usize {
        self.trained
    }

    /// Windows that are held out: those behind them, or others.
    pub(crate) fn held_out(&self) -> usize {
        self.held_out
    }

    /// Whether these are others, which the solver does not see either.
    pub(crate) fn unseen(&self) -> bool {
        self.unseen
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
        assert_eq!((Split::of(0, 0), Split::of(1, 0), Split::of(0, 1)), (None, None, None));
        let others = Split::of(128, 16).unwrap();
        assert_eq!(Split::planned(128).unwrap(), others);
        assert_eq!((others.trained(), others.held_out(), others.epoch()), (128, 16, 16));
        assert!(others.unseen() && others.largest() == 16);
        for (windows, trained, epoch) in
            [(2, 1, 1), (8, 7, 1), (9, 8, 1), (16, 14, 2), (128, 112, 14)]
        {
            let split = Split::of(windows, 0).unwrap();
            assert!(!split.unseen());
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
