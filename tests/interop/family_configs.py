"""config.json of the small models that families.py makes, beyond those whose weights are stored: every
family, and every optional part of one, with windows shorter than the text and settings far from the
usual ones, so that none can be left out unnoticed. Their weights follow from the tensors' names
(`seeded_weights` in families.py, `seeded` in tests/families.rs)."""

BASE = {
    "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": False,
}
# 96 features, so that Gemma's factor of embeddings, their root, is no whole number.
GEMMA = BASE | {"hidden_size": 96, "head_dim": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
COHERE = {k: v for k, v in BASE.items() if k != "rms_norm_eps"} | {"layer_norm_eps": 1e-5}


def config(architecture, model_type, base=BASE, **keys):
    return base | {"architectures": [architecture], "model_type": model_type} | keys


def llama(**keys):
    return config("LlamaForCausalLM", "llama", **keys)


def mistral(**keys):
    return config("MistralForCausalLM", "mistral", **keys)


def qwen2(**keys):
    return config("Qwen2ForCausalLM", "qwen2", **keys)


def smollm3(**keys):
    return config("SmolLM3ForCausalLM", "smollm3", **keys)


def granite(**keys):
    return config("GraniteForCausalLM", "granite", embedding_multiplier=6.0,
                  attention_multiplier=0.4, residual_multiplier=0.3, logits_scaling=0.5, **keys)


def phi3(**keys):
    return config("Phi3ForCausalLM", "phi3", **keys)


def gemma(**keys):
    act = {} if "hidden_act" in keys else {"hidden_act": "gelu_pytorch_tanh"}
    return config("GemmaForCausalLM", "gemma", GEMMA, **act, **keys)


def gemma2(**keys):
    keys = {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 20} | keys
    return config("Gemma2ForCausalLM", "gemma2", GEMMA, hidden_activation="gelu_pytorch_tanh", **keys)


def gemma3(**keys):
    keys = {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 20} | keys
    return config("Gemma3ForCausalLM", "gemma3_text", GEMMA, hidden_activation="gelu_pytorch_tanh",
                  **keys)


def olmo2(**keys):
    return config("Olmo2ForCausalLM", "olmo2", **keys)


def olmo3(**keys):
    return config("Olmo3ForCausalLM", "olmo3", num_hidden_layers=4, sliding_window=12, **keys)


def glm(**keys):
    return config("GlmForCausalLM", "glm", head_dim=16, **keys)


def glm4(**keys):
    return config("Glm4ForCausalLM", "glm4", head_dim=16, **keys)


def cohere(**keys):
    return config("CohereForCausalLM", "cohere", COHERE, **keys)


def cohere2(**keys):
    return config("Cohere2ForCausalLM", "cohere2", COHERE, num_hidden_layers=4, sliding_window=8,
                  **keys)


def mixtral(**keys):
    return config("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2, **keys)


def qwen2_moe(**keys):
    return config("Qwen2MoeForCausalLM", "qwen2_moe", num_hidden_layers=4, num_experts=6, num_experts_per_tok=3,
                  moe_intermediate_size=32, shared_expert_intermediate_size=64, **keys)


def qwen3_moe(**keys):
    return config("Qwen3MoeForCausalLM", "qwen3_moe", num_hidden_layers=3, num_experts=8, num_experts_per_tok=3,
                  moe_intermediate_size=32, head_dim=32, **keys)


def olmoe(**keys):
    return config("OlmoeForCausalLM", "olmoe", num_experts=8, num_experts_per_tok=3, **keys)


def glm4_moe(**keys):
    keys = {"num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 16,
            "moe_intermediate_size": 32, "num_nextn_predict_layers": 1} | keys
    return config("Glm4MoeForCausalLM", "glm4_moe", **keys)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "rope_theta": 1000.0}
FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8]
LONG = {"rope_type": "longrope", "short_factor": FACTORS,
        "long_factor": [1.5 * f for f in FACTORS]}

