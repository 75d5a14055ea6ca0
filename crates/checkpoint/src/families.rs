//! The families of models whose blocks the engine computes: what their config.json leaves unsaid, and
//! which optional parts they have. A row says how a family differs from Llama; the rules are those of
//! transformers' `configuration_*.py` and `modeling_*.py`.

use crate::NormId;
use crate::expert_rules::{BlocksRule, ExpertRules, SharedRule};
use crate::experts::{ExpertNames, LLAMA_NAMES, Scores};
use crate::family::{
    Activation, Factor, Family, HeadNorms, LocalRope, NormKind, Part, Rotates, Window,
};

const SILU: &[(&str, Activation)] = &[("silu", Activation::Silu)];
const GELU: &[(&str, Activation)] = &[("gelu_pytorch_tanh", Activation::GeluTanh)];
/// Gemma's first files say `gelu`, and mean its tanh form.
const GEMMA_GELU: &[(&str, Activation)] =
    &[("gelu_pytorch_tanh", Activation::GeluTanh), ("gelu", Activation::GeluTanh)];

/// Norms before attention and before the MLP.
const BEFORE: &[(NormId, &str)] = &[
    (NormId::BeforeAttention, "input_layernorm"),
    (NormId::BeforeMlp, "post_attention_layernorm"),
];
/// Norms of what attention and the MLP give.
const AFTER: &[(NormId, &str)] = &[
    (NormId::AfterAttention, "post_attention_layernorm"),
    (NormId::AfterMlp, "post_feedforward_layernorm"),
];
/// Both.
const AROUND: &[(NormId, &str)] = &[
    (NormId::BeforeAttention, "input_layernorm"),
    (NormId::AfterAttention, "post_attention_layernorm"),
    (NormId::BeforeMlp, "pre_feedforward_layernorm"),
    (NormId::AfterMlp, "post_feedforward_layernorm"),
];
/// Both, under GLM's names.
const GLM_AROUND: &[(NormId, &str)] = &[
    (NormId::BeforeAttention, "input_layernorm"),
    (NormId::AfterAttention, "post_self_attn_layernorm"),
    (NormId::BeforeMlp, "post_attention_layernorm"),
    (NormId::AfterMlp, "post_mlp_layernorm"),
];
/// One that attention and the MLP share.
const SHARED: &[(NormId, &str)] = &[(NormId::BeforeAttention, "input_layernorm")];

pub(crate) const LLAMA: Family = Family {
    name: "llama",
    context: 2048,
    kv_heads: None,
    head_dim: None,
    tied: false,
    act_key: "hidden_act",
    acts: SILU,
    qkv_bias: Part::Flag("attention_bias", false),
    output_bias: Part::Flag("attention_bias", false),
    mlp_bias: Part::Flag("mlp_bias", false),
    experts: None,
    fused_qkv: false,
    fused_gate_up: false,
    norm: NormKind::Rms,
    norm_eps: ("rms_norm_eps", 1e-6),
    norms: BEFORE,
    head_norms: HeadNorms::None,
    parallel: false,
    window: Window::None,
    rotates: Rotates::All,
    theta: 10_000.0,
    partial: None,
    interleaved: false,
    local_rope: None,
    original_context: None,
    yarn_is_longrope: false,
    mrope: None,
    embedding: Factor::Number(1.0),
    attention: Factor::OverRootOfHead,
    residual: Factor::Number(1.0),
    logits: Factor::Number(1.0),
    attention_cap: None,
    logit_cap: None,
};

pub(crate) const MISTRAL: Family = Family {
    name: "mistral",
    context: 4096 * 32,
    kv_heads: Some(8),
    qkv_bias: Part::Never,
    output_bias: Part::Never,
    mlp_bias: Part::Never,
    // With a list transformers takes it for a Ministral, which is the same otherwise.
    window: Window::AllUnlisted { default: 4096 },
    ..LLAMA
};

pub(crate) const QWEN2: Family = Family {
    name: "qwen2",
    context: 32_768,
    kv_heads: Some(32),
    qkv_bias: Part::Always,
    output_bias: Part::Never,
    mlp_bias: Part::Never,
    window: Window::From { default: 4096, first: 28 },
    ..LLAMA
};

