//! A sweep on its way: groups of branches made, each then measured, and what an earlier run left.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use gptq_checkpoint::{MANIFEST_FILE, Partial, REPORT_FILE, finish_rename};
use gptq_quant::QuantSpec;
use gptq_records::branch_report::{BranchReport, EvaluationRecord, TOOL};
use gptq_records::digest::sha256;
use gptq_records::manifest::{MadeFrom, Manifest};
use gptq_text::evaluation::EvalText;

use super::config::Branch;
use super::dense_along::Evaluation;
use super::dense_measure::{DenseMeasure, grid, rounded_of};
use super::group::{MadeBranch, Member, make_together};
use super::log::{Seconds, SweepLog, SweepReport, SweepRow};
use super::one_source::read_once;
use super::predict;
use super::resume::{Left, State, unlink_moved};
use super::source_digest::Digest;
use super::survey::{Survey, Surveyed};
use super::sweep_job::SweepJob;
use crate::error::{Error, Result, with_causes, with_hints};
use crate::first_gram::FirstGrams;
use crate::progress::Progress;
use crate::rates::Prediction;

/// A sweep on its way.
pub(super) struct Run<'a> {
    job: &'a SweepJob<'a>,
    progress: &'a dyn Progress,
    measured_on: Option<String>,
    /// Not needed where every branch is finished.
    baseline: Option<DenseMeasure<'a>>,
    /// The text, while the baseline is to be measured along with branches.
    to_come: Option<EvalText>,
    digest: Digest,
    /// Of each device.
    shared: Vec<FirstGrams>,
    /// The table of an earlier run, for its timings.
    earlier: Vec<SweepRow>,
    report: SweepReport,
    /// Names of the branches that could not be made or measured.
    failed: Vec<String>,
    /// Whether one of them failed by a fault of this program.
    internal: bool,
}

/// A branch and what there is of it.
type Waiting<'a> = (&'a Branch, Surveyed);

impl<'a> Run<'a> {
    /// Measures the dense model, before anything long is begun, unless an earlier run has and nothing
    /// is to be compared with it.
    pub(super) fn start(
        job: &'a SweepJob<'a>,
        survey: &Survey,
        earlier: Option<SweepReport>,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let Survey { text, measured_on, source, branches } = survey;
        let dtype = job.config.source_dtype;
        let baseline_key = baseline_key(job, source.as_deref(), measured_on.as_deref());
        let known = earlier.as_ref().filter(|e| source.is_some() && e.baseline_key == baseline_key);
        let mut report = SweepReport {
            model: job.model.to_owned(),
            source_dtype: dtype,
            baseline: known.and_then(|e| e.baseline),
            baseline_key,
            evaluation: text.clone(),
            rows: Vec::with_capacity(branches.len()),
        };
        report.judge_text();
        let finished = branches.iter().all(|b| matches!(b.state, State::Finished(_)));
        let idle = branches.is_empty() || (finished && report.baseline.is_some());
        let (mut baseline, mut to_come) = (None, text.clone().filter(|_| !idle));
        if !job.source.is_arriving()
            && let Some(text) = to_come.take()
        {
            let mut made = DenseMeasure::measure((job.source, dtype), text, job.devices, progress)?;
            for surveyed in branches {
                if let State::Finished(report) = &surveyed.state {
                    rounded_of(report, &mut made.rounded);
                }
            }
            report.baseline = Some(made.perplexity);
            baseline = Some(made);
        }
        Ok(Self {
            job,
            progress,
            measured_on: measured_on.clone(),
            baseline,
            to_come,
            digest: Digest::new(source.clone()),
            shared: job.devices.iter().map(|_| FirstGrams::default()).collect(),
            earlier: earlier.map_or_else(Vec::new, |e| e.rows),
            report,
            failed: Vec::new(),
            internal: false,
        })
    }

