//! What distinguishes the mixtures of experts of one family from those of another, and how that is read from
//! config.json.

use serde_json::Value;

use crate::Result;
use crate::config::{MAX_BLOCKS, MAX_WIDTH};
use crate::experts::{ExpertNames, Experts, Router, Scores, SharedExpert};
use crate::family::Part;
use crate::fields::Fields;

/// More than any model has, and few enough for a number of 16 bits.
const MAX_EXPERTS: u64 = 1 << 12;
/// The most experts of all blocks together, for their linears are listed.
const MAX_IN_ALL: usize = 1 << 17;

/// Keys that mean the same, the usual one first, and the value where there is none of them.
pub(crate) type Size = (&'static [&'static str], usize);

/// A family's mixtures.
#[derive(Debug, PartialEq)]
pub(crate) struct ExpertRules {
    /// What their parts are called.
    pub(crate) names: ExpertNames,
    /// How many there are.
    pub(crate) count: Size,
    /// How many a token goes through.
    pub(crate) per_token: usize,
    /// Their width; `None`: that of the MLP in blocks without them.
    pub(crate) width: Option<Size>,
    /// What the products of the router become.
    pub(crate) scores: Scores,
    /// Weights are divided by their sum.
    pub(crate) normalize: Part,
    /// Experts lie in groups, weights are scaled, and choices are corrected by a bias.
    pub(crate) grouped: bool,
    /// The expert that every token goes through.
    pub(crate) shared: SharedRule,
    /// The blocks that have them.
    pub(crate) blocks: BlocksRule,
}

/// The expert that every token goes through.
#[derive(Debug, PartialEq)]
pub(crate) enum SharedRule {
    None,
    /// Of this width, with a gate of its own.
    Gated(Size),
    /// As wide as so many experts.
    Times(Size),
}

/// The blocks that have experts.
#[derive(Debug, PartialEq)]
pub(crate) enum BlocksRule {
    All,
    /// All but the first so many.
    After(Size),
    /// Every so many-th by `decoder_sparse_step`, but those that `mlp_only_layers` lists.
    Unlisted,
}

impl ExpertRules {
    /// Whether a key is one of these rules'.
    pub(crate) fn reads(&self, key: &str) -> bool {
        self.count.0.contains(&key)
    }

    /// The sizes that a config leaves out, with what is taken for them: how many experts there are, and how
    /// wide they are.
    pub(crate) fn assumed(
        &self,
        keys: &serde_json::Map<String, Value>,
    ) -> impl Iterator<Item = (&'static str, usize)> {
        let absent = |(names, _): &Size| names.iter().all(|name| keys.get(*name).is_none());
        let sizes = [Some(self.count), self.width].into_iter().flatten();
        sizes.filter(absent).map(|(names, value)| (names[0], value)).collect::<Vec<_>>().into_iter()
    }

    /// The mixture that a config describes; `dense_width` is that of an MLP.
    pub(crate) fn read(
        &'static self,
        fields: &Fields<'_>,
        dense_width: usize,
        blocks: usize,
    ) -> Result<Experts> {
        let (count_key, count) = size(fields, self.count, MAX_EXPERTS)?;
        if count * blocks > MAX_IN_ALL {
            let reason = format!("is {count}, which are too many for each of {blocks} blocks");
            return Err(fields.invalid(count_key, reason));
        }
        let router = self.router(fields, (count_key, count))?;
        const PER_TOKEN: &str = "num_experts_per_tok";
        let per_token = fields.size(PER_TOKEN, Some(self.per_token), MAX_EXPERTS)?;
        let among = count / router.groups * router.groups_per_token;
        if per_token > among {
            let reason = format!("is {per_token}, but a token chooses from {among} experts");
            return Err(fields.invalid(PER_TOKEN, reason));
        }
        let width = match self.width {
            Some(width) => size(fields, width, MAX_WIDTH)?.1,
            None => dense_width,
        };
        Ok(Experts {
            count,
            per_token,
            intermediate_size: width,
            shared: self.shared.read(fields, width)?,
            router,
            names: &self.names,
            blocks: self.blocks.read(fields, blocks)?,
        })
    }

