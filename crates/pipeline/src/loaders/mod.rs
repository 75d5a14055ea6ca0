//! Which programs load a GPTQ checkpoint, and why the others do not.
//!
//! What a loader requires is data: [`LOADERS`] lists for each the needs that its code was seen to
//! check or to rely on, and remarks on how it then runs. A [`Need`] knows how to look at the
//! [`LoaderFacts`] of a checkpoint and the phrase that says why it is not met.

mod needs;

use gptq_checkpoint::{LinearShape, ModelConfig, QuantizeConfig, Rope};
use serde::Serialize;

use needs::Need;
pub(crate) use needs::listed;

/// What loaders look at in a checkpoint.
#[derive(Clone, Debug)]
pub struct LoaderFacts {
    /// The model's own parts.
    pub architecture: Architecture,
    /// Bits, groups and conventions, as the tensors have them.
    pub quantize: QuantizeConfig,
    /// Columns lie in another order than their groups in some linear.
    pub act_order: bool,
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

/// Whether a loader takes a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoaderVerdict {
    /// Program, version or kernel.
    pub loader: &'static str,
    /// It loads the checkpoint and computes what it means.
    pub loads: bool,
    /// Why not; or what to know when it does.
    pub reasons: Vec<String>,
}

/// Every loader's verdict, in the table's order.
#[must_use]
pub fn verdicts(facts: &LoaderFacts) -> Vec<LoaderVerdict> {
    LOADERS.iter().map(|loader| loader.verdict(facts)).collect()
}

/// A program that loads GPTQ checkpoints.
struct Loader {
    name: &'static str,
    needs: &'static [Need],
    remarks: &'static [(When, &'static str)],
}