    /// Finishes all branches: those that are to be made in groups, each group before what comes after
    /// it. A branch that fails takes no other down.
    pub(super) fn all(
        mut self,
        surveyed: Vec<Surveyed>,
        log: &SweepLog<'_>,
    ) -> Result<SweepReport> {
        let mut waiting: VecDeque<Waiting<'a>> = self.job.branches.iter().zip(surveyed).collect();
        if self.job.source.is_arriving() {
            self.read_once(&mut waiting, log)?;
        }
        while let Some(next) = waiting.pop_front() {
            if !next.1.is_to_be_made() {
                let (branch, surveyed) = next;
                let key = self.key(&surveyed.made_from);
                let done = self.reuse(branch, surveyed, &key);
                self.finish(branch, key, done, log)?;
                continue;
            }
            let group = self.group(next, &mut waiting);
            let group = self.with_places(group, log)?;
            let branches: Vec<_> = group.iter().map(|(branch, _)| *branch).collect();
            // What is wrong with a branch shows when it is made, and takes no other down.
            let predicted = predict::group(self.job, &branches).ok().flatten();
            let (job, shared) = (self.job, &self.shared);
            let made = make_together(job, &members(&group), shared, &self.digest, self.progress)?;
            self.measure_all(&group, made, predicted, log)?;
        }
        if self.failed.is_empty() {
            return Ok(self.report);
        }
        let (failed, of) = (std::mem::take(&mut self.failed), self.job.branches.len());
        let (names, internal) = (failed.join(", "), self.internal);
        Err(Error::Branches { failed: failed.len(), of, names, internal })
    }

    /// Makes all branches that are to be made, and measures the dense model where something is to be
    /// compared with it, from one reading of the source.
    fn read_once(&mut self, waiting: &mut VecDeque<Waiting<'a>>, log: &SweepLog<'_>) -> Result<()> {
        let (group, others): (Vec<_>, Vec<_>) =
            waiting.drain(..).partition(|(_, surveyed)| surveyed.is_to_be_made());
        *waiting = others.into();
        let evaluation = self.to_come.take();
        if group.is_empty() && evaluation.is_none() {
            return Ok(());
        }
        let mut finished = BTreeMap::new();
        let mut grids: BTreeMap<_, QuantSpec> = BTreeMap::new();
        for (branch, surveyed) in group.iter().chain(waiting.iter()) {
            match &surveyed.state {
                State::Finished(report) => rounded_of(report, &mut finished),
                _ => drop(grids.entry(grid(&branch.spec)).or_insert_with(|| branch.spec.clone())),
            }
        }
        grids.retain(|grid, _| !finished.contains_key(grid));
        let grids = grids.into_values().collect();
        let evaluation = evaluation.map(|text| Evaluation { text, grids });
        let group = self.with_places(group, log)?;
        let (job, shared) = (self.job, &self.shared);
        let members = members(&group);
        let read = read_once(job, &members, shared, evaluation, &self.digest, self.progress)?;
        if let Some(mut dense) = read.dense {
            dense.rounded.extend(finished);
            self.report.baseline = Some(dense.perplexity);
            self.baseline = Some(dense);
        }
        let source = self.digest.wait()?;
        self.report.baseline_key = baseline_key(job, Some(source), self.measured_on.as_deref());
        // A walk that downloads takes as long as the line lets it.
        self.measure_all(&group, read.made, None, log)
    }

