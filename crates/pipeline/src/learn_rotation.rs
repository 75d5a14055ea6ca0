//! The rotation of the residual stream that flattens a model's weights most.
//!
//! What the stream's rotation turns are rows of q, k, v, gate and up, with the gain of the norm before them,
//! and columns of o and down, those of every expert too. Every step looks at all of them: a rotation learned
//! from some is worth nothing to the others, and steps along some at a time undo each other
//! (tests/bench/2026-11-29-forward-only.md).
//!
//! A look reads the model's blocks, one ahead of the one that is turned; of a model whose weights a GPU holds
//! at once they stay there from the first look to the last. Several ranks look at a share of the blocks each;
//! the first one makes the steps, and hands the rotation on, so that all have the same bits.

use std::sync::mpsc::sync_channel;

use gptq_checkpoint::{Checkpoint, ModelConfig, NormId};
use gptq_compute::{Device, FourthPowers, Ranks, Tensor, Turned};
use gptq_model::{Block, Model, SourcePrecision, Stage};
use gptq_quant::{Learner, Rotation};
use gptq_records::branch_report::RotationRecord;
use ndarray::Array2;

use crate::error::{Error, Result};
use crate::memory::{BlockSizes, MemoryPlan, STAGING, USABLE, device_budget};
use crate::progress::Progress;

/// Looks at the whole model, the first at what is begun with, each after that at where a step led.
pub(crate) const LOOKS: usize = 12;
/// The widest residual stream whose rotation is learned: a matrix of this order takes 1 GiB in f32, and the
/// cube of its order operations a product.
pub(crate) const WIDEST: usize = 16_384;

/// A rotation that was learned, and what it was worth.
#[derive(Clone, Debug)]
pub(crate) struct Learned {
    pub(crate) rotation: Rotation,
    pub(crate) record: RotationRecord,
}

/// Learns from all weights of `source` that read or write the residual stream, together with the other
/// ranks; begins at `start`.
///
/// # Errors
/// Weights that cannot be read, or are not finite, and those of the device.
pub(crate) fn learned(
    source: &Checkpoint,
    start: &Rotation,
    (device, ranks): (&Device, &Ranks),
    progress: &dyn Progress,
) -> Result<Learned> {
    let model = Model::new(source, device.clone(), SourcePrecision::Half, 1)?;
    let blocks = ranks.share(source.config().num_hidden_layers, 1);
    let learner = ranks.is_first().then(|| Learner::new(start, device.clone()));
    let mut learner = learner.transpose().map_err(Error::Learn)?;
    let stay = device_budget(device)?.is_some_and(|budget| stay(source.config(), budget));
    let mut kept = stay.then(Vec::new);
    let mut means = Vec::with_capacity(LOOKS);
    progress.begin_steps("learn the rotation", LOOKS * blocks.len());
    let mut best = None;
    for left in (0..LOOKS).rev() {
        let here = learner.as_ref().map(Learner::rotation);
        let rotation = handed_on(here, start.order(), device, ranks)?;
        let mut sums = device.fourth_powers(&rotation)?;
        let mut look_at = |block: &Block| {
            progress.step();
            look(&mut sums, block)
        };
        match &mut kept {
            Some(kept) if !kept.is_empty() => kept.iter().try_for_each(&mut look_at)?,
            kept => read_each(&model, blocks.clone(), |block| {
                look_at(&block)?;
                if let Some(kept) = kept {
                    kept.push(block);
                }
                Ok(())
            })?,
        }
        sums.sum_over(ranks)?;
        means.push(sums.mean());
        match &mut learner {
            Some(learner) if left > 0 => {
                learner.step(sums.mean(), &sums.gradient()?).map_err(Error::Learn)?;
            }
            _ => best = learner.take().map(|learner| learner.finish(sums.mean())),
        }
    }
    progress.end();
    let rotation = Rotation::of_matrix(handed_on(best, start.order(), device, ranks)?);
    let least = means.iter().copied().fold(f64::INFINITY, f64::min);
    let record = RotationRecord {
        looks: LOOKS,
        before: means.first().copied().unwrap_or(least),
        after: least,
    };
    progress.note(&format!(
        "learned the rotation: the mean fourth power of turned weights is {:.3} instead of {:.3} (3 of normal ones)",
        record.after, record.before
    ));
    Ok(Learned { rotation, record })
}

