//! Plans of memory for models whose sizes are counted by hand.

use gptq_quant::{Recipe, Rotate};

use super::*;

fn llama_70b() -> ModelConfig {
    let text = r#"{"model_type":"llama","hidden_size":8192,"intermediate_size":28672,
        "num_hidden_layers":80,"num_attention_heads":64,"num_key_value_heads":8,
        "vocab_size":32000,"max_position_embeddings":4096}"#;
    ModelConfig::parse(text, std::path::Path::new("config.json")).unwrap()
}

#[test]
fn a_larger_card_offloads_less() {
    let block = BlockSizes::of(&llama_70b());
    let work = |reference| Workload {
        held_out: 0,
        tokens: 128 * 4096,
        seq_len: 4096,
        extras: Extras { reference, ..Extras::default() },
        exact: false,
        shared_grams: 0,
    };
    let plan_gpu = |block, work, budget| plan_gpu(block, &[work], Tables::default(), budget);
    let plan = |gib: u64| plan_gpu(block, work(false), gib << 30);
    assert_eq!(plan(79).offload, Offload::default());
    let some = plan(48).offload;
    assert!(some.inputs > 0.1 && some.inputs < 0.9 && some.hidden == 0.0, "{some:?}");
    let most = plan(24).offload;
    assert!(most.inputs == 1.0 && most.hidden > 0.5, "{most:?}");
    assert!(plan(48).device_bytes <= 48 << 30);
    assert!(plan(24).device_bytes <= 24 << 30);
    // Host memory holds what the card does not: 30 GB of inputs and most of 17 GB of states.
    assert!(plan(24).host_bytes > 40_000_000_000);
    assert!(plan(79).host_bytes < 7_000_000_000);
    // A second stream of states is 17 GB more.
    let plan = |gib: u64| plan_gpu(block, work(true), gib << 30);
    assert!(plan(79).offload.inputs < 0.6 && plan(79).offload.hidden == 0.0);
    assert!(plan(24).device_bytes <= 24 << 30);
    // Solving from f32 takes the widest linear in f32 there, and a block in f32 here.
    let exact = plan_gpu(block, Workload { exact: true, ..work(false) }, 79 << 30);
    let rounded = plan_gpu(block, work(false), 79 << 30);
    assert_eq!(exact.device_bytes - rounded.device_bytes, 4 * 28672 * 8192);
    assert_eq!(exact.host_bytes - rounded.host_bytes, 4 * 855_638_016);
    // A Hessian of its own for v: a Gram and a factor of order 8192, and six matrices of a window in fp16.
    let attended = Extras { attended: true, ..Extras::default() };
    let attended = plan_gpu(block, Workload { extras: attended, ..work(false) }, 79 << 30);
    let of_values = 2 * 4 * 8192 * 8192 + 6 * 2 * 4096 * 8192;
    assert_eq!(attended.device_bytes - rounded.device_bytes, of_values);
}

/// Embedding and head of Llama 3.1 8B, 128,256 × 4096, of a gigabyte each.
#[test]
fn tables_outside_of_the_blocks_count() {
    let text = r#"{"model_type":"llama","hidden_size":4096,"intermediate_size":14336,
        "num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,
        "vocab_size":128256,"max_position_embeddings":131072}"#;
    let model = ModelConfig::parse(text, std::path::Path::new("config.json")).unwrap();
    let block = BlockSizes::of(&model);
    let table = 2 * 128_256 * 4096;
    let with = |recipe, rotate, stored| {
        let mut spec = QuantSpec::new(4, Some(128), true, 0.01, recipe);
        spec.choices.rotate = rotate;
        Tables::of(&model, &spec, stored, true)
    };
    let tables = |recipe, stored| with(recipe, Rotate::None, stored);
    // Turned for the walk; then a fitted head, and the embedding read and turned once more.
    let best = Tables { walking: table, writing: 4 * table };
    assert_eq!(with(Recipe::Best, Rotate::Full, FloatType::F16), best);
    // A learned rotation is there all the time.
    let matrix = 4 * 4096 * 4096;
    let learned = Tables { walking: table + matrix, writing: 4 * table + matrix };
    assert_eq!(with(Recipe::Best, Rotate::Learned, FloatType::F16), learned);
    let as_stored = Tables { walking: 0, writing: table };
    assert_eq!(tables(Recipe::AutoGptq, FloatType::F16), as_stored);
    let rounded = Tables { walking: table, writing: 3 * table };
    assert_eq!(tables(Recipe::AutoGptq, FloatType::BF16), rounded);
    let (extras, exact) = (Extras::default(), false);
    let work = |tokens, shared_grams| {
        let seq_len = 2048;
        Workload { tokens, held_out: 0, seq_len, extras, exact, shared_grams }
    };
    let cpu = |tokens, tables| plan_cpu(block, work(tokens, 0), tables);
    // Without windows what is written is the peak, with many the walk.
    assert!(cpu(0, best) < cpu(0, Tables::default()) + 4 * table as u64);
    assert!(cpu(0, best) > cpu(0, Tables::default()) + table as u64);
    let many = 1 << 20;
    assert_eq!(cpu(many, best), cpu(many, Tables::default()) + table as u64);
    let gpu = |grams| plan_gpu(block, &[work(many, grams)], best, 80 << 30);
    assert_eq!(gpu(2).device_bytes - gpu(0).device_bytes, 2 * 4 * 4096 * 4096);
    let without = plan_gpu(block, &[work(many, 0)], Tables::default(), 80 << 30);
    assert!(gpu(0).host_bytes >= without.host_bytes + table as u64);
}

