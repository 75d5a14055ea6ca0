//! Which programs load a GPTQ checkpoint, and why the others do not.
//!
//! What a loader requires is data: [`LOADERS`] lists for each the needs that its code was seen to
//! check or to rely on, and remarks on how it then runs. A [`Need`] knows how to look at the
//! [`LoaderFacts`] of a checkpoint and the phrase that says why it is not met.

use gptq_checkpoint::{CheckpointFormat, LinearShape, QuantizeConfig};
use serde::Serialize;

/// What loaders look at in a checkpoint.
#[derive(Clone, Debug)]
pub struct LoaderFacts {
    /// Bits, groups and conventions, as the tensors have them.
    pub quantize: QuantizeConfig,
    /// The linears of a block.
    pub linears: Vec<LinearShape>,
    /// Fewer key and value heads than query heads.
    pub grouped_heads: bool,
    /// Columns lie in another order than their groups in some linear.
    pub act_order: bool,
    /// q, k and v, and gate and up, have one group index each.
    pub shared_order: bool,
    /// Biases of quantised linears.
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

/// Biases of the quantised linears of a checkpoint.
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

/// What a loader requires of a checkpoint.
enum Need {
    /// One of these code widths.
    Bits(&'static [u8]),
    /// One of these group sizes, or no groups.
    Groups(&'static [usize]),
    /// in_features of every linear is a multiple of the group size.
    WholeGroups,
    /// The group size is derived as the smallest power of two that covers in_features.
    PowerOfTwoGroups,
    /// A symmetric grid: zeros are not read.
    Symmetric,
    /// in_features of every linear is a multiple.
    InMultiple(usize),
    /// out_features of every linear is a multiple.
    OutMultiple(usize),
    /// Columns of an act-order linear are numbered with 16 bits.
    ShortOrder,
    /// Linears that are fused keep one group index.
    SharedOrder,
    /// Zeros are stored minus one, whatever the configuration says.
    MinusOneZeros,
    /// No bias, or one of zeros.
    ZeroBias,
    /// No bias and no rotary frequencies: every key of the file must be the model's.
    NoExtraTensors,
    /// quantize_config.json.
    QuantizeConfig,
    /// quantize_config.json without a key beside these.
    KnownKeys(&'static [&'static str]),
    /// `quantization_config` in config.json.
    QuantizationConfig,
    /// Either of them.
    AnyConfig,
    /// `model.safetensors`, or an index of that name.
    ModelFile,
    /// One weight file.
    OneFile,
    /// `format = pt` in the metadata of the weights.
    PtMetadata,
}

impl Need {
    /// Why the need is not met; `None` when it is.
    fn unmet(&self, facts: &LoaderFacts) -> Option<String> {
        let quantize = &facts.quantize;
        let first = |fits: &dyn Fn(&LinearShape) -> bool| facts.linears.iter().find(|l| !fits(l));
        match *self {
            Self::Bits(bits) => unless(bits.contains(&quantize.bits.get()), || {
                format!("{} bits: it has kernels for {} only", quantize.bits, listed(bits))
            }),
            Self::Groups(sizes) => {
                let size = quantize.group_size?;
                unless(sizes.contains(&size), || {
                    format!("group size {size}: its kernels take {} or none", listed(sizes))
                })
            }
            Self::WholeGroups => {
                let size = quantize.group_size?;
                first(&|l| l.in_features.is_multiple_of(size)).map(|l| {
                    format!("{} has {} inputs, no multiple of {size}", l.name, l.in_features)
                })
            }
            Self::PowerOfTwoGroups => {
                let size = quantize.group_size?;
                let covering = |l: &LinearShape| {
                    let groups = quantize.groups(l.in_features);
                    l.in_features.div_ceil(groups).next_power_of_two() == size || groups == 1
                };
                first(&covering)
                    .map(|l| format!("it takes the group size of {} for a power of two", l.name))
            }
            Self::Symmetric => {
                unless(quantize.sym, || "it ignores zeros: symmetric grids only".to_owned())
            }
            Self::InMultiple(n) => first(&|l| l.in_features.is_multiple_of(n))
                .map(|l| format!("{} has {} inputs, no multiple of {n}", l.name, l.in_features)),
            Self::OutMultiple(n) => first(&|l| l.out_features.is_multiple_of(n))
                .map(|l| format!("{} has {} outputs, no multiple of {n}", l.name, l.out_features)),
            Self::ShortOrder => first(&|l| !facts.act_order || l.in_features <= 1 << 16)
                .map(|l| format!("{} has {} inputs to reorder", l.name, l.in_features)),
            Self::SharedOrder => unless(facts.shared_order, || {
                "q, k and v, or gate and up, differ in g_idx: it fuses them".to_owned()
            }),
            Self::MinusOneZeros => {
                unless(quantize.checkpoint_format == CheckpointFormat::Gptq, || {
                    "gptq_v2: it takes zeros to be stored minus one".to_owned()
                })
            }
            Self::ZeroBias => unless(facts.bias != Bias::Values, || {
                "biases that are not zero: it has no place for them".to_owned()
            }),
            Self::NoExtraTensors => match (facts.bias, facts.frequencies) {
                (Bias::Absent, false) => None,
                (Bias::Absent, true) => Some("inv_freq tensors: it knows no such key".to_owned()),
                _ => Some("bias tensors: it knows no such key; use --layout modern".to_owned()),
            },
            _ => self.unmet_by_files(facts),
        }
    }

