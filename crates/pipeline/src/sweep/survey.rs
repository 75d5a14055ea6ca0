//! What there is of a sweep's branches, looked at before anything is done.

use gptq_records::manifest::MadeFrom;
use gptq_text::evaluation::{EvalText, evaluation_text};
use rayon::prelude::*;

use super::resume::{State, look};
use super::source_digest::{check_unread, known_digest};
use super::sweep_job::SweepJob;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::recording::refuse_fallbacks;

/// What a sweep would do, before anything is done.
#[derive(Clone, Debug)]
pub struct Survey {
    pub(super) text: Option<EvalText>,
    pub(super) measured_on: Option<String>,
    /// Digest of the source, unless it has to be read first.
    pub(super) source: Option<String>,
    pub(super) branches: Vec<Surveyed>,
}

#[derive(Clone, Debug)]
pub(super) struct Surveyed {
    pub(super) made_from: MadeFrom,
    pub(super) state: State,
}

impl Surveyed {
    pub(super) fn is_to_be_made(&self) -> bool {
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
        let source = known_digest(job)?;
        let text = match &job.config.evaluation {
            Some(spec) => Some(evaluation_text(job.source, spec, Some(&job.calibration.dataset))?),
            None => None,
        };
        let measured_on = text.as_ref().map(describe);
        progress.note("checking what there is");
        let branches = job.branches.par_iter().map(|branch| {
            let made_from = job.made_from(branch, source.as_deref());
            if source.is_none() {
                check_unread(&job.dir(branch))?;
            }
            let state = look(&job.dir(branch), &made_from, measured_on.as_deref())?;
            Ok(Surveyed { made_from, state })
        });
        let survey = Self { branches: branches.collect::<Result<_>>()?, measured_on, source, text };
        check(job, &survey)?;
        Ok(survey)
    }

    /// What is reused must pass what is made now.
    pub(super) fn forbid_fallbacks(&self) -> Result<()> {
        let reports = self.branches.iter().filter_map(|b| b.state.report());
        for report in reports {
            let linears: Vec<_> = report.linears().collect();
            refuse_fallbacks(linears.iter().copied(), report.damp)?;
        }
        Ok(())
    }

    /// The state of every branch, in the job's order.
    pub fn states(&self) -> impl Iterator<Item = &State> {
        self.branches.iter().map(|b| &b.state)
    }
}

/// Refuses what would need a second reading, or be replaced although it may be finished.
fn check(job: &SweepJob<'_>, survey: &Survey) -> Result<()> {
    if !job.source.is_arriving() {
        return Ok(());
    }
    let branches = survey.branches.iter().filter(|b| b.is_to_be_made()).count();
    let made = job.at_once();
    if branches > made {
        let together = branches.div_ceil(job.devices.len().max(1));
        return Err(Error::Together { branches, made, together });
    }
    Ok(())
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