impl Loader {
    fn verdict(&self, facts: &LoaderFacts) -> LoaderVerdict {
        let unmet: Vec<String> = self.needs.iter().filter_map(|need| need.unmet(facts)).collect();
        let loads = unmet.is_empty();
        let remarks = self.remarks.iter().filter(|(when, _)| when.holds(facts));
        let reasons =
            if loads { remarks.map(|&(_, remark)| remark.to_owned()).collect() } else { unmet };
        LoaderVerdict { loader: self.name, loads, reasons }
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
    /// The Marlin kernel takes the shapes, the groups and the grid.
    Marlin,
    /// It does not, and the width is one of these.
    NoMarlin(&'static [u8]),
}

impl When {
    fn holds(&self, facts: &LoaderFacts) -> bool {
        let bits = facts.quantize.bits.get();
        let marlin = || {
            let needs = [Need::Bits(&[4]), Need::Symmetric].into_iter().chain(MARLIN_SHAPES);
            needs.into_iter().all(|need| need.unmet(facts).is_none())
        };
        match self {
            Self::Always => true,
            Self::Bits(widths) => widths.contains(&bits),
            Self::ActOrder(width) => facts.act_order && bits == *width,
            Self::Unfused => facts.architecture.grouped_heads || (facts.act_order && bits == 4),
            Self::Marlin => marlin(),
            Self::NoMarlin(widths) => widths.contains(&bits) && !marlin(),
        }
    }
}

const MARLIN_SHAPES: [Need; 4] =
    [Need::Groups(&[32, 64, 128]), Need::OutMultiple(64), Need::InMultiple(128), Need::WholeGroups];

/// Keys that AutoGPTQ 0.4 hands to its configuration's constructor.
const AUTOGPTQ_KEYS: [&str; 9] = [
    "bits",
    "group_size",
    "damp_percent",
    "desc_act",
    "static_groups",
    "sym",
    "true_sequential",
    "model_name_or_path",
    "model_file_base_name",
];

const ALL_BITS: &[u8] = &[2, 3, 4, 8];

/// The loaders, oldest conventions first.
static LOADERS: [Loader; 10] = [
    Loader {
        name: "AutoGPTQ 0.4",
        needs: &[
            Need::QuantizeConfig,
            Need::KnownKeys(&AUTOGPTQ_KEYS),
            Need::OneFile,
            Need::Bits(ALL_BITS),
            Need::MinusOneZeros,
            // Its 4-bit kernel asserts it, and its others round the number of groups down.
            Need::WholeGroups,
            // Those it lists; and the scalings of the transformers that it was made for, 4.31.
            Need::Family(&["llama"]),
            Need::RopeScaling(&["linear", "dynamic"]),
        ],
        remarks: &[
            (When::Always, "use_safetensors=True"),
            (When::Unfused, "inject_fused_attention=False"),
            (When::ActOrder(4), "prompts beyond 2048 tokens need exllama_set_max_input_length"),
        ],
    },
    Loader {
        name: "AutoGPTQ 0.7",
        needs: &[
            Need::AnyConfig,
            Need::Bits(ALL_BITS),
            Need::MinusOneZeros,
            Need::WholeGroups,
            Need::Family(&["llama", "mistral", "qwen2"]),
        ],
        remarks: &[(When::Bits(&[4]), "ExLlamaV2 kernel"), (When::Bits(&[2, 3, 8]), "CUDA kernel")],
    },
    Loader {
        name: "transformers",
        needs: &[
            Need::QuantizationConfig,
            Need::ModelFile,
            Need::PtMetadata,
            Need::Bits(ALL_BITS),
            Need::ZeroBias,
        ],
        remarks: &[
            (When::Always, "with optimum and gptqmodel"),
            (When::Bits(&[3]), "Torch kernel only: slow"),
        ],
    },
    Loader {
        name: "GPTQModel",
        needs: &[Need::AnyConfig, Need::Bits(ALL_BITS), Need::ZeroBias],
        remarks: &[(When::Bits(&[3]), "Torch kernel only: slow")],
    },
    Loader {
        name: "ExLlama",
        needs: &[
            Need::Bits(&[4]),
            Need::MinusOneZeros,
            Need::WholeGroups,
            Need::OutMultiple(8),
            Need::ZeroBias,
            // It skips every `_proj.bias`, and takes nothing but rope_theta from the rotary settings.
            Need::Family(&["llama"]),
            Need::NoBiases,
            Need::RopeScaling(&[]),
        ],
        remarks: &[],
    },
    Loader {
        name: "ExLlamaV2",
        needs: &[
            Need::Bits(&[4]),
            Need::PowerOfTwoGroups,
            Need::ShortOrder,
            Need::ZeroBias,
            Need::RopeScaling(&["linear", "llama3"]),
        ],
        remarks: &[],
    },
    Loader {
        name: "vLLM gptq_marlin",
        needs: &[
            Need::AnyConfig,
            Need::Bits(&[4, 8]),
            Need::Symmetric,
            Need::Groups(&[32, 64, 128]),
            Need::OutMultiple(64),
            Need::InMultiple(128),
            Need::WholeGroups,
            Need::SharedOrder,
            Need::ZeroBias,
        ],
        remarks: &[],
    },
    Loader {
        name: "vLLM gptq",
        needs: &[
            Need::AnyConfig,
            Need::Bits(ALL_BITS),
            Need::WholeGroups,
            Need::OutMultiple(32),
            Need::SharedOrder,
            Need::MinusOneZeros,
            Need::ZeroBias,
        ],
        remarks: &[
            (When::Bits(&[4]), "warns that its 4-bit kernel is buggy: use gptq_marlin"),
            (When::Always, "fp16 only"),
        ],
    },
    Loader {
        name: "TGI",
        needs: &[
            Need::AnyConfig,
            Need::Bits(&[2, 4, 8]),
            Need::WholeGroups,
            Need::SharedOrder,
            Need::MinusOneZeros,
            Need::ZeroBias,
            // Others run in transformers there, without its GPTQ kernels.
            Need::Family(&["llama", "mistral", "qwen2"]),
        ],
        remarks: &[
            (When::Marlin, "Marlin kernel"),
            (When::NoMarlin(&[2, 4, 8]), "ExLlama or Triton kernel"),
        ],
    },
    Loader {
        name: "GPTQ-for-LLaMa",
        needs: &[
            Need::NoExtraTensors,
            Need::OneFile,
            Need::Bits(&[2, 4, 8]),
            Need::WholeGroups,
            Need::MinusOneZeros,
            // Its attention fuses q, k and v under the first's index, as three equal parts, and turns
            // them by frequencies of its own.
            Need::SharedOrder,
            Need::Family(&["llama"]),
            Need::NoBiases,
            Need::UngroupedHeads,
            Need::RopeScaling(&[]),
            Need::RopeTheta(10_000),
        ],
        remarks: &[(When::Always, "triton branch; bits and group size on its command line")],
    },
];

#[cfg(test)]
mod tests;
