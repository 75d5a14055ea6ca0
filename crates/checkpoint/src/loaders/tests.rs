//! The published matrix, and each rule on its own.

use crate::bits::Bits;
use crate::checkpoint_format::CheckpointFormat;
use crate::config::ModelConfig;
use crate::quantize_config::QuantizeConfig;

use super::*;

/// Who refuses a branch of four bits; `act` where act-order is what vLLM no longer takes.
const FOUR_BITS: &[&str] = &["GPTQ-for-LLaMa"];
const FOUR_BITS_ACT: &[&str] = &["vLLM 0.30", "GPTQ-for-LLaMa"];
/// Its kernel takes blocks, not a whole row.
const FOUR_BITS_NO_GROUPS: &[&str] = &["GPTQ-for-LLaMa", "ONNX Runtime"];
const THREE_BITS: &[&str] = &[
    "ExLlama",
    "ExLlamaV2",
    "vLLM 0.21 marlin",
    "vLLM 0.22-0.29",
    "vLLM 0.30",
    "TGI",
    "GPTQ-for-LLaMa",
    "ONNX Runtime",
];

/// A Llama 2 of 70B parameters, as its branches were published.
fn published(bits: u8, group_size: Option<usize>, act_order: bool) -> LoaderFacts {
    let config = r#"{"model_type":"llama","hidden_size":8192,"intermediate_size":28672,
        "num_attention_heads":64,"num_key_value_heads":8,"num_hidden_layers":80,
        "vocab_size":32000}"#;
    let config = ModelConfig::parse(config, std::path::Path::new("config.json")).unwrap();
    let quantize = QuantizeConfig::new(Bits::new(bits).unwrap(), group_size, 0.01, act_order);
    let keys = quantize.file_text(crate::Layout::Card).unwrap();
    let keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&keys).unwrap();
    LoaderFacts {
        architecture: Architecture::from(&config),
        quantize,
        act_order: act_order && group_size.is_some(),
        zeros: CheckpointFormat::Gptq,
        zeros_of_zero: false,
        gptqmodel_stamp: false,
        group_index: GroupIndex::Stored,
        dense_linear: None,
        head_only_tied: false,
        bfloat16: false,
        shared_order: true,
        bias: Bias::Zero,
        other_types: Vec::new(),
        frequencies: true,
        file_stem: "model".to_owned(),
        sharded: false,
        pt_metadata: true,
        quantize_config: Some(keys.keys().cloned().collect()),
        quantization_config: true,
    }
}

fn verdict(loader: &str, facts: &LoaderFacts) -> LoaderVerdict {
    verdicts(facts).into_iter().find(|v| v.loader == loader).unwrap()
}

/// Names of those that refuse.
fn refusing(facts: &LoaderFacts) -> Vec<&'static str> {
    verdicts(facts).into_iter().filter(|v| !v.loads).map(|v| v.loader).collect()
}

fn refuses(loader: &str, facts: &LoaderFacts, why: &str) {
    let verdict = verdict(loader, facts);
    assert!(!verdict.loads, "{verdict:?}");
    assert!(verdict.reasons.iter().any(|r| r.contains(why)), "`{why}` is not in {verdict:?}");
}

/// GPTQModel 7.7.0 with transformers 5.24 on files of phi3, glm and glm4: "Missing required quantized weights",
/// `mlp.gate_proj` and `mlp.up_proj`; transformers itself reads them.
#[test]
fn fused_gate_and_up_are_no_file_of_gptqmodel() {
    for (family, fused) in [("phi3", true), ("glm4", true), ("llama", false)] {
        let config = format!(
            r#"{{"model_type":"{family}","hidden_size":256,"intermediate_size":512,"num_hidden_layers":2,
            "num_attention_heads":4,"num_key_value_heads":4,"vocab_size":64}}"#
        );
        let config = ModelConfig::parse(&config, std::path::Path::new("config.json")).unwrap();
        let architecture = Architecture::from(&config);
        let facts = LoaderFacts { architecture, ..published(4, Some(128), false) };
        assert!(verdict("transformers", &facts).loads, "{family}");
        match fused {
            true => refuses("GPTQModel", &facts, "mlp.gate_up_proj is gate and up in one"),
            false => assert!(verdict("GPTQModel", &facts).loads),
        }
    }
}