pub(crate) const QWEN3: Family = Family {
    name: "qwen3",
    head_dim: Some(128),
    qkv_bias: Part::Flag("attention_bias", false),
    output_bias: Part::Flag("attention_bias", false),
    head_norms: HeadNorms::Heads,
    ..QWEN2
};

const GEMMA: Family = Family {
    name: "gemma",
    context: 8192,
    kv_heads: Some(16),
    head_dim: Some(256),
    tied: true,
    acts: GEMMA_GELU,
    mlp_bias: Part::Never,
    norm: NormKind::RmsPlusOne,
    embedding: Factor::RootOfWidth,
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    kv_heads: Some(4),
    act_key: "hidden_activation",
    acts: GELU,
    norms: AROUND,
    window: Window::Pattern { default: 4096, every: 2 },
    attention: Factor::OverRoot("query_pre_attn_scalar", 256.0),
    attention_cap: Some(("attn_logit_softcapping", Some(50.0))),
    logit_cap: Some(("final_logit_softcapping", Some(30.0))),
    ..GEMMA
};

pub(crate) const GEMMA3: Family = Family {
    name: "gemma3_text",
    context: 131_072,
    head_norms: HeadNorms::Heads,
    window: Window::Pattern { default: 4096, every: 6 },
    theta: 1_000_000.0,
    local_rope: Some(LocalRope::Base("rope_local_base_freq", 10_000.0)),
    attention_cap: None,
    logit_cap: Some(("final_logit_softcapping", None)),
    ..GEMMA2
};

const OLMO2: Family = Family {
    name: "olmo2",
    mlp_bias: Part::Never,
    norm_eps: ("rms_norm_eps", 1e-5),
    norms: AFTER,
    head_norms: HeadNorms::Whole,
    ..LLAMA
};

const GLM: Family = Family {
    name: "glm",
    context: 131_072,
    kv_heads: Some(2),
    head_dim: Some(128),
    qkv_bias: Part::Flag("attention_bias", true),
    output_bias: Part::Never,
    mlp_bias: Part::Never,
    fused_gate_up: true,
    norm_eps: ("rms_norm_eps", 1.562_5e-7),
    partial: Some(0.5),
    interleaved: true,
    ..LLAMA
};

const COHERE: Family = Family {
    name: "cohere",
    context: 8192,
    tied: true,
    mlp_bias: Part::Never,
    norm: NormKind::Layer,
    norm_eps: ("layer_norm_eps", 1e-5),
    norms: SHARED,
    head_norms: HeadNorms::EachIf("use_qk_norm"),
    parallel: true,
    theta: 500_000.0,
    interleaved: true,
    logits: Factor::Key("logit_scale", 0.0625),
    ..LLAMA
};

const MIXTRAL: ExpertRules = ExpertRules {
    names: ExpertNames { module: "block_sparse_moe", leaves: ["w1", "w3", "w2"], ..LLAMA_NAMES },
    count: (&["num_local_experts", "num_experts"], 8),
    per_token: 2,
    width: None,
    scores: Scores::Softmax,
    normalize: Part::Always,
    grouped: false,
    shared: SharedRule::None,
    blocks: BlocksRule::All,
};

const QWEN2_MOE: ExpertRules = ExpertRules {
    names: LLAMA_NAMES,
    count: (&["num_experts"], 60),
    per_token: 4,
    width: Some((&["moe_intermediate_size"], 1408)),
    normalize: Part::Flag("norm_topk_prob", false),
    shared: SharedRule::Gated((&["shared_expert_intermediate_size"], 5632)),
    blocks: BlocksRule::Unlisted,
    ..MIXTRAL
};

const QWEN3_MOE: ExpertRules = ExpertRules {
    count: (&["num_experts", "num_local_experts"], 128),
    per_token: 8,
    width: Some((&["moe_intermediate_size"], 768)),
    shared: SharedRule::None,
    ..QWEN2_MOE
};

const OLMOE: ExpertRules = ExpertRules {
    names: LLAMA_NAMES,
    count: (&["num_experts", "num_local_experts"], 64),
    per_token: 8,
    normalize: Part::Flag("norm_topk_prob", false),
    ..MIXTRAL
};

