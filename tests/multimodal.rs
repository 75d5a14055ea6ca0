//! Multimodal models: what is carried beside the language model, and what settings mean that files say in
//! several places or forms, as transformers has it (tests/interop/settings.py).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "util/family_models.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod family_models;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{Checkpoint, ModelConfig, Rope};
use gptq_generate::StopTokens;
use gptq_text::tokens::TextTokenizer;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use util::weight_file::add_tensor;
use util::{Workdir, words};

/// Puts a model's folder together, with a tokenizer.
fn assemble(dir: &Workdir, name: &str) -> PathBuf {
    let folder = dir.path(name);
    family_models::assemble(&folder, name);
    fs::write(folder.join("tokenizer.json"), util::tokenizer().to_string()).unwrap();
    folder
}

/// The parts around a language model, in both ways in which files call it: carried bit for bit, counted, and
/// missed by `verify`; planned to the byte.
#[test]
fn other_parts_are_carried() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(1700));
    for (name, prefix) in
        [("llava", "model.language_model."), ("qwen2.5-vl", "model.language_model.")]
    {
        let source = assemble(&dir, name);
        let later = dir.path(&format!("{name}-later"));
        assemble_later(&source, &later, prefix);
        for model in [name.to_owned(), format!("{name}-later")] {
            let out = format!("{model}-4bit");
            let fixed =
                "--device=cpu --calib-dataset text.txt --windows=32 --seq-len=48 --recipe autogptq";
            // Whose language model has frequencies in the file, too.
            let layout = if model == *name { "modern" } else { "card" };
            let ours = format!("--bits 4 --group-size 32 --layout {layout}");
            let args = format!("quantize {model} --out {out} {ours} {fixed}");
            let run = dir.gptq(&args.split(' ').collect::<Vec<_>>());
            run.ok();
            assert!(
                run.stdout.contains("carried 3 tensors of other parts unchanged"),
                "{}",
                run.stdout
            );
            let bytes = fs::read(dir.path(&out).join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let given = fs::read(dir.path(&model).join("model.safetensors")).unwrap();
            let given = SafeTensors::deserialize(&given).unwrap();
            for (part, _, shape, values) in family_models::PARTS {
                let part = if model == *name { part.to_owned() } else { format!("model.{part}") };
                let (found, source) = (file.tensor(&part).unwrap(), given.tensor(&part).unwrap());
                assert_eq!(
                    (found.dtype(), found.shape(), found.data()),
                    (source.dtype(), shape, values)
                );
            }
            // The language model's names stay, too.
            let stem = |name: &str| name.rsplit_once('.').unwrap().0.to_owned();
            let stems = |file: &SafeTensors<'_>| -> std::collections::BTreeSet<String> {
                file.names().into_iter().map(&stem).collect()
            };
            let heads = ["lm_head", "language_model.lm_head"];
            let kept =
                |n: &String| !heads.contains(&n.as_str()) && !n.ends_with("self_attn.rotary_emb");
            let without = |file| stems(file).into_iter().filter(kept);
            assert!(without(&file).eq(without(&given)), "{model}");

            let config: Value =
                serde_json::from_slice(&fs::read(dir.path(&out).join("config.json")).unwrap())
                    .unwrap();
            let quantized = &config["quantization_config"];
            assert_eq!(quantized["block_name_to_quantize"], "model.language_model.layers");
            assert_eq!(config["tie_word_embeddings"], json!(false));
            let inspected = dir.gptq(&["inspect", &out, "--json"]).json();
            assert_eq!(inspected["part_of"], config["model_type"]);
            assert_eq!(
                (&inspected["other_parts"], &inspected["left_out"]),
                (&json!(3), &json!([]))
            );
            dir.gptq(&["verify", &out, "--base", &model]).ok();
            damaged(&dir, &out, &model);
        }
        let known = plan(&dir, name);
        assert_eq!(known["whole"], json!(true));
        let made = fs::metadata(dir.path(&format!("{name}-4bit/model.safetensors"))).unwrap().len();
        assert_eq!(known["file_bytes"], made);
        fs::remove_file(source.join("model.safetensors")).unwrap();
        let alone = plan(&dir, name);
        assert_eq!(alone["whole"], json!(false));
        let more = known["file_bytes"].as_u64().unwrap() - alone["file_bytes"].as_u64().unwrap();
        let parts: usize = family_models::PARTS.iter().map(|part| part.3.len()).sum();
        assert!(more > parts as u64 && more < 1000, "{more}");
    }
}