/// Perplexities of small random models packed in 4 bits, by loader and by this engine: AutoGPTQ 0.7.1
/// of mixtral the same; GPTQModel 7.7.0 of qwen2_moe, qwen3_moe and olmoe within 0.5% in bfloat16; transformers
/// 5.24 of all others than here, its experts being random.
#[test]
fn mixtures_of_experts_are_judged_by_what_was_tried() {
    let of = |family: &str, extra: &str| {
        let config = format!(
            r#"{{"model_type":"{family}","hidden_size":256,"intermediate_size":512,"num_hidden_layers":2,
            "num_attention_heads":4,"num_key_value_heads":4,"vocab_size":64{extra}}}"#
        );
        let config = ModelConfig::parse(&config, std::path::Path::new("config.json")).unwrap();
        LoaderFacts { architecture: Architecture::from(&config), ..published(4, Some(128), false) }
    };
    let of_bits = |bits, facts: &LoaderFacts| LoaderFacts {
        architecture: facts.architecture.clone(),
        ..published(bits, Some(128), false)
    };
    let mixtral = of("mixtral", "");
    assert!(verdict("AutoGPTQ 0.7", &mixtral).loads);
    refuses("transformers", &mixtral, "experts: it keeps those of a block in one tensor");
    refuses("GPTQModel", &mixtral, "qwen2_moe, qwen3_moe, olmoe only");
    refuses("vLLM 0.30", &mixtral, "mixtures of experts were not tried");
    assert_eq!(verdict("vLLM 0.30", &mixtral).seen, Seen::Untried);
    let three = of_bits(3, &mixtral);
    assert_eq!(verdict("vLLM 0.30", &three).seen, Seen::Ran);
    let qwen = of("qwen3_moe", r#","moe_intermediate_size":128"#);
    assert!(verdict("GPTQModel", &qwen).loads);
    refuses("AutoGPTQ 0.7", &qwen, "qwen3_moe");
    let some = of("qwen3_moe", r#","moe_intermediate_size":128,"mlp_only_layers":[0]"#);
    refuses("GPTQModel", &some, "blocks without experts");
    // Widths of either kind of block count.
    let narrow = of("qwen3_moe", r#","moe_intermediate_size":192,"mlp_only_layers":[0]"#);
    refuses("AutoGPTQ 0.4", &narrow, "mlp.experts.0.down_proj has 192 inputs");
    let none = of("qwen3", "");
    assert!(verdict("transformers", &none).loads && verdict("GPTQModel", &none).loads);
}

/// Losses of small random models packed in 4 bits, by loader and by this engine, within 1e-5: transformers 5.24
/// with optimum and GPTQModel of all, GPTQModel 7.7.0 itself of llava and mistral3 under names as in memory
/// (`tests/interop/records/2026-11-29-multimodal.md`).
#[test]
fn models_with_other_parts_are_judged_by_what_was_tried() {
    let of = |name: &str, stored: &str| {
        let text = format!(
            r#"{{"model_type":"{name}","text_config":{{"hidden_size":256,"intermediate_size":512,
            "num_hidden_layers":2,"num_attention_heads":2,"num_key_value_heads":2,"vocab_size":64}}}}"#
        );
        let config = ModelConfig::parse(&text, std::path::Path::new("config.json")).unwrap();
        let config = config.of_weights([stored].into_iter(), |_| None);
        LoaderFacts { architecture: Architecture::from(&config), ..published(4, Some(128), false) }
    };
    let later = "model.language_model.layers.0.input_layernorm.weight";
    let first = "language_model.model.layers.0.input_layernorm.weight";
    for (name, _) in crate::wrapper_names() {
        let facts = of(name, later);
        assert!(verdict("transformers", &facts).loads, "{name}");
        refuses("AutoGPTQ 0.7", &facts, name);
        refuses("vLLM 0.30", &facts, "models with other parts were not tried");
        assert_eq!(verdict("vLLM 0.30", &facts).seen, Seen::Untried);
    }
    assert!(verdict("transformers", &of("llava", first)).loads);
    assert!(verdict("GPTQModel", &of("llava", later)).loads);
    refuses("GPTQModel", &of("llava", first), "it looks for model.language_model.layers");
    refuses("GPTQModel", &of("llava_next", later), "it has no such model");
    refuses(
        "GPTQModel",
        &of("qwen3_vl", later),
        "of models with other parts llava, mistral3 were tried",
    );
    assert_eq!(verdict("GPTQModel", &of("qwen3_vl", later)).seen, Seen::Untried);
}

