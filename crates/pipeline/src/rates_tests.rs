use std::collections::BTreeMap;

use gptq_checkpoint::Layout;
use gptq_quant::{Recipe, Rotate};
use gptq_records::source_dtype::SourceDtype;

use super::*;
use crate::cards::MEASURED_WITH;
use crate::operations::tests::{llama_70b, model};
use crate::plan::{Setting, plan_branch};

/// Without looks at the weights, which models of these sizes do without.
fn spec(recipe: Recipe) -> QuantSpec {
    let mut spec = QuantSpec::new(4, Some(128), true, recipe.damp(), recipe);
    if spec.choices.rotate == Rotate::Learned {
        spec.choices.rotate = Rotate::Full;
    }
    spec
}

fn planned(model: &ModelConfig, spec: &QuantSpec, gpu_memory: u64) -> BranchPlan {
    let (windows, seq_len) = MEASURED_WITH;
    let setting = Setting { windows, seq_len, shared_grams: 0, together: 1, gpu_memory };
    let (dtype, layout) = (SourceDtype::Fp16, Layout::Card);
    plan_branch(model, spec, dtype, layout, &BTreeMap::new(), setting).unwrap()
}

fn predicted(rates: &KnownRates, recipe: Recipe, gpu_memory: u64) -> Option<Prediction> {
    let (model, spec) = (llama_70b(), spec(recipe));
    rates.run(&model, &spec, &planned(&model, &spec, gpu_memory))
}

fn of_card(name: &str, recipe: Recipe) -> Prediction {
    let card: Card = name.parse().unwrap();
    predicted(&KnownRates::of_card(&card), recipe, 80 << 30).unwrap()
}

/// Eighty blocks as the card was measured, and what is outside of them.
#[test]
fn the_tables_cards_take_what_they_were_measured_to_take() {
    for (name, block) in [("H100", 3.37), ("h200", 3.41)] {
        let run = of_card(name, Recipe::AutoGptq);
        let outside = START_UP_GPU + 4.0 * 32000.0 * 8192.0 / TABLES_RATE;
        assert!((run.seconds - 80.0 * block - outside).abs() < 0.01, "{name}: {run:?}");
        assert_eq!(run.from, Source::Table);
        // 6.22 s a block.
        let best = of_card(name, Recipe::Best);
        let of_blocks = (best.seconds - outside) / 80.0;
        assert!((of_blocks / 6.22 - 1.0).abs() < 0.02, "{name}: {best:?}");
    }
    let (h100, a100) = (of_card("H100", Recipe::AutoGptq), of_card("A100", Recipe::AutoGptq));
    assert_eq!(a100.from, Source::DataSheet);
    assert!((a100.seconds / h100.seconds - 989.0 / 312.0).abs() < 0.1, "{a100:?}");
    assert!("H1000".parse::<Card>().unwrap_err().contains("H100, H200, A100"));
    assert!(Card::of_device("NVIDIA GeForce RTX 3090 Ti").is_none());
    assert!(Card::of_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb").is_none());
}

#[test]
fn what_is_unlike_the_measured_is_an_estimate() {
    let card: Card = "H100".parse().unwrap();
    let known = KnownRates::of_card(&card);
    // Activations wait in host memory.
    let offloaded = predicted(&known, Recipe::AutoGptq, 24 << 30).unwrap();
    assert_eq!(offloaded.from, Source::Offloaded);
    let two = KnownRates { ranks: 2, ..known.clone() };
    let shared = predicted(&two, Recipe::AutoGptq, 80 << 30).unwrap();
    assert_eq!(shared.from, Source::OneDevice);
    let one = predicted(&known, Recipe::AutoGptq, 80 << 30).unwrap();
    assert!(shared.seconds < 0.6 * one.seconds, "{shared:?}");
    let mut small = llama_70b();
    (small.hidden_size, small.intermediate_size) = (576, 1536);
    let spec = spec(Recipe::AutoGptq);
    let plan = planned(&small, &spec, 80 << 30);
    assert_eq!(known.run(&small, &spec, &plan).unwrap().from, Source::OtherWidth);
    // Rounding is not counted.
    assert_eq!(predicted(&known, Recipe::Rtn, 80 << 30), None);
    assert_eq!(predicted(&KnownRates::default(), Recipe::AutoGptq, 80 << 30), None);
}

#[test]
fn benchmarks_come_first_where_they_are_of_about_the_width() {
    let mut known = KnownRates::of_card(&"H100".parse().unwrap());
    let twice = |hidden: usize, ranks: usize| Entry {
        hidden,
        experts: false,
        ranks,
        rates: known.entries[0].rates.iter().map(|(&stage, rate)| (stage, rate * 2.0)).collect(),
        from: Source::Bench,
    };
    let (far, several, near) = (twice(256, 1), twice(8192, 2), twice(5120, 1));
    let table = predicted(&known, Recipe::AutoGptq, 80 << 30).unwrap();
    known.entries.extend([far, several]);
    assert_eq!(predicted(&known, Recipe::AutoGptq, 80 << 30), Some(table));
    known.entries.push(near);
    let bench = predicted(&known, Recipe::AutoGptq, 80 << 30).unwrap();
    assert_eq!(bench.from, Source::Bench);
    assert!((bench.seconds - (table.seconds - 80.0 * 3.37 / 2.0)).abs() < 0.01, "{bench:?}");
    // Trials for scales were not measured: the table knows them.
    known.entries.iter_mut().for_each(|entry| {
        if entry.from == Source::Bench {
            entry.rates.remove(&Stage::SolveTrial);
        }
    });
    let best = predicted(&known, Recipe::Best, 80 << 30).unwrap();
    assert_eq!(best.from, Source::Table);
}

/// Rates of dense blocks are no more than an estimate for experts, and the other way round.
#[test]
fn blocks_with_experts_have_rates_of_their_own() {
    let mixtral = model(
        r#"{"model_type":"mixtral","hidden_size":4096,"intermediate_size":14336,
        "num_hidden_layers":2,"num_attention_heads":32,"num_key_value_heads":8,
        "vocab_size":32000,"max_position_embeddings":32768}"#,
    );
    let spec = spec(Recipe::AutoGptq);
    let plan = planned(&mixtral, &spec, 141 << 30);
    let mut known = KnownRates::of_card(&"H100".parse().unwrap());
    let dense = known.run(&mixtral, &spec, &plan).unwrap();
    assert_eq!(dense.from, Source::OtherWidth);
    let half = known.entries[0].rates.iter().map(|(&stage, rate)| (stage, rate / 2.0)).collect();
    let (from, ranks) = (Source::Bench, 1);
    known.entries.push(Entry { hidden: 4096, experts: true, ranks, rates: half, from });
    let own = known.run(&mixtral, &spec, &plan).unwrap();
    assert_eq!(own.from, Source::Bench);
    let outside = START_UP_GPU + 4.0 * 32000.0 * 4096.0 / TABLES_RATE;
    let slower = (own.seconds - outside) / (dense.seconds - outside);
    assert!((slower - 2.0).abs() < 1e-9, "{own:?} {dense:?}");
    assert_eq!(predicted(&known, Recipe::AutoGptq, 80 << 30).unwrap().from, Source::Table);
}

