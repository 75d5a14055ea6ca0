//! Branches made side by side, from one reading of the source.
//!
//! Each branch has a thread of its own, with its own reader, writer and states. Branches on different
//! devices compute at the same time; those on one device take turns, block by block, which costs no
//! time and lets them share the reading. Nothing that a branch computes depends on the others, so its
//! bytes are those that it has when it is made alone.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use gptq_checkpoint::Partial;
use gptq_compute::Ranks;
use gptq_records::branch_report::{BranchReport, model_name};
use gptq_records::manifest::{MadeFrom, Manifest};

use super::SweepJob;
use super::config::Branch;
use crate::error::{Error, Result};
use crate::first_gram::FirstGrams;
use crate::job::{Beside, QuantizeJob};
use crate::lock::lock;
use crate::memory::{BlockSizes, Offload, offload};
use crate::one_reading::OneReading;
use crate::progress::{BlockReport, Progress};
use crate::quantize::{Made, make};

/// A branch to make, and what its manifest will say that it was made from.
pub(super) type Member<'a> = (&'a Branch, &'a MadeFrom);

/// A branch whose files are complete and listed, but for a measurement. Its folder is kept whatever
/// becomes of that: the next run need not make it again.
pub(super) struct MadeBranch {
    pub(super) folder: Partial,
    pub(super) manifest: Manifest,
    pub(super) report: BranchReport,
    /// Wall-clock.
    pub(super) seconds: f64,
}

/// Makes all members, the first on the first device and so on; `shared` is what each device's branches
/// have in common. The answers come in the members' order.
pub(super) fn make_together(
    job: &SweepJob<'_>,
    members: &[Member<'_>],
    shared: &[FirstGrams],
    progress: &dyn Progress,
) -> Result<Vec<Result<MadeBranch>>> {
    let of_device = |member: usize| member % job.devices.len().max(1);
    let jobs: Vec<QuantizeJob<'_>> = members
        .iter()
        .enumerate()
        .map(|(member, (branch, _))| quantize_job(job, branch, of_device(member), shared))
        .collect();
    if let [(_, made_from)] = members {
        return Ok(jobs.iter().map(|job| make_one(job, made_from, progress)).collect());
    }
    let reading = OneReading::new(members.len());
    let turns: Vec<Mutex<()>> = job.devices.iter().map(|_| Mutex::new(())).collect();
    let offload = offload_of_devices(job, &jobs)?;
    let progress = Shared::new(progress, members.len());
    let readers: Vec<_> = (0..members.len()).map(|member| reading.reader(member)).collect();
    let made = std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(members.len());
        for (member, ((job, reader), (branch, made_from))) in
            jobs.iter().zip(readers).zip(members).enumerate()
        {
            let device = of_device(member);
            let (turn, offload) = (&turns[device], offload[device]);
            let progress = progress.of(&branch.name);
            threads.push(scope.spawn(move || {
                // Dropped with this thread, however it ends: the others wait for it no more.
                let reader = reader;
                let beside = Some(Beside { reader: &reader, turn, offload });
                make_one(&QuantizeJob { beside, ..job.clone() }, made_from, &progress)
            }));
        }
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(Error::Thread("branch"))))
            .collect()
    });
    progress.end();
    Ok(made)
}

fn quantize_job<'a>(
    job: &SweepJob<'a>,
    branch: &Branch,
    device: usize,
    shared: &'a [FirstGrams],
) -> QuantizeJob<'a> {
    QuantizeJob {
        source: job.source,
        model: model_name(&job.config.model),
        branch: branch.name.clone(),
        source_dtype: job.config.source_dtype,
        device: job.devices.get(device).unwrap_or(job.device()).clone(),
        ranks: Ranks::alone(),
        spec: branch.spec.clone(),
        calibration: Some(job.calibration).filter(|_| branch.spec.recipe.calibrates()),
        layout: job.config.layout,
        out: job.dir(branch),
        max_shard_bytes: None,
        strict: job.strict,
        shared: shared.get(device),
        beside: None,
    }
}

/// What the branches of each device keep in host memory.
fn offload_of_devices(job: &SweepJob<'_>, jobs: &[QuantizeJob<'_>]) -> Result<Vec<Offload>> {
    let block = BlockSizes::of(job.source.config());
    let of_device = |(number, device)| {
        let own = jobs.iter().skip(number).step_by(job.devices.len());
        let works: Vec<_> = own.map(QuantizeJob::workload).collect();
        offload(device, block, &works)
    };
    job.devices.iter().enumerate().map(of_device).collect()
}

/// Makes a branch and lists its files, so that a run that is killed while it is measured only has to
/// measure it again.
fn make_one(
    job: &QuantizeJob<'_>,
    made_from: &MadeFrom,
    progress: &dyn Progress,
) -> Result<MadeBranch> {
    let start = Instant::now();
    let Some(Made { sealed, report, .. }) = make(job, progress)? else {
        // What several ranks make is the first one's; here there is one, and it is the first.
        let source = std::io::Error::other("the run ended without a checkpoint");
        return Err(gptq_records::Error::io("make", &job.out)(source).into());
    };
    let mut folder = sealed.folder;
    let manifest = Manifest::list(&folder, &sealed.files, made_from, &report)?;
    folder.keep_on_drop();
    Ok(MadeBranch { folder, manifest, report, seconds: start.elapsed().as_secs_f64() })
}

/// One drawing of the progress of several branches.
struct Shared<'a> {
    inner: &'a dyn Progress,
    branches: usize,
    /// Blocks that each branch has, once the first has reported it.
    steps: Mutex<BTreeMap<String, usize>>,
}

/// A branch's part in it.
struct OfBranch<'a> {
    all: &'a Shared<'a>,
    branch: &'a str,
}

impl<'a> Shared<'a> {
    fn new(inner: &'a dyn Progress, branches: usize) -> Self {
        Self { inner, branches, steps: Mutex::default() }
    }

    fn of(&'a self, branch: &'a str) -> OfBranch<'a> {
        OfBranch { all: self, branch }
    }

    fn end(&self) {
        if !lock(&self.steps).is_empty() {
            self.inner.end();
        }
    }
}

impl Progress for OfBranch<'_> {
    fn begin(&self, phase: &str, steps: usize) {
        let Shared { inner, branches, steps: begun } = self.all;
        let mut begun = lock(begun);
        if begun.is_empty() {
            inner.begin(&format!("{phase} {branches} branches"), steps * branches);
        }
        begun.insert(self.branch.to_owned(), steps);
    }

    fn step(&self) {
        self.all.inner.step();
    }

    fn block(&self, report: &BlockReport) {
        let begun = lock(&self.all.steps);
        let steps = begun.get(self.branch).copied().unwrap_or(0);
        self.all.inner.block_of(self.branch, report, steps);
    }

    fn block_of(&self, branch: &str, report: &BlockReport, steps: usize) {
        self.all.inner.block_of(branch, report, steps);
    }

    /// The branches end together.
    fn end(&self) {}

    fn note(&self, message: &str) {
        self.all.inner.note(&format!("{}: {message}", self.branch));
    }

    fn warn(&self, message: &str) {
        self.all.inner.warn(&format!("{}: {message}", self.branch));
    }
}
