//! The Gram of the first block's q, k and v, which every branch of a sweep has in common.
//!
//! Their inputs are the embedded windows, normed: bits, groups, order and damping come later. Only
//! the rotation of the source's weights changes them. Of the rest that branches have in common, the
//! windows and the fp16 model's evaluation are made once by the sweep; these are made again:
//!
//! - The embedded states, because a gather of rows costs what a copy of the result would, and a
//!   copy would need as much memory again.
//! - The source's weights in fp16. At 70B they would fill 138 GB of host memory; the files are
//!   mapped, so what the system's cache holds is read from it, and blocks are read and converted on
//!   a thread of their own behind the work on the block before (see `read_ahead`).
//! - The unquantized model's states that `best` compares with: 17 GB for each of 80 blocks.

use std::sync::{Arc, Mutex, MutexGuard};

use gptq_compute::Gram;
use gptq_quant::Rotate;

use crate::error::Result;
use crate::learn_rotation::Learned;
use crate::lock::lock;

/// Grams by rotation, of one source, calibration and device, and the rotation that was learned from the source's
/// weights.
#[derive(Debug, Default)]
pub struct FirstGrams {
    grams: Mutex<Vec<(Rotate, Arc<Gram>)>>,
    learned: Mutex<Option<Learned>>,
}

impl FirstGrams {
    /// Nothing that panics leaves a half-made entry.
    fn made(&self) -> MutexGuard<'_, Vec<(Rotate, Arc<Gram>)>> {
        lock(&self.grams)
    }

    /// How many there will be when one more rotation is asked for.
    pub(crate) fn after_one_more(&self) -> usize {
        self.made().len() + 1
    }

    /// The Gram of a source turned by `rotate`; `make` is called for the first branch only.
    pub(crate) fn get_or_make(
        &self,
        rotate: Rotate,
        make: impl FnOnce() -> Result<Gram>,
    ) -> Result<Arc<Gram>> {
        let mut made = self.made();
        if let Some((_, gram)) = made.iter().find(|(of, _)| *of == rotate) {
            return Ok(Arc::clone(gram));
        }
        let gram = Arc::new(make()?);
        made.push((rotate, Arc::clone(&gram)));
        Ok(gram)
    }

    /// The rotation that `learn` learns, for the first branch that asks; others wait for it.
    pub(crate) fn get_or_learn(&self, learn: impl FnOnce() -> Result<Learned>) -> Result<Learned> {
        let mut learned = lock(&self.learned);
        if let Some(learned) = &*learned {
            return Ok(learned.clone());
        }
        Ok(learned.insert(learn()?).clone())
    }
}

#[cfg(test)]
mod tests {
    use gptq_compute::Device;

    use super::*;

    #[test]
    fn a_gram_is_made_once_for_each_rotation() {
        let grams = FirstGrams::default();
        let mut calls = 0;
        let mut get = |rotate, order| {
            let gram = grams.get_or_make(rotate, || {
                calls += 1;
                Ok(Device::Cpu.gram(order)?)
            });
            gram.unwrap().order()
        };
        assert_eq!(get(Rotate::None, 3), 3);
        assert_eq!(get(Rotate::Full, 4), 4);
        assert_eq!(get(Rotate::None, 5), 3);
        assert_eq!(calls, 2);
    }
}