SEEDED = {
    "llama-yarn": llama(rope_parameters=YARN),
    "llama-yarn-mscale": llama(rope_parameters=YARN | {
        "mscale": 0.7, "mscale_all_dim": 1.4, "beta_fast": 8, "beta_slow": 2, "truncate": False}),
    "llama-yarn-factor": llama(rope_theta=500.0, rope_scaling={
        "type": "yarn", "factor": 2.0, "attention_factor": 1.3}),
    "llama-longrope": llama(rope_parameters=LONG | {
        "factor": 4.0, "original_max_position_embeddings": 32}),
    "mistral-sliding": mistral(sliding_window=12),
    "mistral-nemo": mistral(head_dim=32, sliding_window=None, rope_theta=1000000.0),
    "qwen2-sliding": qwen2(use_sliding_window=True, sliding_window=10, max_window_layers=1,
                           rope_parameters=YARN),
    "qwen3-listed": config("Qwen3ForCausalLM", "qwen3", head_dim=32, use_sliding_window=True,
                           sliding_window=10, attention_bias=True,
                           layer_types=["sliding_attention", "full_attention"]),
    "smollm3": smollm3(num_hidden_layers=4, tie_word_embeddings=True),
    "smollm3-sliding": smollm3(num_hidden_layers=3, use_sliding_window=True, sliding_window=12,
                               no_rope_layers=[1, 0, 0], attention_bias=True, mlp_bias=True,
                               rope_theta=5000.0),
    "granite": granite(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "granite-yarn": granite(rope_parameters=YARN),
    "phi3": phi3(sliding_window=20),
    "phi3-partial": phi3(partial_rotary_factor=0.75, rope_theta=500.0, tie_word_embeddings=True),
    "phi3-short": phi3(original_max_position_embeddings=64, rope_scaling=LONG | {"type": "su"}),
    "phi3-long": phi3(original_max_position_embeddings=32, sliding_window=40, rope_parameters=LONG),
    "gemma": gemma(),
    "gemma-gelu": gemma(hidden_act="gelu", hidden_activation=None, tie_word_embeddings=False,
                        attention_bias=True),
    "gemma2": gemma2(attn_logit_softcapping=1.5, final_logit_softcapping=2.0),
    "gemma2-listed": gemma2(attn_logit_softcapping=None, final_logit_softcapping=None,
                            attention_bias=True, tie_word_embeddings=False, layer_types=[
                                "full_attention", "sliding_attention", "sliding_attention"]),
    "gemma3": gemma3(sliding_window_pattern=2, rope_theta=5000.0, rope_local_base_freq=300.0,
                     rope_scaling={"rope_type": "linear", "factor": 8.0},
                     final_logit_softcapping=2.0),
    "gemma3-nested": gemma3(tie_word_embeddings=False, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention"], rope_parameters={
            "full_attention": YARN, "sliding_attention": {"rope_type": "default",
                                                          "rope_theta": 300.0}}),
    "olmo2": olmo2(attention_bias=True),
    "olmo2-yarn": olmo2(num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=YARN),
    "olmo3": olmo3(rope_theta=500000.0, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "olmo3-nested": olmo3(attention_bias=True, rope_parameters={
        "full_attention": YARN, "sliding_attention": {"rope_theta": 300.0}}),
    "glm": glm(tie_word_embeddings=True),
    "glm-whole": glm(partial_rotary_factor=1.0, attention_bias=False, rope_theta=500.0),
    "glm4": glm4(),
    "glm4-yarn": glm4(rope_parameters=YARN | {"partial_rotary_factor": 0.75}, attention_bias=False,
                      tie_word_embeddings=True),
    "cohere": cohere(logit_scale=0.4, use_qk_norm=True, attention_bias=True,
                     tie_word_embeddings=True),
    "cohere-plain": cohere(rope_theta=500.0, logit_scale=1.5),
    "cohere2": cohere2(logit_scale=0.4, tie_word_embeddings=True),
    "cohere2-pattern": cohere2(logit_scale=1.5, sliding_window_pattern=2, attention_bias=True),
}
SEEDED |= {
    "seed-oss": config("SeedOssForCausalLM", "seed_oss", head_dim=32, attention_out_bias=True, mlp_bias=True),
    "seed-oss-plain": config("SeedOssForCausalLM", "seed_oss", head_dim=16, attention_bias=False,
                             tie_word_embeddings=True, rope_parameters=YARN),
}
# Mixtures of experts: normed weights and not, groups, shared experts, blocks without experts.
SEEDED |= {
    "mixtral": mixtral(),
    "mixtral-sliding": mixtral(sliding_window=12, rope_theta=5000.0, tie_word_embeddings=True),
    "qwen2-moe": qwen2_moe(mlp_only_layers=[1], norm_topk_prob=False, rope_theta=500.0),
    "qwen2-moe-normed": qwen2_moe(decoder_sparse_step=2, norm_topk_prob=True, qkv_bias=False,
                                  use_sliding_window=True, sliding_window=10, max_window_layers=3),
    "qwen3-moe": qwen3_moe(mlp_only_layers=[0], norm_topk_prob=True, attention_bias=True,
                           tie_word_embeddings=True),
    "qwen3-moe-sliding": qwen3_moe(decoder_sparse_step=1, norm_topk_prob=False, use_sliding_window=True,
                                   sliding_window=10),
    "olmoe": olmoe(norm_topk_prob=False, clip_qkv=None, num_key_value_heads=4),
    "olmoe-normed": olmoe(norm_topk_prob=True, attention_bias=True, rope_theta=500.0),
    "glm4-moe": glm4_moe(first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
                         n_shared_experts=2, norm_topk_prob=True, use_qk_norm=True, attention_bias=True),
    "glm4-moe-plain": glm4_moe(first_k_dense_replace=0, n_shared_experts=1, norm_topk_prob=False, rope_parameters={
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}),
}
# Windows within the context of the first training, and beyond it.
SHORT_TOO = ["llama-longrope", "phi3-long"]