/// What `plan` says of the branch that is made here.
fn plan(dir: &Workdir, model: &str) -> Value {
    dir.write(
        "sweep.toml",
        &format!(
            "model = \"{model}\"\ncalibration = \"wikitext2\"\nrecipe = \"autogptq\"\n\
             [calibration_overrides]\ndataset = \"text.txt\"\nwindows = 32\nseq_len = 48\n\
             [[branch]]\nname = \"b\"\nbits = 4\ngroup_size = 32\nact_order = true\n"
        ),
    );
    dir.gptq(&["plan", model, "--config", "sweep.toml", "--json"]).json()[0].clone()
}

/// The same model with the names that transformers has given since.
fn assemble_later(source: &Path, later: &Path, prefix: &str) {
    fs::create_dir_all(later).unwrap();
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(source.join(file), later.join(file)).unwrap();
    }
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let opened = Checkpoint::open(source).unwrap();
    let renamed = file.tensors().into_iter().map(|(name, view)| {
        let plain = opened.config().plain_name(&name).map(std::borrow::Cow::into_owned);
        let name = match plain {
            Some(head) if head.starts_with("lm_head") => head,
            Some(plain) => format!("{prefix}{}", plain.strip_prefix("model.").unwrap()),
            None => format!("model.{name}"),
        };
        (name, view)
    });
    fs::write(later.join("model.safetensors"), safetensors::serialize(renamed, None).unwrap())
        .unwrap();
}

/// One bit of another part shows.
fn damaged(dir: &Workdir, out: &str, base: &str) {
    let file = dir.path(out).join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let (_, _, _, values) = family_models::PARTS[1];
    let at = bytes.windows(values.len()).position(|window| window == values).unwrap();
    bytes[at] ^= 1;
    fs::write(&file, &bytes).unwrap();
    // Not by sums: of a file of another program there are none.
    fs::remove_file(dir.path(out).join("gptq_manifest.json")).unwrap();
    let run = dir.gptq(&["verify", out, "--base", base]);
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stdout.contains("is not the base's, bit for bit"), "{}", run.stdout);
}

/// Other parts may hold anything, wherever they lie; what programs read in different ways is refused.
#[test]
fn other_parts_are_whole_and_nothing_else() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(1700));
    let ppl = |model: &str| {
        dir.gptq(&["ppl", model, "--device=cpu", "--dataset=text.txt", "--seq-len=48"])
    };
    let norm = "language_model.layers.0.input_layernorm.weight";
    for (alias, own) in [
        (norm, "language_model.model.layers.0.input_layernorm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.norm.weight", "language_model.model.norm.weight"),
    ] {
        add_tensor(&assemble(&dir, "llava"), alias, &[1.0; 64]);
        let run = ppl("llava");
        run.refused(&[alias, "is called as no others", own]);
        assert!(!run.stderr.contains("left out"), "{}", run.stderr);
    }
    // Whose head transformers 5 would draw at random.
    let folder = assemble(&dir, "smolvlm");
    let file = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(false);
    config["text_config"]["tie_word_embeddings"] = json!(true);
    fs::write(file, config.to_string()).unwrap();
    ppl("smolvlm").refused(&["`text_config.tie_word_embeddings` is `true`", "no `lm_head.weight`"]);

    let name = "qwen2.5-vl";
    let source = assemble(&dir, name);
    add_tensor(&source, "model.visual.mask", &[f32::NEG_INFINITY, 0.0]);
    let inspected = dir.gptq(&["inspect", name, "--json"]).json();
    assert_eq!((&inspected["other_parts"], &inspected["left_out"]), (&json!(4), &json!([])));
    let made = "quantize qwen2.5-vl --out made --bits 4 --group-size 32 --recipe rtn --device=cpu";
    dir.gptq(&made.split(' ').collect::<Vec<_>>()).ok();
    let verify = ["verify", "made", "--base", name];
    dir.gptq(&verify).ok();
    fs::remove_file(dir.path("made/gptq_manifest.json")).unwrap();
    dir.gptq(&verify).ok();
    let told = |change: &dyn Fn(&mut Value), says: &str| {
        let file = dir.path("made/config.json");
        let kept = fs::read(&file).unwrap();
        let mut config: Value = serde_json::from_slice(&kept).unwrap();
        change(&mut config);
        fs::write(&file, config.to_string()).unwrap();
        let run = dir.gptq(&verify);
        fs::write(&file, kept).unwrap();
        assert_eq!(run.code, 1, "{}", run.stdout);
        assert!(run.stdout.contains(says), "{says}: {}", run.stdout);
    };
    told(&|config| config["image_token_id"] = json!(3), "image_token_id");
    told(&|config| config["vision_config"]["depth"] = json!(77), "vision_config.depth");
    told(&|config| drop(config.as_object_mut().unwrap().remove("vision_config")), "vision_config");
    add_tensor(&dir.path("made"), "visual.more", &[1.0]);
    let run = dir.gptq(&verify);
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stdout.contains("is in no part of the base"), "{}", run.stdout);

    // Of a shard that holds more than the index says some programs read all.
    let (file, shard) =
        (source.join("model.safetensors"), source.join("model-00001-of-00001.safetensors"));
    let bytes = fs::read(&file).unwrap();
    let names = SafeTensors::deserialize(&bytes).unwrap();
    let named = names.names().into_iter().filter(|name| *name != "model.visual.mask");
    let map: serde_json::Map<_, _> =
        named.map(|name| (name.to_owned(), json!("model-00001-of-00001.safetensors"))).collect();
    fs::rename(file, shard).unwrap();
    fs::write(source.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string())
        .unwrap();
    ppl(name).refused(&["model.visual.mask", "the index does not name"]);
}