const GLM4_MOE: ExpertRules = ExpertRules {
    names: ExpertNames { shared: "shared_experts", ..LLAMA_NAMES },
    count: (&["n_routed_experts", "num_local_experts"], 128),
    per_token: 8,
    width: Some((&["moe_intermediate_size"], 1408)),
    scores: Scores::Sigmoid,
    normalize: Part::Flag("norm_topk_prob", true),
    grouped: true,
    shared: SharedRule::Times((&["n_shared_experts"], 1)),
    blocks: BlocksRule::After((&["first_k_dense_replace"], 1)),
};

/// `model_type` of every family whose blocks the engine computes.
pub fn family_names() -> impl Iterator<Item = &'static str> {
    FAMILIES.into_iter().map(|family| family.name)
}

pub(crate) const FAMILIES: [Family; 22] = [
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    Family {
        name: "smollm3",
        context: 32_768,
        kv_heads: Some(4),
        tied: true,
        window: Window::Unrotated,
        rotates: Rotates::Listed,
        theta: 2_000_000.0,
        ..LLAMA
    },
    Family {
        name: "granite",
        embedding: Factor::Key("embedding_multiplier", 1.0),
        attention: Factor::Key("attention_multiplier", 1.0),
        residual: Factor::Key("residual_multiplier", 1.0),
        logits: Factor::Over("logits_scaling", 1.0),
        ..LLAMA
    },
    Family {
        name: "phi3",
        context: 4096,
        window: Window::All { default: None },
        qkv_bias: Part::Never,
        output_bias: Part::Never,
        mlp_bias: Part::Never,
        fused_qkv: true,
        fused_gate_up: true,
        norm_eps: ("rms_norm_eps", 1e-5),
        partial: Some(1.0),
        original_context: Some(4096),
        yarn_is_longrope: true,
        ..LLAMA
    },
    GEMMA,
    GEMMA2,
    GEMMA3,
    OLMO2,
    Family {
        name: "olmo3",
        window: Window::Pattern { default: 4096, every: 4 },
        theta: 500_000.0,
        local_rope: Some(LocalRope::Unscaled),
        ..OLMO2
    },
    GLM,
    Family { name: "glm4", norms: GLM_AROUND, ..GLM },
    COHERE,
    Family {
        name: "cohere2",
        head_norms: HeadNorms::None,
        window: Window::Pattern { default: 4096, every: 4 },
        rotates: Rotates::Sliding,
        theta: 10_000.0,
        ..COHERE
    },
    Family {
        name: "seed_oss",
        context: 524_288,
        kv_heads: Some(8),
        head_dim: Some(128),
        qkv_bias: Part::Flag("attention_bias", true),
        output_bias: Part::Flag("attention_out_bias", false),
        ..LLAMA
    },
    Family {
        name: "mixtral",
        context: 4096 * 32,
        window: Window::All { default: None },
        kv_heads: Some(8),
        qkv_bias: Part::Never,
        output_bias: Part::Never,
        mlp_bias: Part::Never,
        experts: Some(&MIXTRAL),
        norm_eps: ("rms_norm_eps", 1e-5),
        theta: 1_000_000.0,
        ..LLAMA
    },
    Family {
        name: "qwen2_moe",
        kv_heads: Some(16),
        qkv_bias: Part::Flag("qkv_bias", true),
        experts: Some(&QWEN2_MOE),
        window: Window::OddBefore { default: 4096 },
        ..QWEN2
    },
    Family {
        name: "qwen3_moe",
        kv_heads: Some(4),
        qkv_bias: Part::Flag("attention_bias", false),
        output_bias: Part::Flag("attention_bias", false),
        experts: Some(&QWEN3_MOE),
        head_norms: HeadNorms::Heads,
        window: Window::AllIf { default: 4096 },
        ..QWEN2
    },
    Family {
        name: "olmoe",
        context: 4096,
        mlp_bias: Part::Never,
        experts: Some(&OLMOE),
        norm_eps: ("rms_norm_eps", 1e-5),
        head_norms: HeadNorms::Whole,
        ..LLAMA
    },
    Family {
        name: "glm4_moe",
        context: 131_072,
        kv_heads: Some(8),
        output_bias: Part::Never,
        mlp_bias: Part::Never,
        experts: Some(&GLM4_MOE),
        norm_eps: ("rms_norm_eps", 1e-5),
        head_norms: HeadNorms::HeadsIf("use_qk_norm"),
        partial: Some(0.5),
        ..LLAMA
    },
];
