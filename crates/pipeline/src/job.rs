//! What a run is asked for: one branch, and everything that it is made with.

use std::path::PathBuf;
use std::sync::MutexGuard;

use gptq_checkpoint::{Checkpoint, Layout};
use gptq_compute::{Device, Ranks};
use gptq_model::SourcePrecision;
use gptq_quant::QuantSpec;
use gptq_records::source_dtype::SourceDtype;
use gptq_text::calibration::Calibration;

use crate::first_gram::FirstGrams;
use crate::memory::{Offload, Workload};
use crate::one_reading::Seat;
use crate::operations::Extras;

/// One branch to make.
#[derive(Clone, Debug)]
pub struct QuantizeJob<'a> {
    /// The dense model.
    pub source: &'a Checkpoint,
    /// What reports call it: a Hub id, or the name of a folder.
    pub model: String,
    /// What reports call the result: nothing that depends on where it lies.
    pub branch: String,
    /// What is quantized of its weights.
    pub source_dtype: SourceDtype,
    /// Where to compute.
    pub device: Device,
    /// Who else makes the branch; rank 0 writes it.
    pub ranks: Ranks,
    /// Solver choices.
    pub spec: QuantSpec,
    /// Calibration windows; recipes that do not calibrate ignore them.
    pub calibration: Option<&'a Calibration>,
    /// Tensors beside the four of each linear, and metadata.
    pub layout: Layout,
    /// The folder to make.
    pub out: PathBuf,
    /// Split the weights into files of at most this many bytes.
    pub max_shard_bytes: Option<u64>,
    /// Treat a Hessian that needed f64 or more damping as an error.
    pub strict: bool,
    /// What is shared with other branches of the same source and calibration.
    pub shared: Option<&'a FirstGrams>,
    /// What it has to do with branches that are made at the same time.
    pub beside: Option<Beside<'a>>,
}

/// A branch's place among those that are made at the same time from one reading of the source.
#[derive(Clone, Copy, Debug)]
pub struct Beside<'a> {
    pub(crate) seat: Seat<'a>,
    /// What all branches of a device keep in host memory.
    pub(crate) offload: Offload,
}

impl QuantizeJob<'_> {
    /// Calibration windows; none where nothing calibrates.
    pub(crate) fn windows(&self) -> &[Vec<u32>] {
        self.calibration.map_or(&[], |calibration| &calibration.windows)
    }

    /// Windows that its scales are judged by and that nothing else sees; none where it tunes nothing, or where its
    /// text has no others.
    pub(crate) fn held_out(&self) -> &[Vec<u32>] {
        let tunes = self.spec.recipe.calibrates() && self.spec.choices.tune > 0;
        self.calibration.filter(|_| tunes).map_or(&[], |calibration| &calibration.held_out)
    }

    /// Waits until the branch may use the device; nobody else does until the answer is dropped.
    pub(crate) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.beside.map(|beside| beside.seat.turn())
    }

    /// What it holds of a walk.
    pub(crate) fn workload(&self) -> Workload {
        let own = &self.windows()[self.ranks.share(self.windows().len(), 1)];
        Workload {
            tokens: own.iter().map(Vec::len).sum(),
            held_out: self.held_out().iter().map(Vec::len).sum(),
            seq_len: self.seq_len(),
            extras: Extras::of(&self.spec.choices),
            exact: self.source_dtype == SourceDtype::Fp32,
            shared_grams: self.shared.map_or(0, FirstGrams::after_one_more),
        }
    }

    /// Tokens of the longest window, for a model that is walked whether there are any or not.
    pub(crate) fn seq_len(&self) -> usize {
        let windows = self.windows().iter().chain(self.held_out());
        windows.map(Vec::len).max().unwrap_or(1)
    }
}

/// How the model reads the weights of a source.
pub(crate) fn precision(dtype: SourceDtype) -> SourcePrecision {
    match dtype {
        SourceDtype::Fp16 => SourcePrecision::Half,
        SourceDtype::Fp32 => SourcePrecision::Stored,
    }
}