/// Mixtral 8x7B and Qwen3 30B-A3B: of a token gate's inputs wait and two even shares of an expert's
/// activations, where a dense block of as many weights would keep its down's.
#[test]
fn experts_keep_what_gate_reads_and_one_experts_activations() {
    let model = |text: &str| {
        let text = format!(
            r#"{{{text},"vocab_size":32000,"max_position_embeddings":32768,
            "num_attention_heads":32,"num_hidden_layers":2,"head_dim":128}}"#
        );
        ModelConfig::parse(&text, std::path::Path::new("config.json")).unwrap()
    };
    let mixtral = model(
        r#""model_type":"mixtral","hidden_size":4096,"intermediate_size":14336,
        "num_key_value_heads":8,"num_local_experts":8,"num_experts_per_tok":2"#,
    );
    let qwen3 = model(
        r#""model_type":"qwen3_moe","hidden_size":2048,"intermediate_size":6144,
        "moe_intermediate_size":768,"num_key_value_heads":4,"num_experts":128,
        "num_experts_per_tok":8"#,
    );
    let sizes = BlockSizes::of(&mixtral);
    assert_eq!((sizes.kept, sizes.widest), (4096 + 14336 / 2, 14336));
    assert_eq!((sizes.intermediate, sizes.per_token), (14336, 2));
    let attention = 2 * 4096 * 4096 + 2 * 1024 * 4096;
    assert_eq!(sizes.weights, attention + 8 * 3 * 4096 * 14336);
    let sizes = BlockSizes::of(&qwen3);
    // o's inputs are wider than both.
    assert_eq!((sizes.kept, sizes.widest, sizes.intermediate), (4096, 4096, 768));
    let experts = qwen3.experts(0).unwrap();
    assert_eq!(kept_activations(experts, 262_144), 262_144 / 8 * 768);
    // No expert sees more than all tokens.
    let mut few = experts.clone();
    (few.count, few.per_token) = (3, 2);
    assert_eq!(kept_activations(&few, 100), 100 * 768);
    let work = Workload {
        held_out: 0,
        tokens: 128 * 2048,
        seq_len: 2048,
        extras: Extras::REFERENCE,
        exact: false,
        shared_grams: 0,
    };
    for model in [mixtral, qwen3] {
        let block = BlockSizes::of(&model);
        let plan = |gib: u64| plan_gpu(block, &[work], Tables::default(), gib << 30);
        assert_eq!(plan(79).offload, Offload::default());
        let all = plan(79).device_bytes;
        let kept = 2 * work.tokens as u64 * block.kept as u64;
        // What is kept is what goes first.
        let less = plan_gpu(block, &[work], Tables::default(), all);
        assert!(less.offload.inputs > 0.0 && less.offload.hidden == 0.0, "{less:?}");
        assert!(less.device_bytes <= all && all - less.device_bytes <= kept, "{less:?}");
        // A block without experts has no routes to keep in host memory.
        let dense = BlockSizes { per_token: 0, ..block };
        let dense = plan_gpu(dense, &[work], Tables::default(), 79 << 30);
        let routes = 8 * work.tokens as u64 * (block.per_token as u64 + 1);
        assert_eq!(plan(79).host_bytes - dense.host_bytes, routes);
    }
}

/// A window is never cut, so a chunk of one that is longer than a chunk takes more.
#[test]
fn long_windows_take_larger_chunks() {
    let block = BlockSizes::of(&llama_70b());
    let tokens = 4 * 131_072;
    let (extras, exact, shared_grams) = (Extras::default(), false, 0);
    let work = |seq_len| Workload { tokens, held_out: 0, seq_len, extras, exact, shared_grams };
    let tables = Tables::default();
    let device = |seq_len| plan_gpu(block, &[work(seq_len)], tables, 1 << 40).device_bytes;
    let host = |seq_len| plan_cpu(block, work(seq_len), tables);
    assert_eq!(device(16_384), device(4096));
    assert_eq!(host(4096), host(512));
    // Gate, up and their product, and hidden states thrice, of the tokens beyond.
    let more = (131_072 - 16_384) * (3 * 2 * 28_672 + 3 * 4 * 8192);
    assert!(device(131_072) - device(4096) <= more && device(131_072) > device(4096));
    let moving = |seq_len| GpuBytes::new(block, work(seq_len)).moving;
    assert_eq!(moving(131_072), 8 * moving(4096));
    assert_eq!(host(131_072) - host(4096), 4 * 2 * 28_672 * (131_072 - 4096));
}