#[test]
fn the_nine_published_branches_have_the_published_matrix() {
    for (bits, group_size, act_order, expected) in [
        (4, Some(32), true, FOUR_BITS_ACT),
        (4, Some(64), true, FOUR_BITS_ACT),
        (4, Some(128), true, FOUR_BITS_ACT),
        (4, Some(128), false, FOUR_BITS),
        (4, None, true, FOUR_BITS_NO_GROUPS),
        (3, Some(64), true, THREE_BITS),
        (3, Some(128), true, THREE_BITS),
        (3, Some(128), false, THREE_BITS),
        (3, None, true, THREE_BITS),
    ] {
        let facts = published(bits, group_size, act_order);
        let found = verdicts(&facts);
        assert_eq!(
            refusing(&facts),
            expected,
            "{bits} bits, {group_size:?}, {act_order}: {found:#?}"
        );
        assert!(found.iter().all(|v| v.loads || !v.reasons.is_empty()));

        let remark = |loader: &str, text: &str| {
            verdict(loader, &facts).reasons.iter().any(|r| r.contains(text))
        };
        assert!(remark("AutoGPTQ 0.4", "inject_fused_attention=False"));
        let reordered = act_order && group_size.is_some();
        assert_eq!(remark("AutoGPTQ 0.4", "2048 tokens"), bits == 4 && reordered);
        assert_eq!(remark("transformers", "slow"), bits == 3);
        assert_eq!(remark("vLLM 0.21 gptq", "buggy"), bits == 4);
        assert_eq!(remark("TGI", "Marlin"), bits == 4);
        refuses("GPTQ-for-LLaMa", &facts, "bias tensors");
    }
}

#[test]
fn the_modern_layout_of_an_early_llama_also_loads_in_gptq_for_llama() {
    let modern = |bits| {
        let mut facts = published(bits, Some(128), false);
        (facts.bias, facts.frequencies) = (Bias::Absent, false);
        facts.architecture.grouped_heads = false;
        facts
    };
    assert!(verdicts(&modern(4)).iter().all(|v| v.loads));
    refuses("GPTQ-for-LLaMa", &modern(3), "3 bits");
    let mut later = modern(4);
    later.architecture.grouped_heads = true;
    later.architecture.rope.theta = 500_000.0;
    refuses("GPTQ-for-LLaMa", &later, "fewer key and value heads");
    refuses("GPTQ-for-LLaMa", &later, "rope_theta 500000: it takes it for 10000");
}

/// A checkpoint of another family, in the modern layout, as its own configuration says.
fn family(config: &str) -> LoaderFacts {
    let sizes = r#""hidden_size":4096,"intermediate_size":12288,"num_attention_heads":32,
        "num_key_value_heads":32,"num_hidden_layers":2,"vocab_size":32000"#;
    let text = format!("{{{sizes},{config}}}");
    let config = ModelConfig::parse(&text, std::path::Path::new("config.json")).unwrap();
    LoaderFacts {
        architecture: Architecture::from(&config),
        bias: Bias::Absent,
        frequencies: false,
        ..published(4, Some(128), false)
    }
}