    fn router(&self, fields: &Fields<'_>, (count_key, count): (&str, usize)) -> Result<Router> {
        let mut router = Router {
            scores: self.scores,
            normalize: self.normalize.read(fields)?,
            scale: 1.0,
            groups: 1,
            groups_per_token: 1,
            corrected: self.grouped,
        };
        if !self.grouped {
            return Ok(router);
        }
        router.groups = fields.size("n_group", Some(1), MAX_EXPERTS)?;
        router.groups_per_token = fields.size("topk_group", Some(1), MAX_EXPERTS)?;
        // A group is worth its two best experts.
        if !count.is_multiple_of(router.groups) || count / router.groups < 2 {
            let groups = router.groups;
            let reason = format!("is {count}, which are no {groups} groups of 2 or more");
            return Err(fields.invalid(count_key, reason));
        }
        if router.groups_per_token > router.groups {
            let reason = format!("is {}, of {} groups", router.groups_per_token, router.groups);
            return Err(fields.invalid("topk_group", reason));
        }
        const SCALE: &str = "routed_scaling_factor";
        router.scale = fields.positive(SCALE)?.unwrap_or(1.0) as f32;
        if !router.scale.is_normal() {
            return Err(fields.invalid(SCALE, "is out of range".to_owned()));
        }
        Ok(router)
    }
}

impl SharedRule {
    fn read(&self, fields: &Fields<'_>, width: usize) -> Result<Option<SharedExpert>> {
        match *self {
            Self::None => Ok(None),
            Self::Gated(own) => {
                let (_, intermediate_size) = size(fields, own, MAX_WIDTH)?;
                Ok(Some(SharedExpert { intermediate_size, gated: true }))
            }
            Self::Times(times) => {
                let (key, times) = size(fields, times, MAX_EXPERTS)?;
                let intermediate_size = width * times;
                if intermediate_size as u64 > MAX_WIDTH {
                    let reason = format!("is {times}, with experts of {width} features");
                    return Err(fields.invalid(key, reason));
                }
                Ok(Some(SharedExpert { intermediate_size, gated: false }))
            }
        }
    }
}

impl BlocksRule {
    /// Whether each block has experts.
    fn read(&self, fields: &Fields<'_>, blocks: usize) -> Result<Vec<bool>> {
        match *self {
            Self::All => Ok(vec![true; blocks]),
            Self::After((keys, default)) => {
                let first = count(fields, keys, default)?;
                Ok((0..blocks).map(|block| block >= first).collect())
            }
            Self::Unlisted => {
                const LIST: &str = "mlp_only_layers";
                let step = fields.size("decoder_sparse_step", Some(1), MAX_BLOCKS)?;
                let mut have: Vec<bool> =
                    (0..blocks).map(|block| (block + 1).is_multiple_of(step)).collect();
                let Some(value) = fields.get(LIST) else { return Ok(have) };
                let listed: Option<Vec<u64>> =
                    value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
                let listed = listed.ok_or_else(|| {
                    fields.invalid(LIST, format!("is `{value}`, expected a list of blocks"))
                })?;
                for block in listed {
                    let place = usize::try_from(block).ok().and_then(|block| have.get_mut(block));
                    place.into_iter().for_each(|has| *has = false);
                }
                Ok(have)
            }
        }
    }
}

/// The first of the keys that is there, and its value; the others may not contradict it.
fn size(fields: &Fields<'_>, (keys, default): Size, max: u64) -> Result<(&'static str, usize)> {
    let key = key(fields, keys);
    let value = fields.size(key, Some(default), max)?;
    for other in keys.iter().filter(|other| **other != key && fields.get(other).is_some()) {
        let found = fields.size(other, None, max)?;
        if found != value {
            let reason = format!("is {value}, but `{other}` is {found}: correct the wrong one");
            return Err(fields.invalid(key, reason));
        }
    }
    Ok((key, value))
}

