//! A sweep: every branch of a configuration made, then measured from its file.
//!
//! What branches share is done once: the calibration windows, the first Gram (see [`FirstGrams`]),
//! the dense model's perplexity and its final hidden states (for KL), and the rounded baseline of
//! each grid. Finished branches are found and reused (see [`crate::sweep::resume`]).

pub mod config;
mod dense_measure;
pub mod jobs;
pub mod log;
pub mod resume;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use gptq_checkpoint::{Checkpoint, MANIFEST_FILE, Partial, REPORT_FILE, finish_rename};
use gptq_compute::{Device, Ranks};
use gptq_records::branch_report::{BranchReport, EvaluationRecord, TOOL, model_name};
use gptq_records::digest::sha256;
use gptq_records::locks::Lock;
use gptq_records::manifest::{MadeFrom, Manifest};
use gptq_records::source_digest::source_digest;
use gptq_text::calibration::Calibration;
use gptq_text::evaluation::{EvalText, evaluation_text};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::first_gram::FirstGrams;
use crate::job::QuantizeJob;
use crate::plan::{BranchPlan, Setting, plan_branch};
use crate::progress::Progress;
use crate::quantize::{Made, make};
use crate::recording::refuse_retries;
use crate::write::metadata;
use config::{Branch, SweepConfig};
use dense_measure::DenseMeasure;
use log::{Seconds, SweepLog, SweepReport, SweepRow};
use resume::{Left, State, look, unlink_moved};

/// Branches to make, and everything that they are made with.
#[derive(Clone, Debug)]
pub struct SweepJob<'a> {
    /// The configuration.
    pub config: &'a SweepConfig,
    /// Its branches that this process makes.
    pub branches: &'a [Branch],
    /// The dense model.
    pub source: &'a Checkpoint,
    /// Windows that all branches are calibrated on.
    pub calibration: &'a Calibration,
    /// Where to compute.
    pub device: &'a Device,
    /// Folder for the branches, one folder each.
    pub out: &'a Path,
    /// Treat a Hessian that needed f64 or more damping as an error.
    pub strict: bool,
}

/// What a sweep would do, before anything is done.
#[derive(Clone, Debug)]
pub struct Survey {
    text: Option<EvalText>,
    measured_on: Option<String>,
    /// Digest of the source.
    source: String,
    branches: Vec<Surveyed>,
}

#[derive(Clone, Debug)]
struct Surveyed {
    made_from: MadeFrom,
    state: State,
}

impl Survey {
    /// Finds out what there is of every branch of `job`. Changes nothing; finished branches are read
    /// in full, several at a time.
    ///
    /// # Errors
    /// A source, text or folder that cannot be read, and folders that a sweep must not replace.
    pub fn new(job: &SweepJob<'_>, progress: &dyn Progress) -> Result<Self> {
        let source = source_digest(job.source)?;
        let text = match &job.config.evaluation {
            Some(spec) => Some(evaluation_text(job.source, spec, Some(&job.calibration.dataset))?),
            None => None,
        };
        let measured_on = text.as_ref().map(describe);
        progress.note("checking what there is");
        let branches = job.branches.par_iter().map(|branch| {
            let made_from = job.made_from(branch, &source);
            let state = look(&job.dir(branch), &made_from, measured_on.as_deref())?;
            Ok(Surveyed { made_from, state })
        });
        Ok(Self { branches: branches.collect::<Result<_>>()?, measured_on, source, text })
    }

    /// What is reused must pass what is made now.
    fn forbid_retries(&self) -> Result<()> {
        let reports = self.branches.iter().filter_map(|b| b.state.report());
        for report in reports {
            for linear in report.linears() {
                refuse_retries(linear, report.damp)?;
            }
        }
        Ok(())
    }

    /// The state of every branch, in the job's order.
    pub fn states(&self) -> impl Iterator<Item = &State> {
        self.branches.iter().map(|b| &b.state)
    }
}

/// Makes and measures the branches of `job` that are not finished yet.
///
/// # Errors
/// Everything that can go wrong with a branch. Those finished before are kept, and the next run
/// goes on from there.
pub fn sweep(job: &SweepJob<'_>, progress: &dyn Progress) -> Result<SweepReport> {
    let lock = |branch: &Branch| Lock::branch(job.out, &branch.name);
    let _locks: Vec<Lock> = job.branches.iter().map(lock).collect::<gptq_records::Result<_>>()?;
    let survey = Survey::new(job, progress)?;
    announce(job, &survey, progress);
    if job.strict {
        survey.forbid_retries()?;
    }
    let names = job.config.branches.iter().map(|b| b.name.as_str()).collect();
    let log = SweepLog::new(job.out, names);
    let mut run = Run::start(job, &survey, log.read(), progress)?;
    for (branch, surveyed) in job.branches.iter().zip(survey.branches) {
        run.branch(branch, surveyed)?;
        log.update(&run.report)?;
    }
    Ok(run.report)
}

