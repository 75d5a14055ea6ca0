//! The published matrix, and each rule on its own.

use gptq_checkpoint::{Bits, CheckpointFormat};

use super::*;

/// Whether each loader takes a branch, in the order of [`LOADERS`]; GPTQModel loads what
/// transformers loads with its kernels.
const FOUR_BITS: [bool; 10] = [true, true, true, true, true, true, true, true, true, false];
const THREE_BITS: [bool; 10] = [true, true, true, true, false, false, false, true, false, false];

/// A Llama 2 of 70B parameters, as its branches were published.
fn published(bits: u8, group_size: Option<usize>, act_order: bool) -> LoaderFacts {
    let config = r#"{"model_type":"llama","hidden_size":8192,"intermediate_size":28672,
        "num_attention_heads":64,"num_key_value_heads":8,"num_hidden_layers":80,
        "vocab_size":32000}"#;
    let config = ModelConfig::parse(config, std::path::Path::new("config.json")).unwrap();
    let quantize = QuantizeConfig::new(Bits::new(bits).unwrap(), group_size, 0.01, act_order);
    let keys = quantize.file_text(gptq_checkpoint::Layout::Card).unwrap();
    let keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&keys).unwrap();
    LoaderFacts {
        architecture: Architecture::from(&config),
        quantize,
        act_order: act_order && group_size.is_some(),
        shared_order: true,
        bias: Bias::Zero,
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

fn refuses(loader: &str, facts: &LoaderFacts, why: &str) {
    let verdict = verdict(loader, facts);
    assert!(!verdict.loads, "{verdict:?}");
    assert!(verdict.reasons.iter().any(|r| r.contains(why)), "`{why}` is not in {verdict:?}");
}

#[test]
fn the_nine_published_branches_have_the_published_matrix() {
    for (bits, group_size, act_order, expected) in [
        (4, Some(32), true, FOUR_BITS),
        (4, Some(64), true, FOUR_BITS),
        (4, Some(128), true, FOUR_BITS),
        (4, Some(128), false, FOUR_BITS),
        (4, None, true, FOUR_BITS),
        (3, Some(64), true, THREE_BITS),
        (3, Some(128), true, THREE_BITS),
        (3, Some(128), false, THREE_BITS),
        (3, None, true, THREE_BITS),
    ] {
        let facts = published(bits, group_size, act_order);
        let found = verdicts(&facts);
        let loads: Vec<bool> = found.iter().map(|v| v.loads).collect();
        assert_eq!(loads, expected, "{bits} bits, {group_size:?}, {act_order}: {found:#?}");
        assert!(found.iter().all(|v| v.loads || !v.reasons.is_empty()));

        let remark = |loader: &str, text: &str| {
            verdict(loader, &facts).reasons.iter().any(|r| r.contains(text))
        };
        assert!(remark("AutoGPTQ 0.4", "inject_fused_attention=False"));
        let reordered = act_order && group_size.is_some();
        assert_eq!(remark("AutoGPTQ 0.4", "2048 tokens"), bits == 4 && reordered);
        assert_eq!(remark("transformers", "slow"), bits == 3);
        assert_eq!(remark("vLLM gptq", "buggy"), bits == 4);
        assert_eq!(remark("TGI", "Marlin"), bits == 4);
        refuses("GPTQ-for-LLaMa", &facts, "bias tensors");
    }
}

#[test]
fn the_modern_layout_of_an_early_llama_also_loads_in_gptq_for_llama() {
    let modern = |bits| {
        let mut facts = published(bits, Some(128), true);
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

/// A checkpoint of another family, in the modern layout, as its own configuration tells.
fn family(config: &str) -> LoaderFacts {
    let sizes = r#""hidden_size":4096,"intermediate_size":12288,"num_attention_heads":32,
        "num_key_value_heads":32,"num_hidden_layers":2,"vocab_size":32000"#;
    let text = format!("{{{sizes},{config}}}");
    let config = ModelConfig::parse(&text, std::path::Path::new("config.json")).unwrap();
    LoaderFacts {
        architecture: Architecture::from(&config),
        bias: Bias::Absent,
        frequencies: false,
        ..published(4, Some(128), true)
    }
}

#[test]
fn loaders_know_only_their_architectures() {
    let refusing = |facts: &LoaderFacts| -> Vec<&str> {
        verdicts(facts).into_iter().filter(|v| !v.loads).map(|v| v.loader).collect()
    };
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

#[test]
fn every_rule_has_its_reason() {
    let good = published(4, Some(128), true);
    let with = |change: &dyn Fn(&mut LoaderFacts)| {
        let mut facts = good.clone();
        change(&mut facts);
        facts
    };
    let group = |size| with(&|f| f.quantize.group_size = Some(size));
    refuses("vLLM gptq_marlin", &group(256), "group size 256");
    assert!(verdict("ExLlamaV2", &group(256)).loads);
    // 8192 / 96 leaves a ragged group, which few kernels compute.
    for loader in ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "ExLlama", "vLLM gptq", "TGI"] {
        refuses(loader, &group(96), "8192 inputs, no multiple of 96");
    }
    refuses("ExLlamaV2", &group(96), "power of two");

    let narrow = with(&|f| f.architecture.linears[1].out_features = 96);
    refuses("vLLM gptq_marlin", &narrow, "self_attn.k_proj has 96 outputs, no multiple of 64");
    assert!(verdict("TGI", &narrow).reasons[0].contains("ExLlama or Triton"));
    let short = with(&|f| f.architecture.linears[0].in_features = 8256);
    refuses("vLLM gptq_marlin", &short, "self_attn.q_proj has 8256 inputs, no multiple of 128");
    let wide = with(&|f| f.architecture.linears[6].in_features = 1 << 17);
    refuses("ExLlamaV2", &wide, "131072 inputs to reorder");

    let asymmetric = with(&|f| f.quantize.sym = false);
    refuses("vLLM gptq_marlin", &asymmetric, "symmetric grids only");
    assert!(verdict("ExLlama", &asymmetric).loads);
    let v2 = with(&|f| f.quantize.checkpoint_format = CheckpointFormat::GptqV2);
    for loader in ["AutoGPTQ 0.4", "AutoGPTQ 0.7", "ExLlama", "vLLM gptq", "TGI"] {
        refuses(loader, &v2, "gptq_v2");
    }
    assert!(verdict("GPTQModel", &v2).loads && verdict("ExLlamaV2", &v2).loads);

    let apart = with(&|f| f.shared_order = false);
    for loader in ["vLLM gptq_marlin", "vLLM gptq", "TGI", "GPTQ-for-LLaMa"] {
        refuses(loader, &apart, "differ in g_idx");
    }
    let biased = with(&|f| f.bias = Bias::Values);
    for loader in ["transformers", "GPTQModel", "ExLlama", "ExLlamaV2", "vLLM gptq", "TGI"] {
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
    refuses("vLLM gptq", &nothing, "no file says");
    let named = with(&|f| f.file_stem = "gptq_model-4bit-128g".to_owned());
    refuses("transformers", &named, "gptq_model-4bit-128g.safetensors");
    refuses("transformers", &with(&|f| f.pt_metadata = false), "format = pt");
    refuses("AutoGPTQ 0.4", &with(&|f| f.sharded = true), "sharded");
}
