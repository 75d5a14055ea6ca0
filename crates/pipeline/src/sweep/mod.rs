//! A sweep: every branch of a configuration made, then measured from its file.
//!
//! What branches share is done once: the calibration windows, the first Gram (see
//! [`crate::first_gram`]), the dense model's perplexity and its final hidden states (for KL), and the
//! rounded baseline of each grid. Branches that are made side by side read the source together (see
//! `group`); a source that is deleted while it is read is read once for all (see `one_source`).
//! Finished branches are found and reused (see [`crate::sweep::resume`]).

pub mod config;
mod dense_along;
mod dense_measure;
mod group;
pub mod jobs;
pub mod log;
mod one_source;
pub mod predict;
pub mod resume;
mod run;

use std::path::{Path, PathBuf};

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_records::branch_report::{TOOL, model_name};
use gptq_records::locks::Lock;
use gptq_records::manifest::MadeFrom;
use gptq_text::calibration::Calibration;
use gptq_text::evaluation::{EvalText, evaluation_text};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::plan::{BranchPlan, Setting, plan_branch};
use crate::progress::Progress;
use crate::rates::KnownRates;
use crate::recording::refuse_retries;
use crate::write::metadata;
use config::{Branch, SweepConfig};
use log::{SweepLog, SweepReport};
use resume::{State, look};
use run::Run;

/// Branches to make, and everything that they are made with.
#[derive(Clone, Debug)]
pub struct SweepJob<'a> {
    /// The configuration.
    pub config: &'a SweepConfig,
    /// Its branches that this process makes.
    pub branches: &'a [Branch],
    /// The dense model.
    pub source: &'a Checkpoint,
    /// Of a source whose shards come and go, what they are of: other contents have another name.
    pub origin: Option<&'a str>,
    /// Windows that all branches are calibrated on.
    pub calibration: &'a Calibration,
    /// Where to compute, all of one kind: each makes branches of its own.
    pub devices: &'a [Device],
    /// Branches that a device makes at the same time.
    pub together: usize,
    /// Folder for the branches, one folder each.
    pub out: &'a Path,
    /// Treat a Hessian that needed f64 or more damping as an error.
    pub strict: bool,
    /// What is known of a device, for predictions.
    pub rates: &'a KnownRates,
}

/// What a sweep would do, before anything is done.
#[derive(Clone, Debug)]
pub struct Survey {
    text: Option<EvalText>,
    measured_on: Option<String>,
    /// Digest of the source, unless it has to be read first.
    source: Option<String>,
    branches: Vec<Surveyed>,
}

#[derive(Clone, Debug)]
struct Surveyed {
    made_from: MadeFrom,
    state: State,
}

impl Surveyed {
    fn is_to_be_made(&self) -> bool {
        matches!(self.state, State::New | State::Stale(_))
    }
}

impl Survey {
    /// Finds out what there is of every branch of `job`. Changes nothing; finished branches are read
    /// in full, several at a time.
    ///
    /// # Errors
    /// A source, text or folder that cannot be read, and folders that a sweep must not replace; of a
    /// source that can be read once, also a sweep that would read it again.
    pub fn new(job: &SweepJob<'_>, progress: &dyn Progress) -> Result<Self> {
        let source = one_source::known_digest(job)?;
        let text = match &job.config.evaluation {
            Some(spec) => Some(evaluation_text(job.source, spec, Some(&job.calibration.dataset))?),
            None => None,
        };
        let measured_on = text.as_ref().map(describe);
        progress.note("checking what there is");
        let branches = job.branches.par_iter().map(|branch| {
            let made_from = job.made_from(branch, source.as_deref());
            if source.is_none() {
                one_source::check_unread(&job.dir(branch))?;
            }
            let state = look(&job.dir(branch), &made_from, measured_on.as_deref())?;
            Ok(Surveyed { made_from, state })
        });
        let survey = Self { branches: branches.collect::<Result<_>>()?, measured_on, source, text };
        one_source::check(job, &survey)?;
        Ok(survey)
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
/// Everything that can go wrong before the first branch, and [`Error::Branches`] for branches that
/// failed, once all others are finished; the next run goes on from there.
pub fn sweep(job: &SweepJob<'_>, progress: &dyn Progress) -> Result<SweepReport> {
    job.check_devices()?;
    let lock = |branch: &Branch| Lock::branch(job.out, &branch.name);
    let _locks: Vec<Lock> = job.branches.iter().map(lock).collect::<gptq_records::Result<_>>()?;
    let survey = Survey::new(job, progress)?;
    announce(job, &survey, progress);
    if job.strict {
        survey.forbid_retries()?;
    }
    let names = job.config.branches.iter().map(|b| b.name.as_str()).collect();
    let log = SweepLog::new(job.out, names);
    Run::start(job, &survey, log.read(), progress)?.all(survey.branches, &log)
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
                together: self.together,
                gpu_memory,
            },
        )
    }

    /// Branches that are made at the same time, on all devices.
    fn at_once(&self) -> usize {
        self.devices.len().max(1) * self.together.max(1)
    }

    /// The first device, of whose kind all are.
    fn device(&self) -> &Device {
        self.devices.first().unwrap_or(&Device::Cpu)
    }

    /// Bytes on devices of several kinds differ, and a branch's name does not say where it was made.
    fn check_devices(&self) -> Result<()> {
        let kind = self.device().kind();
        match self.devices.iter().find(|device| device.kind() != kind) {
            Some(other) => Err(Error::DeviceKinds { one: kind, other: other.kind() }),
            None => Ok(()),
        }
    }

    fn dir(&self, branch: &Branch) -> PathBuf {
        self.out.join(&branch.name)
    }

    /// Everything that the bytes of a branch depend on, the source as far as it is known.
    fn made_from(&self, branch: &Branch, source: Option<&str>) -> MadeFrom {
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
            ("settings", settings),
            ("source dtype", self.config.source_dtype.name().to_owned()),
            ("layout", self.config.layout.name().to_owned()),
            ("calibration", calibration),
            ("the device", self.device().kind()),
        ]
        .into_iter()
        .chain(source.map(|digest| (one_source::SOURCE, digest.to_owned())))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}