/// Announces what an earlier run left.
fn announce(job: &SweepJob<'_>, survey: &Survey, progress: &dyn Progress) {
    for (branch, state) in job.branches.iter().zip(survey.states()) {
        let name = &branch.name;
        match state {
            State::New => {}
            State::Finished(_) => progress.note(&format!("{name}: finished, reused")),
            State::Made(_) => progress.note(&format!("{name}: made, to be measured")),
            State::Remeasure(_) => {
                progress.note(&format!("{name}: finished, but measured on something else"));
            }
            State::Stale(why) => progress.warn(&format!("{name} starts over: {why}")),
        }
    }
}

/// A text and its windows, in one line that equal measurements share.
fn describe(text: &EvalText) -> String {
    let tokens = text.tokens_in_text.map_or_else(|| "many".to_owned(), |n| n.to_string());
    format!(
        "{}, {} × {} of {tokens} tokens of {} ({}), sha256 {}",
        text.protocol,
        text.windows.len(),
        text.seq_len,
        text.identity.portable().name,
        text.identity.fingerprint,
        text.sha256()
    )
}

impl SweepJob<'_> {
    /// What a branch costs, its size to the byte; `gpu_memory` is the card's, in bytes.
    ///
    /// # Errors
    /// Settings that the model's shape does not allow.
    pub fn plan(&self, branch: &Branch, gpu_memory: u64) -> Result<BranchPlan> {
        let calibration = Some(self.calibration).filter(|_| branch.spec.recipe.calibrates());
        let windows = &self.calibration.windows;
        plan_branch(
            self.source.config(),
            &branch.spec,
            self.config.source_dtype,
            self.config.layout,
            &metadata(&branch.spec, self.config.source_dtype, calibration),
            Setting {
                windows: windows.len(),
                seq_len: windows.first().map_or(0, Vec::len),
                shared_grams: self.config.shared_grams(),
                gpu_memory,
            },
        )
    }

    fn dir(&self, branch: &Branch) -> PathBuf {
        self.out.join(&branch.name)
    }

    /// Everything that the bytes of a branch depend on.
    fn made_from(&self, branch: &Branch, source: &str) -> MadeFrom {
        let spec = &branch.spec;
        let group = gptq_checkpoint::GroupSize(spec.group_size).to_string();
        let mut settings = format!(
            "{} bits, group size {group}, act-order {}, damp {:?}, {}",
            spec.bits,
            spec.act_order,
            spec.damp,
            spec.recipe.name()
        );
        let mut calibration = "none".to_owned();
        if spec.recipe.calibrates() {
            let c = self.calibration;
            settings.push_str(&format!(", {}", spec.choices));
            calibration = format!(
                "{} × {} tokens of {} ({}), seed {}, sha256 {}",
                c.windows.len(),
                c.windows.first().map_or(0, Vec::len),
                c.dataset.portable().name,
                c.dataset.fingerprint,
                c.seed,
                c.sha256
            );
        }
        [
            ("the program", TOOL.to_owned()),
            ("the branch", branch.name.clone()),
            ("the model", model_name(&self.config.model)),
            ("the source", source.to_owned()),
            ("settings", settings),
            ("source dtype", self.config.source_dtype.name().to_owned()),
            ("layout", self.config.layout.name().to_owned()),
            ("calibration", calibration),
            ("the device", self.device.kind()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

/// A sweep on its way.
struct Run<'a> {
    job: &'a SweepJob<'a>,
    progress: &'a dyn Progress,
    measured_on: Option<String>,
    /// Not needed where every branch is finished.
    baseline: Option<DenseMeasure<'a>>,
    shared: FirstGrams,
    /// The table of an earlier run, for its timings.
    earlier: Vec<SweepRow>,
    report: SweepReport,
}

impl<'a> Run<'a> {
    /// Measures the dense model, before anything long is begun, unless an earlier run has and nothing
    /// is to be compared with it.
    fn start(
        job: &'a SweepJob<'a>,
        survey: &Survey,
        earlier: Option<SweepReport>,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let Survey { text, measured_on, source, branches } = survey;
        let dtype = job.config.source_dtype;
        let baseline_key = measured_on.as_ref().map(|on| {
            let of = format!("{TOOL}\n{source}\n{}\n{on}\n{}", dtype.name(), job.device.kind());
            sha256(of.as_bytes())
        });
        let known = earlier.as_ref().filter(|e| e.baseline_key == baseline_key);
        let mut report = SweepReport {
            model: job.config.model.clone(),
            source_dtype: dtype,
            baseline: known.and_then(|e| e.baseline),
            baseline_key,
            evaluation: text.clone(),
            rows: Vec::with_capacity(branches.len()),
        };
        report.judge_text();
        let finished = branches.iter().all(|b| matches!(b.state, State::Finished(_)));
        let idle = branches.is_empty() || (finished && report.baseline.is_some());
        let mut baseline = None;
        if let Some(text) = text.clone().filter(|_| !idle) {
            let mut made = DenseMeasure::measure((job.source, dtype), text, job.device, progress)?;
            for surveyed in branches {
                if let State::Finished(report) = &surveyed.state {
                    made.remember(report);
                }
            }
            report.baseline = Some(made.perplexity);
            baseline = Some(made);
        }
        let measured_on = measured_on.clone();
        let earlier = earlier.map_or_else(Vec::new, |e| e.rows);
        let shared = FirstGrams::default();
        Ok(Self { job, progress, measured_on, baseline, shared, earlier, report })
    }

    /// Makes a branch, goes on with it, or takes it as it is.
    fn branch(&mut self, branch: &Branch, surveyed: Surveyed) -> Result<()> {
        let dir = self.job.dir(branch);
        let Surveyed { made_from, state } = surveyed;
        let lines: Vec<&str> =
            made_from.values().chain(&self.measured_on).map(String::as_str).collect();
        let key = sha256(lines.join("\n").as_bytes());
        let known =
            self.earlier.iter().find(|row| row.key == key).map_or_else(Seconds::default, |row| {
                Seconds { quantize: row.quantize_seconds, measure: row.measure_seconds }
            });
        let (report, seconds) = match state {
            State::Finished(report) => {
                finish_rename(&dir)?;
                (*report, known)
            }
            State::Made(left) => {
                // Nobody else may touch it: this process holds the branch's lock.
                let folder = Partial::resume(&dir)?.ok_or(Error::ForeignBranch(dir.clone()))?;
                self.go_on(branch, folder, *left, known)?
            }
            State::Remeasure(left) => self.go_on(branch, Partial::reopen(&dir)?, *left, known)?,
            State::Stale(_) | State::New => {
                if unlink_moved(&dir)? {
                    let name = &branch.name;
                    self.progress.note(&format!(
                        "{name}: was a link, which is removed; what it led to stays"
                    ));
                }
                if matches!(state, State::Stale(_)) && dir.exists() {
                    // Withdrawn, it is a left-over that the writer replaces.
                    drop(Partial::reopen(&dir)?);
                }
                self.make(branch, &made_from)?
            }
        };
        self.report.rows.push(SweepRow::new(&report, dir, key, seconds));
        self.report.judge_text();
        Ok(())
    }

    /// Makes a branch and measures it.
    fn make(&mut self, branch: &Branch, made_from: &MadeFrom) -> Result<(BranchReport, Seconds)> {
        let job = self.job;
        let start = Instant::now();
        let quantize = QuantizeJob {
            source: job.source,
            model: model_name(&job.config.model),
            branch: branch.name.clone(),
            source_dtype: job.config.source_dtype,
            device: job.device.clone(),
            ranks: Ranks::alone(),
            spec: branch.spec.clone(),
            calibration: Some(job.calibration).filter(|_| branch.spec.recipe.calibrates()),
            layout: job.config.layout,
            out: job.dir(branch),
            max_shard_bytes: None,
            strict: job.strict,
            shared: Some(&self.shared),
        };
        let Some(Made { sealed, report, .. }) = make(&quantize, self.progress)? else {
            // What several ranks make is the first one's; here there is one, and it is the first.
            let source = io::Error::other("the run ended without a checkpoint");
            return Err(gptq_records::Error::io("make", &quantize.out)(source).into());
        };
        let mut folder = sealed.folder;
        let quantize = Some(start.elapsed().as_secs_f64());
        let start = Instant::now();
        // Listed first: a run that is killed while it measures only has to measure again.
        let manifest = Manifest::list(&folder, &sealed.files, made_from, &report)?;
        let record = self.measure(branch, folder.path());
        // Whatever was wrong with the measurement, the next run need not make the branch again.
        folder.keep_on_drop();
        let report = publish(folder, manifest, report, record?, self.measured_on.as_deref())?;
        Ok((report, Seconds { quantize, measure: Some(start.elapsed().as_secs_f64()) }))
    }

    /// Measures a branch that is made.
    fn go_on(
        &mut self,
        branch: &Branch,
        folder: Partial,
        left: Left,
        known: Seconds,
    ) -> Result<(BranchReport, Seconds)> {
        let start = Instant::now();
        let record = self.measure(branch, folder.path())?;
        let Left { manifest, report } = left;
        let report = publish(folder, manifest, report, record, self.measured_on.as_deref())?;
        Ok((report, Seconds { measure: Some(start.elapsed().as_secs_f64()), ..known }))
    }

    /// Measures the checkpoint in a folder, if the configuration asks for it.
    fn measure(&mut self, branch: &Branch, dir: &Path) -> Result<Option<EvaluationRecord>> {
        let progress = self.progress;
        self.baseline.as_mut().map(|b| b.record(&branch.spec, dir, progress)).transpose()
    }
}

/// Writes what was measured, and the manifest as the last file, and gives the branch its name.
fn publish(
    folder: Partial,
    manifest: Manifest,
    mut report: BranchReport,
    record: Option<EvaluationRecord>,
    measured_on: Option<&str>,
) -> Result<BranchReport> {
    report.evaluations = record.into_iter().collect();
    let bytes = report.to_bytes()?;
    folder.replace(REPORT_FILE, &bytes)?;
    folder.replace(MANIFEST_FILE, &manifest.measured(measured_on, &bytes).to_bytes()?)?;
    folder.publish()?;
    Ok(report)
}