/// The first rank's matrix on all of them.
fn handed_on(
    own: Option<Array2<f32>>,
    order: usize,
    device: &Device,
    ranks: &Ranks,
) -> Result<Array2<f32>> {
    let own = own.unwrap_or_else(|| Array2::zeros((order, order)));
    if ranks.size() == 1 {
        return Ok(own);
    }
    // A sum with zeros is exact.
    let mut matrix: Tensor = device.upload_f32(own)?;
    ranks.sum(&mut matrix)?;
    Ok(matrix.to_host()?)
}

/// Reads blocks one ahead of their use.
fn read_each(
    model: &Model<'_>,
    blocks: std::ops::Range<usize>,
    mut each: impl FnMut(Block) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        // A rendezvous: the block that waits here is the only one beside the one in use.
        let (sender, receiver) = sync_channel(0);
        scope.spawn(move || {
            for index in blocks {
                let block = model.load_block(index).map_err(Error::from);
                let failed = block.is_err();
                // A closed channel means that the look has failed.
                if sender.send(block).is_err() || failed {
                    return;
                }
            }
        });
        receiver.into_iter().try_for_each(|block| each(block?))
    })
}

/// Looks at all linears of a block.
fn look(sums: &mut FourthPowers, block: &Block) -> Result<()> {
    for linear in block.linears() {
        let turned = match Stage::of(linear.id) {
            Stage::Qkv => Turned::Rows(block.gains().get(NormId::BeforeAttention)),
            Stage::GateUp => Turned::Rows(block.gains().get(NormId::BeforeMlp)),
            Stage::Output | Stage::Down => Turned::Columns,
        };
        sums.add(&linear.weight, turned)?;
    }
    Ok(())
}

/// Whether a GPU holds all weights beside what a look takes; the host reads them from the mapped file, where
/// the system keeps what there is room for.
fn stay(model: &ModelConfig, budget: u64) -> bool {
    let room = (budget as f64 * USABLE) as usize;
    bytes_of(model) + LearnBytes::of(model).device < room
}

/// Weights of all linears in the blocks.
pub(crate) fn block_weights(model: &ModelConfig) -> usize {
    model.linears().map(|(_, linear)| linear.in_features * linear.out_features).sum()
}

/// Their bytes in fp16.
fn bytes_of(model: &ModelConfig) -> usize {
    2 * block_weights(model)
}

/// Peaks of memory while a rotation is learned, mapped files and weights that stay apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LearnBytes {
    pub(crate) device: usize,
    pub(crate) host: usize,
    on_cpu: usize,
}

impl LearnBytes {
    /// Of a model's residual stream and blocks.
    pub(crate) fn of(model: &ModelConfig) -> Self {
        let (square, block) = (model.hidden_size * model.hidden_size, BlockSizes::of(model));
        // The block that is looked at and the one read ahead; the rotation in f32, in fp16 and with a gain, and
        // the gradient; vectors, turned, normed and cubed. After a look a step: five matrices of f64.
        let look = 2 * 2 * block.weights + 12 * square + 8 * FourthPowers::GPU_VALUES;
        let step = 5 * 8 * square;
        // Where the next look is, the direction, the best with its skew part, the gradient and the step, in
        // f64, and one of them on its way.
        let host = 7 * 8 * square;
        // As much of the CPU's own step; of a look two blocks in f32, and the largest linear's vectors.
        let cpu_look = 2 * 4 * block.weights + 8 * square + 12 * block.largest;
        Self { device: look.max(step), host, on_cpu: host + cpu_look.max(3 * 8 * square) }
    }

    /// The plan of a run that learns before it walks as `walk` says, on a GPU of `budget` bytes.
    pub(crate) fn before(self, model: &ModelConfig, walk: MemoryPlan, budget: u64) -> MemoryPlan {
        let kept = if stay(model, budget) { bytes_of(model) } else { 0 };
        MemoryPlan {
            device_bytes: walk.device_bytes.max((self.device + kept) as u64),
            host_bytes: walk.host_bytes.max((self.host + STAGING) as u64),
            ..walk
        }
    }

    /// Host memory of a CPU run that learns.
    pub(crate) fn of_cpu(self) -> u64 {
        // The program and the text, as for the walk.
        ((128 << 20) + self.on_cpu) as u64
    }
}

