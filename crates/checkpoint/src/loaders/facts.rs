//! What loaders look at in a checkpoint and the model behind it.

use serde_json::{Map, Value};

use crate::LinearShape;
use crate::checkpoint_format::CheckpointFormat;
use crate::config::ModelConfig;
use crate::quantize_config::QuantizeConfig;
use crate::rope::Rope;

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
    /// A linear of the first block that is not quantized.
    pub dense_linear: Option<String>,
    /// The head is the embedding, and the file does not hold it under its own name.
    pub head_only_tied: bool,
    /// config.json asks for bfloat16.
    pub bfloat16: bool,
    /// q, k and v, and gate and up, have one group index each.
    pub shared_order: bool,
    /// Biases of quantized linears that the architecture does not have.
    pub bias: Bias,
    /// Kinds of tensors of quantised linears that are stored in another type than loaders are known to
    /// read, each with its type: `scales stored as F32`.
    pub other_types: Vec<String>,
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
    /// config.json says how the checkpoint is quantized.
    pub quantization_config: bool,
}

/// What loaders look at, or overlook, in the model behind a checkpoint.
#[derive(Clone, Debug)]
pub struct Architecture {
    /// `model_type` of the language model.
    pub family: &'static str,
    /// `model_type` of the whole, where there is more.
    pub wrapper: Option<&'static str>,
    /// What names of its tensors begin with where that is not where transformers 5 has them in memory, and
    /// where that is.
    pub other_names: Option<(&'static str, &'static str)>,
    /// The linears of a block of each kind, with whether they have a bias.
    pub linears: Vec<LinearShape>,
    /// Which blocks have experts.
    pub experts: InBlocks,
    /// Fewer key and value heads than query heads.
    pub grouped_heads: bool,
    /// Rotary position embeddings.
    pub rope: Rope,
}

impl From<&ModelConfig> for Architecture {
    fn from(config: &ModelConfig) -> Self {
        let blocks = 0..config.num_hidden_layers;
        let mixed = |block: usize| config.experts(block).is_some();
        let other = blocks.clone().find(|&block| mixed(block) != mixed(0));
        let linears = [0].into_iter().chain(other).flat_map(|block| config.block_linears(block));
        Self {
            family: config.family,
            wrapper: config.wrapper(),
            other_names: config.other_names(),
            linears: linears.collect(),
            experts: match (other, mixed(0)) {
                (Some(_), _) => InBlocks::Some,
                (None, true) => InBlocks::All,
                (None, false) => InBlocks::None,
            },
            grouped_heads: config.num_key_value_heads != config.num_attention_heads,
            rope: config.rope.clone(),
        }
    }
}

/// In how many blocks something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InBlocks {
    /// In none.
    None,
    /// In some, but not in all.
    Some,
    /// In all.
    All,
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
#[must_use]
pub fn asks_for_bfloat16(config: &ModelConfig) -> bool {
    let asks = |keys: &Map<String, Value>| {
        ["dtype", "torch_dtype"].iter().any(|key| keys.get(*key).is_some_and(|v| v == "bfloat16"))
    };
    config.settings().any(asks)
}

/// Biases that AutoGPTQ adds to the quantized linears of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None.
    Absent,
    /// As AutoGPTQ writes them: there, and all zero.
    Zero,
    /// Some value is not zero.
    Values,
}