/// What no two readers take for the same is refused, and the rest is what transformers makes of it: of every
/// model that has another one in it, of settings in both of its places and in every form that files have had.
#[test]
fn settings_mean_what_they_mean_to_transformers() {
    let bytes = fs::read(util::repository().join("tests/fixtures/settings.json")).unwrap();
    let fixture: Value = serde_json::from_slice(&bytes).unwrap();
    let dir = Workdir::new();
    dir.write("tokenizer.json", &util::tokenizer().to_string());
    let tokenizer = TextTokenizer::open(&dir.path(""), 64).unwrap();
    let mut refused = Vec::new();
    let cases = fixture["cases"].as_array().unwrap();
    for case in cases {
        let (text, what) = (settings(case).to_string(), case.to_string());
        dir.write("config.json", &text);
        let config = ModelConfig::parse(&text, Path::new("config.json"));
        let config = match config {
            Err(error) => {
                let key = case["without"][0].as_str().unwrap();
                let named = ["rope_", "mrope_section", "tie_word_embeddings", "layer_types"];
                let says = error.to_string();
                assert!(named.iter().any(|name| says.contains(name)), "{what}: {says}");
                if case["error"].is_null() {
                    refused.push(format!("{} {key}: {says}", case["base"].as_str().unwrap()));
                }
                continue;
            }
            Ok(config) => config,
        };
        assert_eq!(case["error"], Value::Null, "transformers refuses {what}");
        if let Some(tied) = case["tied"].as_bool() {
            assert_eq!(config.tie_word_embeddings, tied, "{what}");
        }
        if let Some(ids) = case["eos"].as_array() {
            let found = StopTokens::find(&dir.path(""), None, &tokenizer).unwrap();
            assert_eq!(&found.ids.iter().map(|&id| json!(id)).collect::<Vec<_>>(), ids, "{what}");
        }
        if let Some(seen) = case["seen"].as_array() {
            // By the last of four tokens.
            let window = |block| config.block_attention(block).window.unwrap_or(4).min(4);
            let blocks = 0..config.num_hidden_layers;
            assert_eq!(&blocks.map(|b| json!(window(b))).collect::<Vec<_>>(), seen, "{what}");
        }
        if case["frequencies"].is_object() {
            let local = config.local_rope.as_ref();
            assert!(same(&config.rope, &case["frequencies"]["full"]), "{what}");
            let sliding = &case["frequencies"]["sliding"];
            assert!(local.map_or(sliding.is_null(), |rope| same(rope, sliding)), "{what}");
        }
    }
    // Refused although transformers 5 computes something: `null` for a boolean (1), sections that do not share
    // the pairs among three positions (9), settings that are silently without effect, overlaid, or read
    // otherwise by versions before (5 each of two Gemmas: `type` alone, without any type, two that
    // contradict, one for no kind of block; 8 of OLMo 3: these, and three with its base), and blocks that are
    // said to slide where no window holds (2 each of six families).
    assert_eq!((cases.len(), refused.len()), (318, 40), "{}", refused.join("\n"));
}

/// The config.json of a case: `settings` of tests/interop/settings.py.
fn settings(case: &Value) -> Value {
    let base = case["base"].as_str().unwrap();
    let text = fs::read_to_string(family_models::fixture(&format!("{base}.json"))).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let change = |keys: &mut Value, more: &Value| {
        let Some(keys) = keys.as_object_mut() else { return };
        for key in case["without"].as_array().unwrap() {
            keys.remove(key.as_str().unwrap());
        }
        keys.extend(more.as_object().unwrap().clone());
    };
    change(&mut config, &case["whole"]);
    change(&mut config["text_config"], &case["text"]);
    if config["text_config"].is_null() {
        config.as_object_mut().unwrap().remove("text_config");
    }
    config
}

/// Whether frequencies are those, which were rounded to seven digits.
fn same(rope: &Rope, expected: &Value) -> bool {
    let (here, there) = (rope.frequencies(3), expected.as_array().unwrap());
    let close = |(a, b): (&f32, &Value)| (f64::from(*a) / b.as_f64().unwrap() - 1.0).abs() < 1e-6;
    here.len() == there.len() && here.iter().zip(there).all(close)
}
