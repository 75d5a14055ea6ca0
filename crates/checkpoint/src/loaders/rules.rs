//! What a rule, a loader and its verdict are.

use serde::Serialize;

use super::facts::LoaderFacts;
use super::needs::{MARLIN_SHAPES, Need};

/// How a rule was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Seen {
    /// The program was run on such a file.
    #[serde(rename = "ran")]
    Ran,
    /// Its code was read.
    #[serde(rename = "read in code")]
    Code,
    /// Neither: whether it would is not known.
    #[serde(rename = "not tried")]
    Untried,
}

/// Whether a loader takes a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoaderVerdict {
    /// Program, version or kernel.
    pub loader: &'static str,
    /// It loads the checkpoint and computes what it means.
    pub loads: bool,
    /// Why not; or what to know when it does.
    pub reasons: Vec<String>,
    /// The release that the verdict was learnt from.
    pub release: &'static str,
    /// How it was.
    pub seen: Seen,
}

/// A program that loads GPTQ checkpoints.
pub(super) struct Loader {
    pub(super) name: &'static str,
    /// The release whose code was read or that was run.
    pub(super) release: &'static str,
    /// Whether it was run on files that it takes.
    pub(super) seen: Seen,
    pub(super) rules: &'static [Rule],
    pub(super) remarks: &'static [(When, &'static str)],
}

/// What a loader requires, and how that was learnt.
pub(super) struct Rule {
    pub(super) need: Need,
    pub(super) seen: Seen,
}

/// A rule whose refusal, or wrong result, was seen when the program ran.
pub(super) const fn ran(need: Need) -> Rule {
    Rule { need, seen: Seen::Ran }
}

/// A rule that was read in the program's code.
pub(super) const fn code(need: Need) -> Rule {
    Rule { need, seen: Seen::Code }
}

/// A rule that keeps verdicts to what is known.
pub(super) const fn untried(need: Need) -> Rule {
    Rule { need, seen: Seen::Untried }
}

impl Loader {
    pub(super) fn verdict(&self, facts: &LoaderFacts) -> LoaderVerdict {
        let (loader, release) = (self.name, self.release);
        let unmet = || self.rules.iter().filter_map(|r| Some((r.need.unmet(facts)?, r.seen)));
        if unmet().next().is_some() {
            let known = [Seen::Ran, Seen::Code];
            let seen = known.into_iter().find(|known| unmet().any(|(_, seen)| seen == *known));
            let seen = seen.unwrap_or(Seen::Untried);
            let reasons = unmet().map(|(reason, _)| reason).collect();
            return LoaderVerdict { loader, loads: false, reasons, release, seen };
        }
        let remarks = self.remarks.iter().filter(|(when, _)| when.holds(facts));
        let remarks = remarks.map(|&(_, remark)| remark.to_owned());
        let unknown = facts.other_types.iter().map(|of| format!("not checked with {of}"));
        let reasons = remarks.chain(unknown).collect();
        LoaderVerdict { loader, loads: true, reasons, release, seen: self.seen }
    }
}

/// Checkpoints that a remark is about.
pub(super) enum When {
    Always,
    Bits(&'static [u8]),
    /// Columns out of order, with this width.
    ActOrder(u8),
    /// Fused attention would split q, k and v wrongly, or refuse the order of columns.
    Unfused,
    /// TGI's Marlin kernel takes the shapes, the groups and the grid.
    Marlin,
    /// It does not, and the width is one of these.
    NoMarlin(&'static [u8]),
    /// config.json asks for bfloat16.
    Bfloat16,
    /// The same, and Marlin does not take the shapes, so that a kernel of fp16 is left.
    Bfloat16WithoutMarlin,
}

impl When {
    fn holds(&self, facts: &LoaderFacts) -> bool {
        let bits = facts.quantize.bits.get();
        let marlin = |widths| {
            let needs = [Need::Bits(widths), Need::Symmetric].into_iter().chain(MARLIN_SHAPES);
            needs.into_iter().all(|need| need.unmet(facts).is_none())
        };
        match self {
            Self::Always => true,
            Self::Bits(widths) => widths.contains(&bits),
            Self::ActOrder(width) => facts.act_order && bits == *width,
            Self::Unfused => facts.architecture.grouped_heads || (facts.act_order && bits == 4),
            Self::Marlin => marlin(&[4]),
            Self::NoMarlin(widths) => widths.contains(&bits) && !marlin(&[4]),
            Self::Bfloat16 => facts.bfloat16,
            Self::Bfloat16WithoutMarlin => facts.bfloat16 && !marlin(&[4, 8]),
        }
    }
}
