//! What loaders require of a checkpoint, and the phrases that say why it is not met.

use crate::checkpoint_format::CheckpointFormat;
use crate::rope::RopeScaling;
use crate::{LinearId, LinearShape};

use super::facts::{Architecture, Bias, GroupIndex, InBlocks, LoaderFacts};

/// What vLLM's and TGI's Marlin kernels take.
pub(super) const MARLIN_SHAPES: [Need; 4] =
    [Need::Groups(&[32, 64, 128]), Need::OutMultiple(64), Need::InMultiple(128), Need::WholeGroups];

/// What a loader requires of a checkpoint.
pub(super) enum Need {
    /// A model of one of these families.
    Family(&'static [&'static str]),
    /// A language model by itself, or a part of one of these; without names none was tried.
    Wrapper(&'static [&'static str]),
    /// Of models with other parts none of these.
    NoWrapper(&'static [&'static str]),
    /// Tensors that are called as transformers 5 has them in memory.
    NamesInMemory,
    /// No experts, or those of a family that was tried; without families none was.
    Experts(&'static [&'static str]),
    /// No experts: it keeps those of a block together.
    NoExperts,
    /// Experts in no block, or in all.
    ExpertsInAll,
    /// Gate and up are two linears.
    GateAndUp,
    /// No linear of the architecture has a bias.
    NoBiases,
    /// As many key and value heads as query heads.
    UngroupedHeads,
    /// Frequencies that are not stretched, or in one of these ways.
    RopeScaling(&'static [&'static str]),
    /// Frequencies of this base.
    RopeTheta(u32),
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
    /// Zeros are stored as the configuration says.
    ZerosAsDeclared,
    /// No zero is 0 that is stored minus one: one is added without wrapping.
    NoZeroOfZero,
    /// A symmetric grid, zeros as they are, or GPTQModel's own stamp.
    SymmetricOrStamp,
    /// Every linear has a group index, which is read as it is.
    StoredIndex,
    /// A group index that is there is read as it is.
    NoPlaceholder,
    /// Every linear of a block is quantized.
    EveryLinear,
    /// The head is stored under its own name, tied or not.
    StoredHead,
    /// No act-order is declared, or there are no groups.
    DeclaredOrder,
    /// Act-order with this width only.
    OrderAtBits(u8),
    /// Groups of a power of two from 16 to 256.
    BlockGroups,
    /// Shapes and groups that Marlin's kernel takes, or else Exllama's.
    MarlinOrExllama,
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
    pub(super) fn unmet(&self, facts: &LoaderFacts) -> Option<String> {
        let quantize = &facts.quantize;
        let linears = &facts.architecture.linears;
        let first = |fits: &dyn Fn(&LinearShape) -> bool| linears.iter().find(|l| !fits(l));
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
            Self::ZeroBias => unless(facts.bias != Bias::Values, || {
                "biases that are not zero: it has no place for them".to_owned()
            }),
            Self::NoExtraTensors => match (facts.bias, facts.frequencies) {
                (Bias::Absent, false) => None,
                (Bias::Absent, true) => Some("inv_freq tensors: it knows no such key".to_owned()),
                _ => Some("bias tensors: it knows no such key; use --layout modern".to_owned()),
            },
            _ => self
                .unmet_by_files(facts)
                .or_else(|| self.unmet_by_model(&facts.architecture))
                .or_else(|| self.unmet_by_zeros(facts))
                .or_else(|| self.unmet_by_groups(facts)),
        }
    }

    /// The needs that look at zeros.
    fn unmet_by_zeros(&self, facts: &LoaderFacts) -> Option<String> {
        let quantize = &facts.quantize;
        let declared = quantize.checkpoint_format;
        let (stored, v1) = (facts.zeros, CheckpointFormat::Gptq);
        let misstored = || {
            let how = if stored == v1 { "minus one" } else { "as they are" };
            format!("zeros are stored {how}, though the settings say {}", declared.name())
        };
        match self {
            Self::MinusOneZeros if stored == v1 => None,
            Self::MinusOneZeros if stored == declared => {
                Some("gptq_v2: it takes zeros to be stored minus one".to_owned())
            }
            Self::MinusOneZeros => Some(misstored()),
            Self::ZerosAsDeclared => unless(stored == declared, misstored),
            Self::NoZeroOfZero => unless(!facts.zeros_of_zero || stored != v1, || {
                let read = 1_u32 << quantize.bits.get();
                format!("zeros of 0: it adds one without wrapping and takes them for {read}")
            }),
            Self::SymmetricOrStamp => {
                unless(quantize.sym || declared != v1 || facts.gptqmodel_stamp, || {
                    "asymmetric: it refuses such files but those of GPTQModel 0.9 and later, which \
                     meta.quantizer has to name"
                        .to_owned()
                })
            }
            _ => None,
        }
    }

    /// The needs that look at groups and their order.
    fn unmet_by_groups(&self, facts: &LoaderFacts) -> Option<String> {
        let quantize = &facts.quantize;
        match *self {
            Self::StoredIndex if facts.group_index == GroupIndex::Absent => {
                Some("no g_idx: it needs one".to_owned())
            }
            Self::StoredIndex | Self::NoPlaceholder => {
                unless(facts.group_index != GroupIndex::Placeholder, || {
                    "g_idx is a placeholder of zeros: it takes it for the order".to_owned()
                })
            }
            Self::DeclaredOrder => {
                unless(!quantize.desc_act || quantize.group_size.is_none(), || {
                    "act-order (desc_act) with groups: it no longer takes it".to_owned()
                })
            }
            Self::OrderAtBits(bits) => {
                unless(!quantize.desc_act || quantize.bits.get() == bits, || {
                    format!("act-order with {} bits: it takes it with {bits} only", quantize.bits)
                })
            }
            Self::BlockGroups => {
                let fits = |size: usize| size.is_power_of_two() && (16..=256).contains(&size);
                let size = crate::GroupSize(quantize.group_size);
                unless(quantize.group_size.is_some_and(fits), || {
                    format!("group size {size}: its kernel takes powers of two from 16 to 256")
                })
            }
            Self::MarlinOrExllama => {
                let marlin = MARLIN_SHAPES.iter().find_map(|need| need.unmet(facts))?;
                let exllama = match quantize.group_size {
                    None => Some("it takes no file without groups".to_owned()),
                    Some(_) => [Self::WholeGroups, Self::OutMultiple(8)]
                        .iter()
                        .find_map(|need| need.unmet(facts)),
                };
                Some(format!("Marlin kernel: {marlin}; Exllama kernel: {}", exllama?))
            }
            _ => None,
        }
    }

    /// The needs that look at the model.
    fn unmet_by_model(&self, model: &Architecture) -> Option<String> {
        match *self {
            Self::Family(known) => {
                let whole = model.wrapper.unwrap_or(model.family);
                unless(known.contains(&whole), || {
                    format!("{whole}: it computes {} only", listed(known))
                })
            }
            Self::Wrapper(known) => {
                let whole = model.wrapper?;
                unless(known.contains(&whole), || match known {
                    [] => format!("{whole}: models with other parts were not tried"),
                    _ => {
                        format!("{whole}: of models with other parts {} were tried", listed(known))
                    }
                })
            }
            Self::NoWrapper(refused) => {
                let whole = model.wrapper.filter(|whole| refused.contains(whole))?;
                Some(format!("{whole}: it has no such model"))
            }
            Self::NamesInMemory => model.other_names.map(|(found, sought)| {
                format!("tensors are called {found}…: it looks for {sought}")
            }),
            Self::Experts(known) if model.experts != InBlocks::None => {
                unless(known.contains(&model.family), || match known {
                    [] => format!("{}: mixtures of experts were not tried", model.family),
                    _ => format!(
                        "{}: of mixtures of experts it computes {} only",
                        model.family,
                        listed(known)
                    ),
                })
            }
            Self::NoExperts => unless(model.experts == InBlocks::None, || {
                "experts: it keeps those of a block in one tensor, and leaves packed ones out"
                    .to_owned()
            }),
            Self::ExpertsInAll => unless(model.experts != InBlocks::Some, || {
                "blocks without experts: it leaves their packed MLPs out".to_owned()
            }),
            Self::GateAndUp => {
                let fused = model.linears.iter().find(|l| l.id == LinearId::GateUp);
                fused.map(|l| format!("{} is gate and up in one: it looks for two linears", l.name))
            }
            Self::NoBiases => model
                .linears
                .iter()
                .find(|l| l.bias)
                .map(|l| format!("{} has a bias of its own: it has no place for it", l.name)),
            Self::UngroupedHeads => unless(!model.grouped_heads, || {
                "fewer key and value heads than query heads: it splits q, k and v evenly".to_owned()
            }),
            Self::RopeScaling(known) => {
                let scaling = scaling_name(&model.rope.scaling)?;
                unless(known.contains(&scaling), || match known {
                    [] => format!("rotary scaling {scaling}: it reads none"),
                    _ => format!("rotary scaling {scaling}: it reads {} only", listed(known)),
                })
            }
            Self::RopeTheta(theta) => unless(model.rope.theta == f64::from(theta), || {
                format!("rope_theta {}: it takes it for {theta}", model.rope.theta)
            }),
            _ => None,
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
                    "no file says how it is quantized".to_owned()
                })
            }
            Self::ModelFile => unless(named(), || {
                format!("the weights are {}.safetensors, not model.safetensors", facts.file_stem)
            }),
            Self::EveryLinear => facts
                .dense_linear
                .as_ref()
                .map(|linear| format!("{linear} is dense: it takes every linear for packed")),
            Self::StoredHead => unless(!facts.head_only_tied, || {
                "tied head without lm_head.weight: it leaves both uninitialized".to_owned()
            }),
            Self::OneFile => unless(!facts.sharded, || "the weights are sharded".to_owned()),
            Self::PtMetadata => {
                unless(facts.pt_metadata, || "the weights lack the metadata format = pt".to_owned())
            }
            _ => None,
        }
    }
}

/// The scaling's name in config.json; `None` without one.
fn scaling_name(scaling: &RopeScaling) -> Option<&'static str> {
    match scaling {
        RopeScaling::None => None,
        RopeScaling::Linear { .. } => Some("linear"),
        RopeScaling::Dynamic { .. } => Some("dynamic"),
        RopeScaling::Llama3 { .. } => Some("llama3"),
        RopeScaling::Yarn(_) => Some("yarn"),
        RopeScaling::LongRope(_) => Some("longrope"),
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