#[test]
fn loaders_know_only_their_architectures() {
    let llama = |extra: &str| family(&format!(r#""model_type":"llama"{extra}"#));
    assert_eq!(refusing(&llama("")), [""; 0]);

    let early = ["AutoGPTQ 0.4", "ExLlama", "GPTQ-for-LLaMa"];
    assert_eq!(refusing(&family(r#""model_type":"mistral""#)), early);
    let qwen2 = family(r#""model_type":"qwen2""#);
    assert_eq!(refusing(&qwen2), early);
    refuses("AutoGPTQ 0.4", &qwen2, "qwen2: it computes llama only");
    refuses("ExLlama", &qwen2, "self_attn.q_proj has a bias of its own");
    let qwen3 = family(r#""model_type":"qwen3""#);
    assert_eq!(
        refusing(&qwen3),
        ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "ExLlama", "TGI", "GPTQ-for-LLaMa"]
    );
    refuses("TGI", &qwen3, "qwen3: it computes llama, mistral, qwen2 only");

    let biased = llama(r#","attention_bias":true"#);
    assert_eq!(refusing(&biased), ["ExLlama", "GPTQ-for-LLaMa"]);
    let scaled = |kind: &str| llama(&format!(r#","rope_scaling":{{"factor":8.0,{kind}}}"#));
    let llama3 = r#""rope_type":"llama3","low_freq_factor":1.0,"high_freq_factor":4.0,
        "original_max_position_embeddings":8192"#;
    assert_eq!(refusing(&scaled(llama3)), early);
    refuses(
        "AutoGPTQ 0.4",
        &scaled(llama3),
        "rotary scaling llama3: it reads linear, dynamic only",
    );
    refuses("ExLlama", &scaled(llama3), "rotary scaling llama3: it reads none");
    assert_eq!(refusing(&scaled(r#""type":"linear""#)), ["ExLlama", "GPTQ-for-LLaMa"]);
    assert_eq!(
        refusing(&scaled(r#""type":"dynamic""#)),
        ["ExLlama", "ExLlamaV2", "GPTQ-for-LLaMa"]
    );
}

/// The table is read in columns, and a verdict is to be traced.
#[test]
fn rows_are_short_and_name_a_release() {
    for loader in &LOADERS {
        assert!(loader.name.len() <= 16 && !loader.release.is_empty(), "{}", loader.name);
    }
}

#[test]
fn every_rule_has_its_reason() {
    let good = published(4, Some(128), false);
    let with = |change: &dyn Fn(&mut LoaderFacts)| {
        let mut facts = good.clone();
        change(&mut facts);
        facts
    };
    let group = |size| with(&|f| f.quantize.group_size = Some(size));
    for loader in ["vLLM 0.21 marlin", "vLLM 0.22-0.29", "vLLM 0.30"] {
        refuses(loader, &group(256), "group size 256");
    }
    assert!(verdict("ExLlamaV2", &group(256)).loads);
    // 8192 / 96 leaves a ragged group, which few kernels compute.
    for loader in ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "ExLlama", "vLLM 0.21 gptq", "TGI"] {
        refuses(loader, &group(96), "8192 inputs, no multiple of 96");
    }
    // Their widest kernel lists its sizes, and 48 is none of them.
    for (loader, size) in [("GPTQModel", 48), ("transformers", 96)] {
        refuses(loader, &group(size), &format!("group size {size}: its kernels take 16, 32"));
    }
    refuses("ExLlamaV2", &group(96), "power of two");

    let narrow = with(&|f| f.architecture.linears[1].out_features = 96);
    assert!(verdict("TGI", &narrow).reasons[0].contains("ExLlama or Triton"));
    // What Marlin does not take, Exllama's kernel does: the limit is not the method's.
    let short = with(&|f| f.architecture.linears[0].in_features = 8256);
    for loader in ["vLLM 0.21 marlin", "vLLM 0.22-0.29", "vLLM 0.30"] {
        assert!(verdict(loader, &narrow).loads);
        let why = "Marlin kernel: self_attn.q_proj has 8256 inputs, no multiple of 128; Exllama";
        refuses(loader, &short, why);
    }
    let mut whole = narrow.clone();
    whole.quantize.group_size = None;
    let why =
        "self_attn.k_proj has 96 outputs, no multiple of 64; Exllama kernel: it takes no file";
    refuses("vLLM 0.30", &whole, why);
    let wide = with(&|f| {
        f.act_order = true;
        f.architecture.linears[6].in_features = 1 << 17;
    });
    refuses("ExLlamaV2", &wide, "131072 inputs to reorder");

    let asymmetric = with(&|f| f.quantize.sym = false);
    refuses("vLLM 0.21 marlin", &asymmetric, "symmetric grids only");
    assert!(verdict("ExLlama", &asymmetric).loads);
    refuses("GPTQModel", &asymmetric, "asymmetric: it refuses such files");
    let mut stamped = asymmetric.clone();
    stamped.gptqmodel_stamp = true;
    assert!(verdict("GPTQModel", &stamped).loads);
    let mut zero = asymmetric;
    zero.zeros_of_zero = true;
    for loader in ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "ExLlama", "ExLlamaV2", "vLLM 0.21 gptq"] {
        refuses(loader, &zero, "zeros of 0: it adds one without wrapping and takes them for 16");
    }
    let v2 = with(&|f| {
        f.quantize.checkpoint_format = CheckpointFormat::GptqV2;
        f.zeros = CheckpointFormat::GptqV2;
    });
    for loader in ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "ExLlama", "vLLM 0.21 gptq", "TGI"] {
        refuses(loader, &v2, "gptq_v2");
    }
    assert!(verdict("GPTQModel", &v2).loads && verdict("ExLlamaV2", &v2).loads);

    // What the settings call the zeros, and what they are.
    let named_v1 = with(&|f| f.zeros = CheckpointFormat::GptqV2);
    for loader in ["AutoGPTQ 0.7", "transformers", "GPTQModel", "ExLlamaV2", "TGI"] {
        refuses(loader, &named_v1, "zeros are stored as they are, though the settings say gptq");
    }
    assert!(verdict("vLLM 0.30", &named_v1).loads, "it reads no zeros");
    let named_v2 = with(&|f| f.quantize.checkpoint_format = CheckpointFormat::GptqV2);
    refuses("GPTQModel", &named_v2, "zeros are stored minus one, though the settings say gptq_v2");
    assert!(verdict("ExLlama", &named_v2).loads, "it reads no settings");

    let absent = with(&|f| f.group_index = GroupIndex::Absent);
    assert!(verdict("ExLlama", &absent).loads);
    refuses("TGI", &absent, "no g_idx");
    let placeholder = with(&|f| f.group_index = GroupIndex::Placeholder);
    assert!(verdict("ExLlama", &placeholder).loads);
    for loader in ["AutoGPTQ 0.7", "transformers", "GPTQModel", "TGI"] {
        refuses(loader, &placeholder, "placeholder");
    }
    let dense = with(&|f| f.dense_linear = Some("mlp.down_proj".to_owned()));
    refuses("GPTQModel", &dense, "mlp.down_proj is dense");
    assert!(verdict("transformers", &dense).loads);
    let tied = with(&|f| f.head_only_tied = true);
    assert_eq!(refusing(&tied), ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "GPTQ-for-LLaMa"]);
    assert_eq!(verdict("AutoGPTQ 0.7", &tied).seen, Seen::Ran);
    assert_eq!(verdict("AutoGPTQ 0.4", &tied).seen, Seen::Code);

    let mut half = published(3, Some(128), false);
    assert!(!verdict("vLLM 0.21 gptq", &half).reasons.iter().any(|r| r.contains("--dtype")));
    half.bfloat16 = true;
    assert!(verdict("vLLM 0.21 gptq", &half).reasons.iter().any(|r| r.contains("--dtype float16")));
    let mut fallback = narrow;
    fallback.bfloat16 = true;
    assert!(verdict("vLLM 0.30", &fallback).reasons[0].contains("--dtype float16"));

    refuses("ONNX Runtime", &published(8, Some(128), true), "act-order with 8 bits");
    refuses("ONNX Runtime", &group(512), "powers of two from 16 to 256");
    let apart = with(&|f| f.shared_order = false);
    for loader in ["vLLM 0.21 marlin", "vLLM 0.21 gptq", "TGI", "GPTQ-for-LLaMa"] {
        refuses(loader, &apart, "differ in g_idx");
    }
    let biased = with(&|f| f.bias = Bias::Values);
    for loader in ["transformers", "GPTQModel", "ExLlama", "ExLlamaV2", "vLLM 0.21 gptq", "TGI"] {
        refuses(loader, &biased, "biases that are not zero");
    }
    let frequencies = with(&|f| f.bias = Bias::Absent);
    refuses("GPTQ-for-LLaMa", &frequencies, "inv_freq");

    refuses("AutoGPTQ 0.4", &with(&|f| f.quantize_config = None), "no quantize_config.json");
    let unknown = with(&|f| f.quantize_config = Some(vec!["quant_method".to_owned()]));
    refuses("AutoGPTQ 0.4", &unknown, "unknown key quant_method");
    refuses("transformers", &with(&|f| f.quantization_config = false), "quantization_config");
    let nothing = with(&|f| {
        f.quantization_config = false;
        f.quantize_config = None;
    });
    refuses("vLLM 0.21 gptq", &nothing, "no file says");
    let named = with(&|f| f.file_stem = "gptq_model-4bit-128g".to_owned());
    refuses("transformers", &named, "gptq_model-4bit-128g.safetensors");
    refuses("transformers", &with(&|f| f.pt_metadata = false), "format = pt");
    refuses("AutoGPTQ 0.4", &with(&|f| f.sharded = true), "sharded");
}

/// What no program was seen to do is not said of it.
#[test]
fn types_that_nobody_was_seen_to_read_are_told() {
    let mut facts = published(4, Some(128), false);
    let taken = verdicts(&facts);
    facts.other_types = vec!["scales stored as F32".to_owned(), "g_idx stored as I64".to_owned()];
    for (before, now) in taken.iter().zip(verdicts(&facts)) {
        assert_eq!(now.loads, before.loads);
        let told =
            now.reasons.iter().filter(|reason| reason.starts_with("not checked with")).count();
        assert_eq!(told, if now.loads { 2 } else { 0 }, "{now:?}");
    }
}
