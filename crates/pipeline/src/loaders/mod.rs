//! Which programs load a GPTQ checkpoint, and why the others do not.
//!
//! What a loader requires is data: [`table::LOADERS`] lists for each its rules, and remarks on how
//! it then runs. A rule is a [`Need`], which knows how to look at the [`LoaderFacts`] of a checkpoint
//! and the phrase that says why it is not met, and how it was learnt: by running the program on such
//! a file, or by reading its code. A verdict says which.

mod needs;
mod table;

use gptq_checkpoint::{CheckpointFormat, LinearShape, ModelConfig, QuantizeConfig, Rope};
use serde::Serialize;

use needs::Need;
pub(crate) use needs::listed;
use table::{LOADERS, MARLIN_SHAPES};

/// What loaders look at in a checkpoint.
#[derive(Clone, Debug)]
pub struct LoaderFacts {
    /// The model's own parts.
    pub architecture: Architecture,
    /// Bits, groups and conventions, as the tensors have them.
    pub quantize: QuantizeConfig,
    /// Columns lie in another order than their groups in some linear.
    pub act_order: bool,
    /// How zeros are stored, which may be another way than the settings say.
    pub zeros: CheckpointFormat,
    /// Some zero is 0, which is stored as all ones where zeros are stored minus one.
    pub zeros_of_zero: bool,
    /// GPTQModel 0.9 or later made the file, by the stamp in its settings.
    pub gptqmodel_stamp: bool,
    /// The group indices that the file holds.
    pub group_index: GroupIndex,
    /// A linear of the first block that is not quantised.
    pub dense_linear: Option<&'static str>,
    /// The head is the embedding, and the file does not hold it under its own name.
    pub head_only_tied: bool,
    /// config.json asks for bfloat16.
    pub bfloat16: bool,
    /// q, k and v, and gate and up, have one group index each.
    pub shared_order: bool,
    /// Biases of quantised linears that the architecture does not have.
    pub bias: Bias,
    /// Rotary frequencies are stored.
    pub frequencies: bool,
    /// Name of the weight file without `.safetensors`.
    pub file_stem: String,
    /// The weights are in several files with an index.
    pub sharded: bool,
    /// Every weight file has `format = pt` in its metadata.
    pub pt_metadata: bool,
    /// Keys of quantize_config.json, where there is one.
    pub quantize_config: Option<Vec<String>>,
    /// config.json says how the checkpoint is quantised.
    pub quantization_config: bool,
}

/// What loaders look at, or overlook, in the model behind a checkpoint.
#[derive(Clone, Debug)]
pub struct Architecture {
    /// `model_type`.
    pub family: &'static str,
    /// The linears of a block, with whether they have a bias.
    pub linears: Vec<LinearShape>,
    /// Fewer key and value heads than query heads.
    pub grouped_heads: bool,
    /// Rotary position embeddings.
    pub rope: Rope,
}

impl From<&ModelConfig> for Architecture {
    fn from(config: &ModelConfig) -> Self {
        Self {
            family: config.family,
            linears: config.block_linears().to_vec(),
            grouped_heads: config.num_key_value_heads != config.num_attention_heads,
            rope: config.rope,
        }
    }
}

/// The group indices of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupIndex {
    /// Every linear has one.
    Stored,
    /// Some linear has none.
    Absent,
    /// Some linear has one of zeros although there are groups.
    Placeholder,
}

/// Whether config.json asks for bfloat16, under either name of the key.
pub(crate) fn asks_for_bfloat16(config: &ModelConfig) -> bool {
    ["dtype", "torch_dtype"]
        .iter()
        .any(|key| config.raw().get(*key).is_some_and(|value| value == "bfloat16"))
}

/// Biases that AutoGPTQ adds to the quantised linears of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None.
    Absent,
    /// As AutoGPTQ writes them: there, and all zero.
    Zero,
    /// Some value is not zero.
    Values,
}

/// How a rule was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Seen {
    /// The program was run on such a file.
    #[serde(rename = "ran")]
    Ran,
    /// Its code was read.
    #[serde(rename = "read in code")]
    Code,
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

/// Every loader's verdict, in the table's order.
#[must_use]
pub fn verdicts(facts: &LoaderFacts) -> Vec<LoaderVerdict> {
    LOADERS.iter().map(|loader| loader.verdict(facts)).collect()
}

/// A program that loads GPTQ checkpoints.
struct Loader {
    name: &'static str,
    /// The release whose code was read or that was run.
    release: &'static str,
    /// Whether it was run on files that it takes.
    seen: Seen,
    rules: &'static [Rule],
    remarks: &'static [(When, &'static str)],
}

/// What a loader requires, and how that was learnt.
struct Rule {
    need: Need,
    seen: Seen,
}

/// A rule whose refusal, or wrong result, was seen when the program ran.
const fn ran(need: Need) -> Rule {
    Rule { need, seen: Seen::Ran }
}

/// A rule that was read in the program's code.
const fn code(need: Need) -> Rule {
    Rule { need, seen: Seen::Code }
}

impl Loader {
    fn verdict(&self, facts: &LoaderFacts) -> LoaderVerdict {
        let (loader, release) = (self.name, self.release);
        let unmet = || self.rules.iter().filter_map(|r| Some((r.need.unmet(facts)?, r.seen)));
        if unmet().next().is_some() {
            let seen =
                if unmet().any(|(_, seen)| seen == Seen::Ran) { Seen::Ran } else { Seen::Code };
            let reasons = unmet().map(|(reason, _)| reason).collect();
            return LoaderVerdict { loader, loads: false, reasons, release, seen };
        }
        let remarks = self.remarks.iter().filter(|(when, _)| when.holds(facts));
        let reasons = remarks.map(|&(_, remark)| remark.to_owned()).collect();
        LoaderVerdict { loader, loads: true, reasons, release, seen: self.seen }
    }
}

/// Checkpoints that a remark is about.
enum When {
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

#[cfg(test)]
mod tests;