/// Blocks of Mixtral and Qwen3 with 128 x 2048 tokens on an H200 (tests/bench/2026-11-29-tuned-scales.md): its
/// table gives back their seconds, of `best` but for what single runs differ by; and says nothing of dense
/// blocks that it would not say without them.
#[test]
fn an_h200_knows_blocks_with_experts() {
    let known = KnownRates::of_card(&"H200".parse().unwrap());
    let mixtral = r#""model_type":"mixtral","hidden_size":4096,"intermediate_size":14336,"num_key_value_heads":8,
        "vocab_size":32000"#;
    let qwen = r#""model_type":"qwen3_moe","hidden_size":2048,"intermediate_size":6144,"num_key_value_heads":4,
        "head_dim":128,"vocab_size":151936"#;
    for (text, measured) in [(mixtral, [2.0, 4.452]), (qwen, [1.711, 3.793])] {
        let model = model(&format!(r#"{{"num_hidden_layers":2,"num_attention_heads":32,{text}}}"#));
        for (recipe, seconds) in [Recipe::AutoGptq, Recipe::Best].into_iter().zip(measured) {
            let spec = spec(recipe);
            let setting = Setting {
                windows: 128,
                seq_len: 2048,
                shared_grams: 0,
                together: 1,
                gpu_memory: 141 << 30,
            };
            let plan = plan_branch(
                &model,
                &spec,
                SourceDtype::Fp16,
                Layout::Modern,
                &BTreeMap::new(),
                setting,
            );
            let predicted = known.run(&model, &spec, &plan.unwrap()).unwrap();
            let tables = 4.0 * model.vocab_size as f64 * model.hidden_size as f64 / TABLES_RATE;
            let block = (predicted.seconds - START_UP_GPU - tables) / 2.0;
            assert_eq!(predicted.from, Source::Table);
            assert!((block / seconds - 1.0).abs() < 0.06, "{block} for {seconds}");
        }
    }
    let mut dense = llama_70b();
    (dense.hidden_size, dense.intermediate_size) = (2048, 8192);
    let (spec, h100) = (spec(Recipe::AutoGptq), KnownRates::of_card(&"H100".parse().unwrap()));
    let plan = planned(&dense, &spec, 80 << 30);
    let [known, without] = [known, h100].map(|rates| rates.run(&dense, &spec, &plan).unwrap());
    assert_eq!((known.from, without.from), (Source::OtherWidth, Source::OtherWidth));
    assert!((known.seconds / without.seconds - 1.0).abs() < 0.05, "{known:?} {without:?}");
}

/// What is kept of a benchmark gives back its seconds.
#[test]
fn a_benchmark_predicts_itself() {
    let spec = spec(Recipe::Best);
    for width in ["tiny", "tiny-moe"] {
        predicts_itself(&spec, width);
    }
}

fn predicts_itself(spec: &QuantSpec, name: &str) {
    let (width, tokens): (Width, _) = (name.parse().unwrap(), (2, 512));
    let device = Device::Cpu;
    let bench =
        crate::bench::bench_block(&device, &gptq_compute::Ranks::alone(), width, tokens, spec);
    let bench = bench.unwrap();
    let record = measured(device_key(&device), spec, &bench);
    assert!(record.device.contains("threads") && record.width == name, "{record:?}");
    let counted = Operations::of_block(&width.kind(), tokens, Extras::REFERENCE);
    let seconds: f64 =
        by_stage(&counted, spec).iter().map(|(stage, count)| count / record.rates[stage]).sum();
    assert!((seconds / bench.seconds - 1.0).abs() < 1e-6, "{seconds} {}", bench.seconds);
}

#[test]
fn the_error_of_a_prediction_is_said() {
    let predicted = |seconds, from| Prediction { seconds, from };
    assert_eq!(
        compared(predicted(285.2, Source::Table), 291.0),
        "predicted 285 s, as such cards were measured; took 291 s (+2 %)"
    );
    assert_eq!(
        compared(predicted(4.0, Source::Bench), 3.0),
        "predicted 4.0 s, by what gptq bench measured on it; took 3.0 s (-25 %)"
    );
    assert!(Source::DataSheet.is_estimate() && !Source::Table.is_estimate());
}
