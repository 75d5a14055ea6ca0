//! A plain sweep: every branch of a configuration made, then measured from its file.
//!
//! What branches share is done once: the calibration windows, the fp16 model's perplexity and its
//! final hidden states (for KL), and the rounded baseline of each grid.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use gptq_checkpoint::Checkpoint;
use gptq_compute::{Device, Ranks};
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe};
use serde::Serialize;

use crate::calibration::Calibration;
use crate::config::{Branch, EvaluationSpec, SweepConfig};
use crate::error::Result;
use crate::evaluation::{EvalText, evaluation_text};
use crate::perplexity::{Perplexity, Scored, score, score_rounded};
use crate::progress::Progress;
use crate::quantise::{QuantiseJob, quantise};

/// A branch in the table.
#[derive(Clone, Debug, Serialize)]
pub struct SweepRow {
    /// Branch name.
    pub branch: String,
    /// Width of a code.
    pub bits: u8,
    /// Columns of a group; `null` is all of in_features.
    pub group_size: Option<usize>,
    /// Columns solved by descending diag(H).
    pub act_order: bool,
    /// Damping asked for.
    pub damp: f64,
    /// Solver recipe.
    pub recipe: &'static str,
    /// Folder that holds the checkpoint.
    pub dir: PathBuf,
    /// Bytes of the weight files.
    pub file_bytes: u64,
    /// Seconds to quantise and write.
    pub quantise_seconds: f64,
    /// Linears whose damping had to be raised.
    pub damp_retries: u32,
    /// Measured from the file, when the configuration asks for it.
    pub result: Option<Measured>,
    /// The same grid rounded to nearest.
    pub rtn: Option<Measured>,
}

/// Accuracy on the evaluation text.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// Perplexity.
    pub perplexity: f64,
    /// Mean KL to the fp16 model in nats a token.
    pub kl: f64,
}

/// A finished sweep.
#[derive(Clone, Debug, Serialize)]
pub struct SweepReport {
    /// Source model.
    pub model: String,
    /// The fp16 model on the evaluation text.
    pub baseline: Option<Perplexity>,
    /// Protocol, text and windows of the evaluation.
    pub evaluation: Option<EvalText>,
    /// Branches in the configuration's order.
    pub rows: Vec<SweepRow>,
}

/// The fp16 model measured once, for every branch to be compared with.
struct Baseline<'a> {
    text: EvalText,
    model: Model<'a>,
    scored: Scored,
    perplexity: Perplexity,
    /// Rounded grids by bits and group size: the order of columns does not matter to them.
    rounded: BTreeMap<(u8, Option<usize>), Measured>,
}

/// Makes and measures `branches` of `config` under `out`.
pub fn sweep(
    config: &SweepConfig,
    branches: &[Branch],
    source: &Checkpoint,
    calibration: &Calibration,
    (device, ranks): (&Device, &Ranks),
    out: &Path,
    progress: &dyn Progress,
) -> Result<SweepReport> {
    let mut baseline = match &config.evaluation {
        Some(spec) => {
            Some(Baseline::measure(source, spec, (device, ranks), calibration, progress)?)
        }
        None => None,
    };
    let mut rows = Vec::with_capacity(branches.len());
    for branch in branches {
        let start = Instant::now();
        let dir = out.join(&branch.name);
        let job = QuantiseJob {
            source,
            device: device.clone(),
            ranks: ranks.clone(),
            spec: branch.spec.clone(),
            calibration: Some(calibration),
            layout: config.layout,
            out: dir.clone(),
            max_shard_bytes: None,
            strict: false,
        };
        let outcome = quantise(&job, progress)?;
        let quantise_seconds = start.elapsed().as_secs_f64();
        let (result, rtn) = match &mut baseline {
            Some(b) => (Some(b.branch(&dir, progress)?), Some(b.round(&branch.spec, progress)?)),
            None => (None, None),
        };
        rows.push(SweepRow {
            branch: branch.name.clone(),
            bits: branch.spec.bits,
            group_size: branch.spec.group_size,
            act_order: branch.spec.act_order,
            damp: branch.spec.damp,
            recipe: branch.spec.recipe.name(),
            dir,
            file_bytes: outcome.written.bytes,
            quantise_seconds,
            damp_retries: outcome.damp_retries,
            result,
            rtn,
        });
    }
    Ok(SweepReport {
        model: config.model.clone(),
        baseline: baseline.as_ref().map(|b| b.perplexity),
        evaluation: baseline.map(|b| b.text),
        rows,
    })
}

impl<'a> Baseline<'a> {
    fn measure(
        source: &'a Checkpoint,
        spec: &EvaluationSpec,
        (device, ranks): (&Device, &Ranks),
        calibration: &Calibration,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let text = evaluation_text(source, spec, Some(&calibration.dataset))?;
        // The branches are made from the fp16 cast of the source, so that is what they are
        // compared with.
        let model = Model::new(source, device.clone(), SourcePrecision::Half, text.seq_len)?
            .with_ranks(ranks.clone());
        let scored = score(&model, &text.windows, progress)?;
        let perplexity = scored.perplexity(&model)?;
        Ok(Self { text, model, scored, perplexity, rounded: BTreeMap::new() })
    }

    /// A branch, from its file.
    fn branch(&self, dir: &Path, progress: &dyn Progress) -> Result<Measured> {
        let checkpoint = Checkpoint::open(dir)?;
        let device = self.model.device().clone();
        let model = Model::new(&checkpoint, device, SourcePrecision::Stored, self.text.seq_len)?
            .with_ranks(self.model.ranks().clone());
        let scored = score(&model, &self.text.windows, progress)?;
        self.compare(&scored)
    }

    /// The grid of a branch, rounded to nearest.
    fn round(&mut self, spec: &QuantSpec, progress: &dyn Progress) -> Result<Measured> {
        let key = (spec.bits, spec.group_size);
        if let Some(measured) = self.rounded.get(&key) {
            return Ok(*measured);
        }
        let spec = QuantSpec { recipe: Recipe::Rtn, ..spec.clone() };
        let scored = score_rounded(&self.model, &spec, &self.text.windows, progress)?;
        let measured = self.compare(&scored)?;
        self.rounded.insert(key, measured);
        Ok(measured)
    }

    fn compare(&self, scored: &Scored) -> Result<Measured> {
        Ok(Measured {
            perplexity: scored.perplexity(&self.model)?.perplexity,
            kl: scored.kl_from(&self.scored, &self.model)?,
        })
    }
}