    /// The needs that look at files rather than numbers.
    fn unmet_by_files(&self, facts: &LoaderFacts) -> Option<String> {
        let named = || facts.file_stem == "model";
        match self {
            Self::QuantizeConfig => unless(facts.quantize_config.is_some(), || {
                "there is no quantize_config.json".to_owned()
            }),
            Self::KnownKeys(known) => {
                let keys = facts.quantize_config.iter().flatten();
                let unknown = keys.map(String::as_str).find(|key| !known.contains(key));
                unknown.map(|key| format!("quantize_config.json has the unknown key {key}"))
            }
            Self::QuantizationConfig => unless(facts.quantization_config, || {
                "config.json has no quantization_config".to_owned()
            }),
            Self::AnyConfig => {
                unless(facts.quantization_config || facts.quantize_config.is_some(), || {
                    "no file says how it is quantised".to_owned()
                })
            }
            Self::ModelFile => unless(named(), || {
                format!("the weights are {}.safetensors, not model.safetensors", facts.file_stem)
            }),
            Self::OneFile => unless(!facts.sharded, || "the weights are sharded".to_owned()),
            Self::PtMetadata => unless(facts.pt_metadata, || {
                "the weights lack the metadata format = pt".to_owned()
            }),
            _ => None,
        }
    }
}

/// The phrase, unless the need is met.
fn unless(met: bool, phrase: impl FnOnce() -> String) -> Option<String> {
    (!met).then(phrase)
}

fn listed<T: ToString>(values: &[T]) -> String {
    let values: Vec<String> = values.iter().map(ToString::to_string).collect();
    values.join(", ")
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
            Self::Unfused => facts.grouped_heads || (facts.act_order && bits == 4),
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
        ],
        remarks: &[
            (When::Always, "use_safetensors=True"),
            (When::Unfused, "inject_fused_attention=False"),
            (When::ActOrder(4), "prompts beyond 2048 tokens need exllama_set_max_input_length"),
        ],
    },
    Loader {
        name: "AutoGPTQ 0.7",
        needs: &[Need::AnyConfig, Need::Bits(ALL_BITS), Need::MinusOneZeros, Need::WholeGroups],
        remarks: &[
            (When::Bits(&[4]), "ExLlamaV2 kernel"),
            (When::Bits(&[2, 3, 8]), "CUDA kernel of old"),
        ],
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
        ],
        remarks: &[],
    },
    Loader {
        name: "ExLlamaV2",
        needs: &[Need::Bits(&[4]), Need::PowerOfTwoGroups, Need::ShortOrder, Need::ZeroBias],
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
        ],
        remarks: &[(When::Always, "triton branch; bits and group size on its command line")],
    },
];

#[cfg(test)]
#[path = "loaders_tests.rs"]
mod tests;