/// Operations of learning: two products of all weights with a matrix of the stream's width a look, and of each
/// step the products of its polar factor.
pub(crate) fn operations(model: &ModelConfig) -> f64 {
    let weights = block_weights(model) as f64;
    let width = model.hidden_size as f64;
    let step = 2.0 * Device::STEP_PRODUCTS as f64 * width.powi(3);
    LOOKS as f64 * 4.0 * weights * width + (LOOKS - 1) as f64 * step
}

#[cfg(test)]
mod tests {
    use gptq_checkpoint::Layout;
    use gptq_compute::{RankHandle, Ranks};
    use gptq_quant::{QuantSpec, Recipe, Rotate};
    use gptq_records::source_dtype::SourceDtype;

    use super::*;
    use crate::operations::tests::llama_70b;
    use crate::plan::{BranchPlan, Setting, plan_branch};
    use crate::progress::Silent;
    use crate::rotate::{family_models, random_stream};

    /// Counted by hand: two products of 68 billion weights with a matrix of 8192 a look.
    #[test]
    fn what_learning_takes_is_planned() {
        let model = llama_70b();
        let of_block = 2.0 * 8192.0_f64.powi(2) + 2.0 * 8192.0 * 1024.0 + 3.0 * 8192.0 * 28_672.0;
        let step = 2.0 * 19.0 * 8192.0_f64.powi(3);
        let wanted = 12.0 * 2.0 * 2.0 * 80.0 * of_block * 8192.0 + 11.0 * step;
        assert!((operations(&model) / wanted - 1.0).abs() < 1e-12);

        let plan = |rotate, recipe, gpu_memory| -> BranchPlan {
            let mut spec = QuantSpec::new(4, Some(128), true, 0.03, recipe);
            spec.choices.rotate = rotate;
            let setting =
                Setting { windows: 1, seq_len: 256, shared_grams: 0, together: 1, gpu_memory };
            let metadata = std::collections::BTreeMap::new();
            let (dtype, layout) = (SourceDtype::Fp16, Layout::Modern);
            plan_branch(&model, &spec, dtype, layout, &metadata, setting).unwrap()
        };
        let (best, large) = (Recipe::Best, 180 << 30);
        let full = plan(Rotate::Full, best, 80 << 30);
        let learned = plan(Rotate::Learned, best, 80 << 30);
        // Every weight is turned once, by a matrix in two halves, after twelve looks.
        let turned = 80.0 * 4.0 * of_block * 8192.0;
        assert_eq!(full.work.learn, 0.0);
        assert!((learned.work.learn / (wanted + turned) - 1.0).abs() < 1e-12);
        // The matrix in host memory, and on the card what turns by it.
        assert!(learned.cpu_bytes >= full.cpu_bytes + (4 << 26));
        assert!(learned.gpu.host_bytes >= full.gpu.host_bytes + (4 << 26));
        assert!(learned.gpu.device_bytes > full.gpu.device_bytes);
        // All weights stay on a card that holds them.
        let kept = plan(Rotate::Learned, best, large).gpu.device_bytes;
        assert!(kept as usize > bytes_of(&model), "{kept}");
        assert_eq!(plan(Rotate::Learned, Recipe::Rtn, large).work.learn, 0.0);
    }

    /// Ranks that look at a block or two each learn together what one learns alone, and all have the same bits.
    #[test]
    fn ranks_learn_one_rotation() {
        let dir = tempfile::tempdir().unwrap();
        family_models::assemble(dir.path(), "qwen2-moe");
        let source = Checkpoint::open(dir.path()).unwrap();
        let start = random_stream(source.config());
        let alone = learned(&source, &start, (&Device::Cpu, &Ranks::alone()), &Silent).unwrap();
        assert!(alone.record.after < alone.record.before);
        let together = std::thread::scope(|scope| {
            let handles: Vec<_> = RankHandle::threads(2)
                .into_iter()
                .map(|handle| {
                    let (source, start) = (&source, &start);
                    scope.spawn(move || {
                        handle.run(&Device::Cpu, |ranks| {
                            learned(source, start, (&Device::Cpu, ranks), &Silent)
                        })
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap().unwrap()).collect::<Vec<_>>()
        });
        let [first, second] = together.as_slice() else { unreachable!() };
        assert_eq!(first.rotation.matrix(), second.rotation.matrix());
        assert_eq!(first.record, second.record);
        let off = (first.rotation.matrix() - alone.rotation.matrix()).mapv(f32::abs);
        assert!(off.iter().all(|v| *v < 1e-3));
        assert!((first.record.after - alone.record.after).abs() < 1e-3);
    }
}