/// As [`size`], where 0 is a value, too.
fn count(fields: &Fields<'_>, keys: &'static [&'static str], default: usize) -> Result<usize> {
    let key = key(fields, keys);
    match fields.get(key) {
        Some(value) if value.as_u64() == Some(0) => Ok(0),
        _ => fields.size(key, Some(default), MAX_BLOCKS),
    }
}

fn key(fields: &Fields<'_>, keys: &'static [&'static str]) -> &'static str {
    let there = keys.iter().find(|key| fields.get(key).is_some());
    there.or(keys.first()).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{Bits, DType, Expert, Layout, Scores, tensor_specs};
    use crate::{LinearId, ModelConfig, QuantizeConfig, Result};

    fn parse(family: &str, extra: &str) -> Result<ModelConfig> {
        let text = format!(
            r#"{{"model_type":"{family}","hidden_size":64,"intermediate_size":128,"num_hidden_layers":4,
            "num_attention_heads":16,"num_key_value_heads":4,"vocab_size":96{extra}}}"#
        );
        ModelConfig::parse(&text, Path::new("config.json"))
    }

    fn with(family: &str, extra: &str) -> ModelConfig {
        parse(family, extra).unwrap()
    }

    fn mixed(config: &ModelConfig) -> Vec<usize> {
        (0..4).filter(|&block| config.experts(block).is_some()).collect()
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        for (family, count, per_token, width, shared, first) in [
            ("mixtral", 8, 2, 128, None, 0),
            ("qwen2_moe", 60, 4, 1408, Some((5632, true)), 0),
            ("qwen3_moe", 128, 8, 768, None, 0),
            ("olmoe", 64, 8, 128, None, 0),
            ("glm4_moe", 128, 8, 1408, Some((1408, false)), 1),
        ] {
            let config = with(family, "");
            let experts = config.any_experts().unwrap();
            let found = experts.shared.map(|shared| (shared.intermediate_size, shared.gated));
            assert_eq!((experts.count, experts.per_token), (count, per_token), "{family}");
            assert_eq!((experts.intermediate_size, found), (width, shared), "{family}");
            assert_eq!(mixed(&config), (first..4).collect::<Vec<_>>(), "{family}");
            let router = experts.router;
            assert_eq!(router.normalize, matches!(family, "mixtral" | "glm4_moe"), "{family}");
            assert_eq!(router.scores == Scores::Sigmoid, family == "glm4_moe", "{family}");
            assert_eq!((router.scale, router.groups, router.groups_per_token), (1.0, 1, 1));
        }
        assert_eq!(with("mixtral", "").rope.theta, 1_000_000.0);
        assert_eq!(with("qwen2_moe", "").rope.theta, 10_000.0);
    }

    /// Mixtral 8x7B, Qwen3-30B-A3B, Qwen1.5-MoE, OLMoE and GLM-4.5-Air have as many parameters as transformers'
    /// models of these sizes.
    #[test]
    fn published_models_have_their_parameters() {
        for (parameters, config) in [
            (
                46_702_792_704_u64,
                r#""model_type":"mixtral","hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,
                "num_attention_heads":32,"num_key_value_heads":8,"vocab_size":32000"#,
            ),
            (
                30_532_122_624,
                r#""model_type":"qwen3_moe","hidden_size":2048,"intermediate_size":6144,
                "moe_intermediate_size":768,"num_hidden_layers":48,"num_attention_heads":32,
                "num_key_value_heads":4,"head_dim":128,"vocab_size":151936,"norm_topk_prob":true"#,
            ),
            (
                14_315_784_192,
                r#""model_type":"qwen2_moe","hidden_size":2048,"intermediate_size":5632,
                "moe_intermediate_size":1408,"shared_expert_intermediate_size":5632,"num_hidden_layers":24,
                "num_attention_heads":16,"num_key_value_heads":16,"vocab_size":151936"#,
            ),
            (
                6_919_161_856,
                r#""model_type":"olmoe","hidden_size":2048,"intermediate_size":1024,"num_hidden_layers":16,
                "num_attention_heads":16,"num_key_value_heads":16,"vocab_size":50304"#,
            ),
            (
                106_852_251_264,
                r#""model_type":"glm4_moe","hidden_size":4096,"intermediate_size":10944,
                "moe_intermediate_size":1408,"num_hidden_layers":46,"num_attention_heads":96,
                "num_key_value_heads":8,"head_dim":128,"vocab_size":151552,"attention_bias":true"#,
            ),
        ] {
            let config = format!("{{{config}}}");
            let config = ModelConfig::parse(&config, Path::new("config.json")).unwrap();
            let sizes = config.dense_tensors().into_iter().map(|(_, shape)| shape);
            let found: u64 = sizes.map(|shape| shape.iter().product::<usize>() as u64).sum();
            assert_eq!(found, parameters, "{}", config.family);
        }
    }

    #[test]
    fn blocks_without_experts_have_an_mlp() {
        assert_eq!(mixed(&with("qwen3_moe", r#","mlp_only_layers":[1,9]"#)), [0, 2, 3]);
        assert_eq!(mixed(&with("qwen2_moe", r#","decoder_sparse_step":2"#)), [1, 3]);
        let both = r#","decoder_sparse_step":2,"mlp_only_layers":[3]"#;
        assert_eq!(mixed(&with("qwen2_moe", both)), [1]);
        assert_eq!(mixed(&with("glm4_moe", r#","first_k_dense_replace":3"#)), [3]);
        assert_eq!(mixed(&with("glm4_moe", r#","first_k_dense_replace":0"#)), [0, 1, 2, 3]);
        let config = with("glm4_moe", "");
        let ids = |block| config.block_linears(block).into_iter().map(|linear| linear.id);
        assert!(ids(0).eq(LinearId::LLAMA));
        assert_eq!(ids(1).count(), 4 + 3 * 129);
        assert_eq!(config.block_dense(0), []);
        assert!(with("llama", "").any_experts().is_none());
    }

    /// Those of published files, which AutoGPTQ, GPTQModel and vLLM know.
    #[test]
    fn names_are_those_of_published_files() {
        let shape = |config: &ModelConfig, name: &str| {
            config.linear_named(name).map(|l| (l.id, l.in_features, l.out_features))
        };
        let mixtral = with("mixtral", "");
        for (leaf, wanted) in [
            ("w1", (LinearId::ExpertGate(7), 64, 128)),
            ("w2", (LinearId::ExpertDown(7), 128, 64)),
            ("w3", (LinearId::ExpertUp(7), 64, 128)),
        ] {
            let name = format!("model.layers.1.block_sparse_moe.experts.7.{leaf}");
            assert_eq!(shape(&mixtral, &name), Some(wanted));
        }
        for none in ["experts.8.w1", "experts.07.w1", "experts.7.w4", "gate", "experts.+7.w1"] {
            let name = format!("model.layers.1.block_sparse_moe.{none}");
            assert_eq!(shape(&mixtral, &name), None, "{name}");
        }
        assert_eq!(shape(&mixtral, "model.layers.4.block_sparse_moe.experts.0.w1"), None);
        assert_eq!(mixtral.block_dense(0)[0].name, "block_sparse_moe.gate.weight");
        let qwen = with("qwen2_moe", "");
        let of = |name: &str| shape(&qwen, &format!("model.layers.0.mlp.{name}"));
        assert_eq!(of("experts.59.up_proj"), Some((LinearId::ExpertUp(59), 64, 1408)));
        assert_eq!(of("shared_expert.down_proj"), Some((LinearId::SharedDown, 5632, 64)));
        assert_eq!(of("down_proj"), None);
        assert_eq!(qwen.block_dense(0)[1].name, "mlp.shared_expert_gate.weight");
        assert_eq!(qwen.block_dense(0)[1].shape, [1, 64]);
        let glm = with("glm4_moe", r#","n_shared_experts":2"#);
        let shared = "model.layers.1.mlp.shared_experts.gate_proj";
        assert_eq!(shape(&glm, shared), Some((LinearId::SharedGate, 64, 2 * 1408)));
        // Every linear is found by its name, and belongs to one expert.
        for (name, shape) in glm.linears().chain(qwen.linears()).chain(mixtral.linears()) {
            let config = [&glm, &qwen, &mixtral].into_iter();
            let found = config.filter_map(|config| config.linear_named(&name));
            assert!(found.into_iter().any(|found| found == shape), "{name}");
            let expert = shape.id.expert();
            let ids = expert.map(|expert: Expert| [expert.gate(), expert.up(), expert.down()]);
            assert!(ids.is_none_or(|ids| ids.contains(&shape.id)), "{name}");
        }
    }

    #[test]
    fn routers_are_written_and_what_corrects_them_exactly() {
        let quantize = QuantizeConfig::new(Bits::Four, Some(32), 0.01, false);
        let sizes = r#","n_routed_experts":4,"num_experts_per_tok":2,"moe_intermediate_size":32"#;
        let config = with("glm4_moe", sizes);
        let specs = tensor_specs(&config, &quantize, Layout::Modern);
        let of = |name: &str| {
            let found = specs.iter().find(|spec| spec.name == name);
            found.map(|spec| (spec.is(DType::F32), spec.shape.clone()))
        };
        let gate = "model.layers.3.mlp.gate";
        assert_eq!(of(&format!("{gate}.weight")), Some((false, vec![4, 64])));
        let correction = format!("{gate}.e_score_correction_bias");
        assert_eq!(of(&correction), Some((true, vec![4])));
        assert_eq!(of("model.layers.0.mlp.gate.weight"), None);
        assert!(config.dense_named(&correction).is_some_and(|dense| dense.exact));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (family, extra, named) in [
            ("mixtral", r#","num_local_experts":0"#, "num_local_experts"),
            ("mixtral", r#","num_experts":5000"#, "`num_experts` is `5000`, expected 1 to 4096"),
            ("mixtral", r#","num_experts_per_tok":9"#, "a token chooses from 8 experts"),
            (
                "mixtral",
                r#","num_experts":4,"num_local_experts":8"#,
                "`num_local_experts` is 8, but `num_experts` is 4: correct the wrong one",
            ),
            ("qwen3_moe", r#","num_experts":4,"num_local_experts":8"#, "`num_experts` is 4, but"),
            ("glm4_moe", r#","n_routed_experts":4,"num_local_experts":true"#, "num_local_experts"),
            ("qwen3_moe", r#","num_experts":"many""#, "num_experts"),
            ("qwen3_moe", r#","moe_intermediate_size":0"#, "moe_intermediate_size"),
            ("qwen3_moe", r#","norm_topk_prob":1"#, "norm_topk_prob"),
            ("qwen3_moe", r#","mlp_only_layers":3"#, "expected a list of blocks"),
            ("qwen3_moe", r#","mlp_only_layers":[-1]"#, "expected a list of blocks"),
            ("qwen3_moe", r#","decoder_sparse_step":0"#, "decoder_sparse_step"),
            ("qwen3_moe", r#","n_routed_experts":4"#, "n_routed_experts"),
            ("qwen2_moe", r#","shared_expert_intermediate_size":-1"#, "shared_expert"),
            (
                "olmoe",
                r#","clip_qkv":8.0"#,
                "`clip_qkv` is `8.0`, which is not supported; only `null`",
            ),
            ("olmoe", r#","clip_qkv":0"#, "clip_qkv"),
            ("glm4_moe", r#","n_group":3"#, "which are no 3 groups of 2 or more"),
            ("glm4_moe", r#","n_group":128"#, "which are no 128 groups"),
            ("glm4_moe", r#","topk_group":2"#, "topk_group"),
            ("glm4_moe", r#","n_group":32"#, "a token chooses from 4 experts"),
            ("glm4_moe", r#","routed_scaling_factor":-1"#, "routed_scaling_factor"),
            ("glm4_moe", r#","routed_scaling_factor":1e-60"#, "routed_scaling_factor"),
            ("glm4_moe", r#","n_shared_experts":4096"#, "n_shared_experts"),
            ("glm4_moe", r#","n_shared_experts":0"#, "n_shared_experts"),
            ("llama", r#","num_experts":8"#, "num_experts"),
        ] {
            let message = parse(family, extra).unwrap_err().to_string();
            assert!(message.contains(named), "{family}, {extra}: {message}");
        }
        let many = r#"{"model_type":"mixtral","hidden_size":64,"intermediate_size":128,"vocab_size":96,
            "num_hidden_layers":4096,"num_attention_heads":8,"num_local_experts":64}"#;
        let error = ModelConfig::parse(many, Path::new("config.json")).unwrap_err();
        assert!(error.to_string().contains("too many for each of 4096 blocks"), "{error}");
    }
}