    /// The branches that there is a place for; of the others it is said why not.
    fn with_places(
        &mut self,
        group: Vec<Waiting<'a>>,
        log: &SweepLog<'_>,
    ) -> Result<Vec<Waiting<'a>>> {
        let mut placed = Vec::with_capacity(group.len());
        for (branch, surveyed) in group {
            match self.clear_place(branch) {
                Ok(()) => placed.push((branch, surveyed)),
                Err(error) => self.finish(branch, String::new(), Err(error), log)?,
            }
        }
        Ok(placed)
    }

    /// Measures and finishes the branches of a group.
    fn measure_all(
        &mut self,
        group: &[Waiting<'a>],
        made: Vec<Result<MadeBranch>>,
        predicted: Option<Prediction>,
        log: &SweepLog<'_>,
    ) -> Result<()> {
        for ((branch, surveyed), made) in group.iter().zip(made) {
            let key = self.key(&self.digest.complete(&surveyed.made_from)?);
            let done = made.and_then(|made| self.measure_made(branch, made, predicted));
            self.finish(branch, key, done, log)?;
        }
        Ok(())
    }

    /// A branch and those after it that are made beside it: as many as the devices take.
    fn group(&self, first: Waiting<'a>, waiting: &mut VecDeque<Waiting<'a>>) -> Vec<Waiting<'a>> {
        let most = self.job.at_once();
        let mut group = vec![first];
        let mut later = VecDeque::new();
        for next in waiting.drain(..) {
            match next.1.is_to_be_made() && group.len() < most {
                true => group.push(next),
                false => later.push_back(next),
            }
        }
        *waiting = later;
        group
    }

    /// Puts a finished branch into the table, or its failure into the list.
    fn finish(
        &mut self,
        branch: &Branch,
        key: String,
        done: Result<(BranchReport, Seconds)>,
        log: &SweepLog<'_>,
    ) -> Result<()> {
        match done {
            Ok((report, seconds)) => {
                let row = SweepRow::new(&report, self.job.dir(branch), key, seconds);
                self.report.rows.push(row);
                let position = |name: &str| self.job.branches.iter().position(|b| b.name == name);
                self.report.rows.sort_by_key(|row| position(&row.branch));
                self.report.judge_text();
                log.update(&self.report)
            }
            // A sweep of one branch needs no list.
            Err(error) if self.job.branches.len() == 1 => Err(error),
            Err(error) => {
                let warning = format!("{} failed: {}", branch.name, with_causes(&error));
                self.progress.warn(&with_hints(warning, &error));
                self.failed.push(branch.name.clone());
                self.internal |= error.is_internal();
                Ok(())
            }
        }
    }

    /// Digest of what a branch is made from and measured on.
    fn key(&self, made_from: &MadeFrom) -> String {
        let lines: Vec<&str> =
            made_from.values().chain(&self.measured_on).map(String::as_str).collect();
        sha256(lines.join("\n").as_bytes())
    }

    /// Makes room for a branch that is made anew.
    fn clear_place(&self, branch: &Branch) -> Result<()> {
        let (name, dir) = (&branch.name, self.job.dir(branch));
        if unlink_moved(&dir)? {
            self.progress
                .note(&format!("{name}: was a link, which is removed; what it led to stays"));
        }
        if dir.join(MANIFEST_FILE).exists() {
            // Withdrawn, it is a left-over that the writer replaces.
            drop(Partial::reopen(&dir)?);
        }
        Ok(())
    }

    /// Measures a branch that was just made. What fails leaves it to be measured by the next run.
    fn measure_made(
        &mut self,
        branch: &Branch,
        made: MadeBranch,
        predicted: Option<Prediction>,
    ) -> Result<(BranchReport, Seconds)> {
        let MadeBranch { folder, manifest, report, seconds } = made;
        let known = Seconds { quantize: Some(seconds), measure: None, predicted };
        self.measure(branch, folder, Left { manifest, report }, known)
    }

    /// Takes what an earlier run left, which is measured if it is not yet.
    fn reuse(
        &mut self,
        branch: &Branch,
        surveyed: Surveyed,
        key: &str,
    ) -> Result<(BranchReport, Seconds)> {
        let dir = self.job.dir(branch);
        let known =
            self.earlier.iter().find(|row| row.key == key).map_or_else(Seconds::default, |row| {
                let (quantize, measure) = (row.quantize_seconds, row.measure_seconds);
                Seconds { quantize, measure, predicted: row.predicted() }
            });
        match surveyed.state {
            State::Finished(report) => {
                finish_rename(&dir)?;
                Ok((*report, known))
            }
            State::Made(left) => {
                // Nobody else may touch it: this process holds the branch's lock.
                let folder = Partial::resume(&dir)?.ok_or(Error::ForeignBranch(dir))?;
                self.measure(branch, folder, *left, known)
            }
            State::Remeasure(left) => self.measure(branch, Partial::reopen(&dir)?, *left, known),
            // These are made, not reused.
            State::New | State::Stale(_) => Err(Error::ForeignBranch(dir)),
        }
    }

    /// Measures the checkpoint in a folder, if the configuration asks for it, and names it.
    fn measure(
        &mut self,
        branch: &Branch,
        folder: Partial,
        left: Left,
        known: Seconds,
    ) -> Result<(BranchReport, Seconds)> {
        let start = Instant::now();
        let progress = self.progress;
        let baseline = self.baseline.as_mut();
        let record =
            baseline.map(|b| b.record(&branch.spec, folder.path(), progress)).transpose()?;
        let Left { manifest, report } = left;
        let report = publish(folder, manifest, report, record, self.measured_on.as_deref())?;
        Ok((report, Seconds { measure: Some(start.elapsed().as_secs_f64()), ..known }))
    }
}

/// The branches of a group, as they are made.
fn members<'g>(group: &'g [Waiting<'_>]) -> Vec<Member<'g>> {
    group.iter().map(|(branch, surveyed)| (*branch, &surveyed.made_from)).collect()
}

/// Digest of what the dense model is measured on and with.
fn baseline_key(
    job: &SweepJob<'_>,
    source: Option<&str>,
    measured_on: Option<&str>,
) -> Option<String> {
    let dtype = job.config.source_dtype.name();
    let of = format!("{TOOL}\n{}\n{dtype}\n{}\n{}", source?, measured_on?, job.device().kind());
    Some(sha256(of.as_bytes()))
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
