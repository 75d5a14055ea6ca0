//! Everything that can be checked of a GPTQ checkpoint, all findings at once.
//!
//! Without a base: the files against their recorded sums, the configuration files against each other
//! and against the tensors (`structure`), and every value that has a rule (`contents`). With the
//! dense model that it was made from: what the weights are computed with (`base_model`), every
//! linear in the same coordinates (`weights`), which shows single words that were changed, and all
//! that is not quantized (`dense`). With a text: output errors on the checkpoint's own activations,
//! perplexity and KL divergence (`outputs`).
//!
//! Any 32-bit word is a valid run of codes, so codes are in range by construction; a damaged one is
//! seen by its sum or by its distance from the base.

mod base;
mod base_model;
mod base_weight;
mod columns;
mod contents;
mod dense;
mod findings;
mod fit;
mod gains;
mod grid;
mod head;
mod head_columns;
mod job;
mod learned_stream;
mod odd_words;
mod one_map;
mod other_parts;
mod outputs;
mod pairs;
mod rows;
mod structure;
mod sums;
mod swapped;
mod weights;

use std::path::{Path, PathBuf};

use gptq_checkpoint::loaders::{LoaderVerdict, verdicts};
use gptq_checkpoint::{CONFIG_FILE, Checkpoint, Head, Layout, QuantizeConfig};
use gptq_text::evaluation::EvalText;
use serde::Serialize;

use crate::error::Result;
use crate::progress::Progress;
use findings::Findings;

pub use findings::{Check, Checked, Finding};
pub use job::{Limits, VerifyJob};
pub use outputs::Outputs;
pub use weights::{LinearError, Weights};

/// How the checkpoint is quantized, as its tensors have it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Settings {
    /// Width of a code.
    pub bits: u8,
    /// Columns of a group; `null` is all of in_features.
    pub group_size: Option<usize>,
    /// Columns were solved by importance.
    pub act_order: bool,
    /// `modern` or `card`.
    pub layout: &'static str,
    /// Bytes of the weight files.
    pub file_bytes: u64,
}

/// The outcome.
#[derive(Debug, Serialize)]
pub struct VerifyReport {
    /// The checkpoint.
    pub dir: PathBuf,
    /// Nothing is wrong.
    pub passed: bool,
    /// `null` when the weights cannot be read.
    pub settings: Option<Settings>,
    /// The checks that were made.
    pub checks: Vec<Checked>,
    /// All that is wrong.
    pub findings: Vec<Finding>,
    /// Against the base.
    pub weights: Option<Weights>,
    /// The text that the outputs were measured on.
    pub text: Option<EvalText>,
    /// On the text.
    pub outputs: Option<Outputs>,
    /// Who loads it; empty when the weights cannot be read.
    pub loaders: Vec<LoaderVerdict>,
}

/// Runs every check that the job has the means for.
///
/// # Errors
/// What keeps checks from being made: no such folder, a dense checkpoint, a base or a text that
/// cannot be read. What is wrong with the checkpoint itself is a finding.
pub fn verify(job: &VerifyJob<'_>, progress: &dyn Progress) -> Result<VerifyReport> {
    let mut findings = Findings::default();
    let mut report = VerifyReport {
        dir: job.dir.to_owned(),
        passed: false,
        settings: None,
        checks: Vec::new(),
        findings: Vec::new(),
        weights: None,
        text: None,
        outputs: None,
        loaders: Vec::new(),
    };
    sums::check(job.dir, &mut findings)?;
    sums::check_report(job.dir, &mut findings);
    let files = structure::ConfigFiles::read(job.dir)?;
    if let Some(checkpoint) = open(job.dir, &mut findings)? {
        readable(job, checkpoint, &files, &mut findings, &mut report, progress)?;
    } else {
        structure::check_configs(&files, None, &mut findings);
    }
    let Findings { list, examined } = findings;
    let count = |check| list.iter().filter(|f| f.check == check).count();
    report.checks = examined
        .into_iter()
        .map(|(check, examined)| Checked { check, examined, findings: count(check) })
        .collect();
    report.passed = list.is_empty();
    report.findings = list;
    Ok(report)
}

/// Opens the folder; a damaged one is a finding.
fn open(dir: &Path, findings: &mut Findings) -> Result<Option<Checkpoint>> {
    use gptq_checkpoint::Error;
    findings.examine(Check::Files, 1);
    // Settings that contradict each other are found one by one.
    match Checkpoint::open_contradicting(dir) {
        Ok(checkpoint) if checkpoint.quantize_config().is_none() => {
            Err(Error::NotQuantized { dir: dir.to_owned() }.into())
        }
        Ok(checkpoint) => Ok(Some(checkpoint)),
        Err(error @ (Error::NoWeights { .. } | Error::NoSettings { .. })) => Err(error.into()),
        Err(error) => {
            findings.add_error(Check::Files, dir.display().to_string(), error);
            Ok(None)
        }
    }
}

/// The checks of a checkpoint whose weight files can be read.
fn readable(
    job: &VerifyJob<'_>,
    checkpoint: Checkpoint,
    files: &structure::ConfigFiles,
    findings: &mut Findings,
    report: &mut VerifyReport,
    progress: &dyn Progress,
) -> Result<()> {
    let stored = structure::stored_settings(&checkpoint);
    structure::check_configs(files, Some((&checkpoint, &stored)), findings);
    let checkpoint = checkpoint.with_quantize_config(stored.clone());
    // A table that cannot be read is found with the other tensors.
    if checkpoint.head().is_ok_and(|head| head == Head::Untied) {
        let message = "ties the head to the embedding, but lm_head.weight holds other values, and \
                       loaders disagree on which to use";
        let hint = "set tie_word_embeddings to false";
        findings.add_with_hint(Check::Configuration, CONFIG_FILE, message, hint);
    }
    let layout = structure::check_tensors(&checkpoint, &stored, findings);
    let values = contents::check(&checkpoint, &stored, findings);
    report.settings = Some(settings(&checkpoint, &stored, layout));
    report.loaders = verdicts(&structure::loader_facts(&checkpoint, &stored, files, &values));
    if let Some(base) = job.base {
        base_model::check(&checkpoint, base, findings);
    }
    // With tensors missing or misshapen there is nothing to compute with.
    let sound = findings.of(Check::Tensors) == 0 && !values.unreadable;
    if let Some(base) = job.base.filter(|_| sound) {
        report.weights = Some(weights::compare(&checkpoint, base, &stored, findings, progress)?);
    }
    // Nor is there anything to run where a norm or the embedding is not finite.
    let runs = sound && findings.of(Check::Dense) == 0;
    if let Some(spec) = job.text.filter(|_| runs) {
        let rotations = report.weights.as_ref().and_then(|weights| weights.rotations.clone());
        let run = outputs::Run { job, checkpoint: &checkpoint, rotations };
        let (text, measured) = run.measure(spec, report.weights.as_mut(), progress)?;
        outputs::check_limits(job, &measured, report.weights.as_ref(), findings);
        (report.text, report.outputs) = (Some(text), Some(measured));
    }
    Ok(())
}

fn settings(checkpoint: &Checkpoint, stored: &QuantizeConfig, layout: Layout) -> Settings {
    Settings {
        bits: stored.bits.get(),
        group_size: stored.group_size,
        act_order: stored.desc_act,
        layout: match layout {
            Layout::Card => "card",
            Layout::Modern => "modern",
        },
        file_bytes: checkpoint.total_bytes(),
    }
}
