//! Branches made side by side, from one reading of the source.
//!
//! Each branch has a thread of its own, with its own reader, writer and states. Branches on different
//! devices compute at the same time; those on one device take turns, block by block, which costs no
//! time and lets them share the reading. Nothing that a branch computes depends on the others, so its
//! bytes are those that it has when it is made alone.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

use gptq_checkpoint::Partial;
use gptq_compute::Ranks;
use gptq_records::branch_report::{BranchReport, model_name};
use gptq_records::manifest::{MadeFrom, Manifest};

use super::config::Branch;
use super::source_digest::Digest;
use super::sweep_job::SweepJob;
use crate::error::{Error, Result};
use crate::first_gram::FirstGrams;
use crate::job::{Beside, QuantizeJob};
use crate::lock::lock;
use crate::memory::{Along, BlockSizes, Offload, offload_beside};
use crate::one_reading::{OneReading, Seat};
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
/// have in common, `digest` the source's. The answers come in the members' order.
pub(super) fn make_together(
    job: &SweepJob<'_>,
    members: &[Member<'_>],
    shared: &[FirstGrams],
    digest: &Digest,
    progress: &dyn Progress,
) -> Result<Vec<Result<MadeBranch>>> {
    if let &[(branch, made_from)] = members {
        let job = quantize_job(job, branch, 0, shared);
        return Ok(vec![make_one(&job, made_from, digest, progress)]);
    }
    let alone = vec![Along::default(); job.devices.len()];
    let group = Group::new(job, members, shared, &alone, digest)?;
    let reading = OneReading::new(members.len());
    let progress = Shared::new(progress, members.len());
    let made = std::thread::scope(|scope| join(group.spawn(scope, &reading, &progress)));
    progress.end();
    Ok(made)
}

/// Branches that are to be made side by side, and what those of a device share.
pub(super) struct Group<'a> {
    jobs: Vec<QuantizeJob<'a>>,
    members: &'a [Member<'a>],
    digest: &'a Digest,
    /// Of each device.
    pub(super) turns: Vec<Mutex<()>>,
    offload: Vec<Offload>,
}

type Making<'scope> = ScopedJoinHandle<'scope, Result<MadeBranch>>;

impl<'a> Group<'a> {
    /// Plans memory for all members, `along` whatever else each device holds.
    pub(super) fn new(
        job: &SweepJob<'a>,
        members: &'a [Member<'a>],
        shared: &'a [FirstGrams],
        along: &[Along],
        digest: &'a Digest,
    ) -> Result<Self> {
        let jobs: Vec<_> = members
            .iter()
            .enumerate()
            .map(|(member, (branch, _))| {
                quantize_job(job, branch, device_of(member, job.devices.len()), shared)
            })
            .collect();
        let turns = job.devices.iter().map(|_| Mutex::new(())).collect();
        let offload = offload_of_devices(job, &jobs, along)?;
        Ok(Self { jobs, members, digest, turns, offload })
    }

    /// Begins with all members, which are the first walks of the reading.
    pub(super) fn spawn<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        reading: &'env OneReading,
        progress: &'env Shared<'_>,
    ) -> Vec<Making<'scope>> {
        let begin = |(member, job): (usize, &'env QuantizeJob<'a>)| {
            let (branch, made_from) = self.members[member];
            let device = device_of(member, self.turns.len());
            let (turn, offload) = (&self.turns[device], self.offload[device]);
            let (reader, progress) = (reading.reader(member), progress.of(&branch.name));
            scope.spawn(move || {
                // Dropped with this thread, however it ends: the others wait for it no more.
                let reader = reader;
                let beside = Some(Beside { seat: Seat { reader: &reader, turn }, offload });
                let job = QuantizeJob { beside, ..job.clone() };
                make_one(&job, made_from, self.digest, &progress)
            })
        };
        self.jobs.iter().enumerate().map(begin).collect()
    }
}

/// What became of all members, in their order.
pub(super) fn join(threads: Vec<Making<'_>>) -> Vec<Result<MadeBranch>> {
    let joined = threads.into_iter().map(ScopedJoinHandle::join);
    joined.map(|thread| thread.unwrap_or(Err(Error::Thread("branch")))).collect()
}

/// The device, of so many, that a member is made on.
pub(super) fn device_of(member: usize, devices: usize) -> usize {
    member % devices.max(1)
}

fn quantize_job<'a>(
    job: &SweepJob<'a>,
    branch: &Branch,
    device: usize,
    shared: &'a [FirstGrams],
) -> QuantizeJob<'a> {
    QuantizeJob {
        source: job.source,
        model: model_name(job.model),
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
fn offload_of_devices(
    job: &SweepJob<'_>,
    jobs: &[QuantizeJob<'_>],
    along: &[Along],
) -> Result<Vec<Offload>> {
    let block = BlockSizes::of(job.source.config());
    let of_device = |((number, device), &along)| {
        let own = jobs.iter().skip(number).step_by(job.devices.len());
        let works: Vec<_> = own.map(QuantizeJob::workload).collect();
        offload_beside(device, block, &works, along)
    };
    job.devices.iter().enumerate().zip(along).map(of_device).collect()
}

/// Makes a branch and lists its files, so that a run that is killed while it is measured only has to
/// measure it again.
fn make_one(
    job: &QuantizeJob<'_>,
    made_from: &MadeFrom,
    digest: &Digest,
    progress: &dyn Progress,
) -> Result<MadeBranch> {
    let start = Instant::now();
    let Some(Made { sealed, report, .. }) = make(job, progress)? else {
        // What several ranks make is the first one's; here there is one, and it is the first.
        let source = std::io::Error::other("the run ended without a checkpoint");
        return Err(gptq_records::Error::io("make", &job.out)(source).into());
    };
    let mut folder = sealed.folder;
    let made_from = digest.complete(made_from)?;
    let manifest = Manifest::list(&folder, &sealed.files, &made_from, &report)?;
    folder.keep_on_drop();
    Ok(MadeBranch { folder, manifest, report, seconds: start.elapsed().as_secs_f64() })
}

/// One drawing of the progress of several branches.
pub(super) struct Shared<'a> {
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
    pub(super) fn new(inner: &'a dyn Progress, branches: usize) -> Self {
        Self { inner, branches, steps: Mutex::default() }
    }

    fn of(&'a self, branch: &'a str) -> OfBranch<'a> {
        OfBranch { all: self, branch }
    }

    pub(super) fn end(&self) {
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
            match branches {
                1 => inner.begin(phase, steps),
                _ => inner.begin(&format!("{phase} {branches} branches"), steps * branches),
            }
        }
        begun.insert(self.branch.to_owned(), steps);
    }

    /// Steps of one branch are none of the drawing, which counts blocks of all.
    fn begin_steps(&self, _phase: &str, _steps: usize) {}

    fn step(&self) {}

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
