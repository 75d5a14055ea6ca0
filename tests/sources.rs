//! Dense folders as they are found in the wild: which tensor is the head, what is no part of the
//! model, what is carried over and what is left behind.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use util::runs::{CALIBRATION, perplexity, ppl, with_model};
use util::{Outcome, TinyLlama, Workdir};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Settings under which the head is copied, turned and fitted.
const RECIPES: [&[&str]; 4] = [
    &["--recipe", "autogptq"],
    &["--recipe", "rtn", "--layout", "card"],
    &["--recipe", "best"],
    &["--recipe", "best", "--set", "rotate=heads", "--set", "head=0"],
];

fn quantize(dir: &Workdir, model: &str, out: &str, options: &[&str]) -> Outcome {
    let fixed = ["quantize", model, "--out", out, "--group-size", "32"];
    dir.gptq(&[&fixed, &CALIBRATION[..], options].concat())
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(folder: &Path) -> Tensors {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// Changes a checkpoint's tensors and configuration, and forgets the sums by which any change shows.
fn rewrite(folder: &Path, edit: impl FnOnce(&mut Tensors, &mut Value)) {
    let path = folder.join("model.safetensors");
    let metadata = SafeTensors::read_metadata(&fs::read(&path).unwrap()).unwrap().1;
    let metadata: Option<HashMap<String, String>> = metadata.metadata().clone();
    let (mut all, mut config) = (tensors(folder), json_file(&folder.join("config.json")));
    edit(&mut all, &mut config);
    let views = all.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, metadata).unwrap()).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::remove_file(folder.join("gptq_manifest.json")).unwrap();
}

/// The same model four ways: both tables in the file and not tied; tied, with one table under the
/// embedding's or the head's name; tied, with both.
fn one_table() -> [(&'static str, TinyLlama); 4] {
    let mut untied = TinyLlama::new();
    let table = untied.tensor(EMBEDDING).clone();
    untied.tensors.insert(HEAD.to_owned(), table);
    let mut both = untied.clone();
    both.config["tie_word_embeddings"] = json!(true);
    let (mut embedding, mut head) = (both.clone(), both.clone());
    embedding.tensors.remove(HEAD).unwrap();
    head.tensors.remove(EMBEDDING).unwrap();
    [("untied", untied), ("embedding", embedding), ("head", head), ("both", both)]
}

/// Whatever the folder's form, what is written holds both tables and says so.
#[test]
fn a_tied_table_is_one_model_under_any_name() {
    let dir = Workdir::new();
    dir.write("text.txt", &util::words(400));
    for (name, model) in one_table() {
        model.write(&dir.path(name));
        assert_eq!(perplexity(&dir, name, &[]), perplexity(&dir, "untied", &[]), "{name}");
        assert_eq!(ppl(&dir, name, &[]).stderr.matches("warning").count(), 0, "{name}");
        for (index, recipe) in RECIPES.into_iter().enumerate() {
            let (out, wanted) = (format!("{name}.{index}"), format!("untied.{index}"));
            let made = quantize(&dir, name, &out, recipe);
            made.ok();
            assert!(!made.stderr.contains("ties"), "{}", made.stderr);
            let (mine, theirs) = (tensors(&dir.path(&out)), tensors(&dir.path(&wanted)));
            assert!(mine == theirs, "{out} is another model than {wanted}");
            assert!(mine.contains_key(HEAD) && mine.contains_key(EMBEDDING));
            let config = json_file(&dir.path(&out).join("config.json"));
            assert_eq!(config["tie_word_embeddings"], false, "{out}");
            dir.gptq(&["verify", &out, "--base", name]).ok();
        }
    }
}

/// Files of tied models that others made, and that this program made before it wrote the head.
#[test]
fn tied_gptq_files_are_sound() {
    let dir = Workdir::new();
    dir.write("text.txt", &util::words(400));
    let [_, (name, model), ..] = one_table();
    model.write(&dir.path(name));
    for (out, kept) in [("one", None), ("other", Some(EMBEDDING)), ("copy", Some(HEAD))] {
        quantize(&dir, name, out, &["--recipe", "autogptq"]).ok();
        let measured = perplexity(&dir, out, &[]);
        rewrite(&dir.path(out), |tensors, config| {
            config["tie_word_embeddings"] = json!(true);
            match kept {
                None => drop(tensors.remove(HEAD).unwrap()),
                Some(EMBEDDING) => drop(tensors.remove(EMBEDDING).unwrap()),
                Some(_) => {}
            }
        });
        assert_eq!(perplexity(&dir, out, &[]), measured, "{out}");
        dir.gptq(&["verify", out, "--base", name]).ok();
    }
}

/// transformers 5 takes the stored head, earlier ones and vLLM the embedding: one is chosen here, for
/// every command and recipe, and it is said.
#[test]
fn a_head_beside_a_config_that_ties_is_the_models_head() {
    let mut model = TinyLlama::new();
    let dir = with_model(&model);
    model.config["tie_word_embeddings"] = json!(true);
    model.write(&dir.path("tied"));
    let warned = |outcome: &Outcome| {
        let warnings = outcome.stderr.lines().filter(|line| line.starts_with("warning: "));
        let count = warnings.filter(|line| line.contains("ties") && line.contains(HEAD)).count();
        assert_eq!(count, 1, "{}", outcome.stderr);
    };

    let measured = ppl(&dir, "tied", &[]);
    warned(&measured);
    measured.ok();
    assert_eq!(perplexity(&dir, "tied", &[]), perplexity(&dir, "model", &[]));
    for (index, recipe) in RECIPES.into_iter().enumerate() {
        let (out, wanted) = (format!("out.{index}"), format!("wanted.{index}"));
        let made = quantize(&dir, "tied", &out, recipe);
        made.ok();
        warned(&made);
        quantize(&dir, "model", &wanted, recipe).ok();
        let (mine, theirs) = (tensors(&dir.path(&out)), tensors(&dir.path(&wanted)));
        assert!(mine == theirs, "{recipe:?}");
        let verified = dir.gptq(&["verify", &out, "--base", "tied"]);
        verified.ok();
        warned(&verified);
    }
    quantize(&dir, "tied", "strict", &["--strict"]).refused(&["ties", HEAD, "--strict"]);
    assert!(!dir.path("strict").exists());

    let inspected = dir.gptq(&["inspect", "tied"]);
    assert!(inspected.ok().contains("though config.json ties it"), "{}", inspected.stdout);
    // A GPTQ file of this form is two models.
    rewrite(&dir.path("out.0"), |_, config| config["tie_word_embeddings"] = json!(true));
    let found = dir.gptq(&["verify", "out.0"]);
    assert_eq!(found.code, 1, "{}", found.stdout);
    assert!(found.stdout.contains("config.json ties the head"), "{}", found.stdout);
}

#[test]
fn a_lost_or_changed_head_is_found() {
    let mut model = TinyLlama::new();
    let dir = with_model(&model);
    model.config["tie_word_embeddings"] = json!(true);
    model.write(&dir.path("tied"));
    let finds = |base: &str, out: &str, what: &str| {
        let found = dir.gptq(&["verify", out, "--base", base]);
        assert_eq!(found.code, 1, "{}", found.stdout);
        let named = |line: &str| line.starts_with(HEAD) && line.contains(what);
        assert!(found.stdout.lines().any(named), "{}", found.stdout);
    };
    for recipe in RECIPES {
        for base in ["model", "tied"] {
            fs::remove_dir_all(dir.path("out")).ok();
            quantize(&dir, base, "out", recipe).ok();
            rewrite(&dir.path("out"), |tensors, _| {
                let embedding = tensors[EMBEDDING].clone();
                tensors.insert(HEAD.to_owned(), embedding);
            });
            finds(base, "out", "differs from the base's");
            fs::remove_dir_all(dir.path("out")).unwrap();
            quantize(&dir, base, "out", recipe).ok();
            rewrite(&dir.path("out"), |tensors, config| {
                tensors.remove(HEAD).unwrap();
                config["tie_word_embeddings"] = json!(true);
            });
            finds(base, "out", "is missing");
        }
    }
}

#[test]
fn the_plan_of_a_tied_model_has_its_head() {
    let dir = Workdir::new();
    dir.write("text.txt", &util::words(400));
    let [_, (name, model), ..] = one_table();
    model.write(&dir.path(name));
    let text = "model = \"embedding\"\ncalibration = \"card\"\nrecipe = \"best\"\nLAYOUT\n\
                [calibration_overrides]\ndataset = \"text.txt\"\nwindows = 4\nseq_len = 32\n\
                [[branch]]\nname = \"a\"\nrecipe = \"autogptq\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
                [[branch]]\nname = \"r\"\nrecipe = \"rtn\"\nbits = 3\ngroup_size = 32\nact_order = false\n\
                [[branch]]\nname = \"b\"\nrecipe = \"best\"\nbits = 4\ngroup_size = 64\nact_order = true\n";
    for layout in ["modern", "card"] {
        dir.write("sweep.toml", &text.replace("LAYOUT", &format!("layout = \"{layout}\"")));
        let plan = dir.gptq(&["plan", name, "--config", "sweep.toml", "--json"]).json();
        dir.gptq(&["sweep", "sweep.toml", "--device=cpu", "--out", layout]).ok();
        for row in plan.as_array().unwrap() {
            let branch = dir.path(layout).join(row["branch"].as_str().unwrap());
            let bytes = fs::metadata(branch.join("model.safetensors")).unwrap().len();
            assert_eq!(row["file_bytes"], bytes, "{layout}: {row}");
            assert!(tensors(&branch).contains_key(HEAD));
        }
    }
}

/// Both commands succeed and warn in a line that names all of `names`; `--strict` refuses.
#[track_caller]
fn warns_of(dir: &Workdir, names: &[&str]) {
    let warned = |outcome: &Outcome| {
        let named = |line: &&str| {
            line.starts_with("warning: ") && names.iter().all(|name| line.contains(name))
        };
        assert_eq!(outcome.stderr.lines().filter(named).count(), 1, "{}", outcome.stderr);
    };
    for recipe in ["autogptq", "best", "rtn"] {
        fs::remove_dir_all(dir.path("out")).ok();
        let made = quantize(dir, "model", "out", &["--recipe", recipe]);
        made.ok();
        warned(&made);
        let verified = dir.gptq(&["verify", "out", "--base", "model"]);
        verified.ok();
        warned(&verified);
    }
    let measured = ppl(dir, "model", &[]);
    measured.ok();
    warned(&measured);
    let inspected = dir.gptq(&["inspect", "model"]);
    inspected.ok();
    warned(&inspected);
    quantize(dir, "model", "strict", &["--strict"]).refused(&[names, &["--strict"]].concat());
}

#[test]
fn blocks_that_the_configuration_leaves_out_are_named() {
    let mut model = TinyLlama::new();
    let plain = with_model(&model);
    for (name, weights) in model.tensors.clone() {
        if let Some(rest) = name.strip_prefix("model.layers.1.") {
            model.tensors.insert(format!("model.layers.2.{rest}"), weights);
        }
    }
    // As blocks that predict further tokens have them.
    let norm = model.tensor("model.norm.weight").clone();
    model.tensors.insert("model.layers.2.enorm.weight".to_owned(), norm);
    let dir = with_model(&model);
    warns_of(&dir, &["num_hidden_layers 2", "10 tensors", "model.layers.2."]);
    assert_eq!(perplexity(&dir, "model", &[]), perplexity(&plain, "model", &[]));
    let listed = dir.gptq(&["inspect", "model", "--json"]).json();
    let left_out = listed["left_out"].as_array().unwrap();
    assert_eq!(left_out.len(), 10);
    assert!(left_out.contains(&json!("model.layers.2.enorm.weight")));
}

#[test]
fn tensors_outside_of_the_model_are_named() {
    let mut model = TinyLlama::new();
    let norm = model.tensor("model.norm.weight").clone();
    let lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    for name in ["score.weight", lora, "model.layers.0.self_attn.rotary_emb.inv_freq"] {
        model.tensors.insert(name.to_owned(), norm.clone());
    }
    let dir = with_model(&model);
    warns_of(&dir, &["2 tensors", "adapter that was not merged"]);
    let listed = dir.gptq(&["inspect", "model"]);
    for name in ["score.weight", lora] {
        assert!(listed.ok().contains(name), "{}", listed.stdout);
    }
    assert!(!listed.stdout.contains("inv_freq"), "{}", listed.stdout);
}

/// What would change the model is refused by all, in the same words.
#[test]
fn parts_of_blocks_that_nothing_computes_are_refused_by_all() {
    let lora = "model.layers.0.self_attn.q_proj.lora_A.default.weight";
    for (name, advice) in
        [(lora, "merge_and_unload"), ("model.layers.1.mlp.router.weight", "llama")]
    {
        let mut model = TinyLlama::new();
        let norm = model.tensor("model.norm.weight").clone();
        model.tensors.insert(name.to_owned(), norm);
        let dir = with_model(&model);
        quantize(&dir, "model", "out", &[]).refused(&[name, advice]);
        ppl(&dir, "model", &[]).refused(&[name, advice]);
        dir.gptq(&["inspect", "model"]).refused(&[name, advice]);
    }
}

/// transformers with PEFT loads the base that adapter_config.json names, in place of the output.
#[test]
fn what_training_left_behind_stays_behind() {
    let dir = with_model(&TinyLlama::new());
    let left =
        ["adapter_config.json", "trainer_state.json", "latest", "wandb/run.txt", "runs/x.txt"];
    for name in left.into_iter().chain(["LICENSE", "chat_template.jinja"]) {
        dir.write(&format!("model/{name}"), "{}");
    }
    quantize(&dir, "model", "out", &[]).ok();
    let made = util::listing(&dir.path("out"));
    assert!(["LICENSE", "chat_template.jinja"].iter().all(|name| made.contains(&(*name).into())));
    for name in left {
        let name = name.split('/').next().unwrap();
        assert!(!made.contains(&name.to_owned()), "{name} was carried over");
    }
}

#[test]
fn settings_left_over_dense_weights_are_ignored_with_a_warning() {
    let plain = with_model(&TinyLlama::new());
    quantize(&plain, "model", "out", &[]).ok();
    for (settings, method) in [
        (json!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "bitsandbytes"),
        (json!({"load_in_8bit": true}), "remove quantization_config"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 128}), "gptq"),
    ] {
        let mut model = TinyLlama::new();
        model.config["quantization_config"] = settings;
        let dir = with_model(&model);
        warns_of(&dir, &["dense", method]);
        fs::remove_dir_all(dir.path("out")).unwrap();
        quantize(&dir, "model", "out", &[]).ok();
        assert!(tensors(&dir.path("out")) == tensors(&plain.path("out")));
        let config = json_file(&dir.path("out/config.json"));
        assert_eq!(config["quantization_config"]["quant_method"], "gptq");
        assert_eq!(config["quantization_config"]["load_in_4bit"], Value::Null);
    }
    // Where the weights are not dense, the settings count.
    let mut model = TinyLlama::new();
    model.config["quantization_config"] = json!({"quant_method": "bitsandbytes"});
    model.tensor("model.layers.0.mlp.up_proj.weight").dtype = Dtype::I32;
    quantize(&with_model(&model), "model", "out", &[]).refused(&["bitsandbytes"]);
}

#[test]
fn the_configuration_says_the_type_that_is_stored() {
    for (layout, from, wanted) in [
        ("modern", "bfloat16", "float16"),
        ("modern", "float32", "float16"),
        ("card", "bfloat16", "float16"),
        // As the published branches have it.
        ("card", "float32", "float32"),
    ] {
        for key in ["torch_dtype", "dtype"] {
            let mut model = TinyLlama::new();
            model.config.as_object_mut().unwrap().remove("torch_dtype");
            model.config[key] = json!(from);
            let dir = with_model(&model);
            quantize(&dir, "model", "out", &["--recipe", "rtn", "--layout", layout]).ok();
            let config = json_file(&dir.path("out/config.json"));
            assert_eq!(config[key], wanted, "{layout}");
            let other = if key == "dtype" { "torch_dtype" } else { "dtype" };
            assert_eq!(config.get(other), None);
        }
    }
}

#[test]
fn an_index_may_name_what_nobody_needs() {
    let model = TinyLlama::new();
    let dir = with_model(&model);
    let whole = perplexity(&dir, "model", &[]);
    fs::remove_dir_all(dir.path("model")).unwrap();
    let shards = model.write_sharded(&dir.path("model"), 2);
    let path = dir.path("model/model.safetensors.index.json");
    let mut index = json_file(&path);
    let shard = shards[1].file_name().unwrap().to_str().unwrap();
    index["weight_map"]["model.vision.weight"] = json!(shard);
    fs::write(&path, index.to_string()).unwrap();
    assert_eq!(perplexity(&dir, "model", &[]), whole);
    warns_of(&dir, &["the index names 1 tensor", "model.vision.weight"]);
}

#[test]
fn names_under_another_prefix_are_explained() {
    let rename = |change: &dyn Fn(&str) -> String| {
        let mut model = TinyLlama::new();
        model.tensors = model.tensors.into_iter().map(|(name, w)| (change(&name), w)).collect();
        with_model(&model)
    };
    let wrapped = rename(&|name| format!("base_model.model.{name}"));
    let bare = rename(&|name| name.trim_start_matches("model.").to_owned());
    for (dir, named) in [(wrapped, "`base_model.model.`"), (bare, "`embed_tokens.weight`")] {
        quantize(&dir, "model", "out", &[]).refused(&[named, EMBEDDING]);
        ppl(&dir, "model", &[]).refused(&[named, EMBEDDING]);
        dir.gptq(&["inspect", "model"]).refused(&[named, EMBEDDING]);
    }
}

#[test]
fn what_is_no_model_is_named() {
    let dir = with_model(&TinyLlama::new());
    dir.write("x.gguf", "GGUF and more");
    dir.write("folder/x.gguf", "GGUF and more");
    dir.write("adapter/adapter_config.json", "{}");
    dir.write("adapter/adapter_model.safetensors", "");
    dir.write("meta/params.json", "{}");
    dir.write("meta/consolidated.00.pth", "");
    for (name, what) in [
        ("x.gguf", "GGUF"),
        ("folder", "GGUF"),
        ("model/model.safetensors", "give the folder"),
        ("adapter", "adapter"),
        ("meta", "Meta's own format"),
    ] {
        ppl(&dir, name, &[]).refused(&[name, what]);
        quantize(&dir, name, "out", &[]).refused(&[name, what]);
        dir.gptq(&["plan", name]).refused(&[name, what]);
        dir.gptq(&["inspect", name]).refused(&[name, what]);
    }
    // A configuration may lie beside any of them.
    fs::copy(dir.path("model/config.json"), dir.path("folder/config.json")).unwrap();
    ppl(&dir, "folder", &[]).refused(&["folder", "GGUF"]);
    // Packed linears whose settings were lost.
    quantize(&dir, "model", "out", &[]).ok();
    fs::remove_file(dir.path("out/quantize_config.json")).unwrap();
    rewrite(&dir.path("out"), |_, config| {
        config.as_object_mut().unwrap().remove("quantization_config");
    });
    ppl(&dir, "out", &[]).refused(&[".qweight`", "quantize_config.json"]);
}

#[test]
fn byte_order_marks_are_skipped() {
    let model = TinyLlama::new();
    let dir = with_model(&model);
    let whole = perplexity(&dir, "model", &[]);
    fs::remove_dir_all(dir.path("model")).unwrap();
    model.write_sharded(&dir.path("model"), 2);
    dir.write("model/tokenizer_config.json", r#"{"bos_token": "<s>"}"#);
    let mark = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        fs::write(path, format!("\u{feff}{text}")).unwrap();
    };
    for name in
        ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
    {
        mark(&dir.path("model").join(name));
    }
    assert_eq!(perplexity(&dir, "model", &[]), whole);
    quantize(&dir, "model", "out", &[]).ok();
    fs::remove_file(dir.path("out/gptq_manifest.json")).unwrap();
    mark(&dir.path("out/config.json"));
    mark(&dir.path("out/quantize_config.json"));
    dir.gptq(&["verify", "out", "--base", "model"]).ok();
}

/// A run of hours must not be lost for what could be known before it.
#[test]
fn what_can_be_known_is_refused_before_the_first_block() {
    let norms = ["model.norm.weight", "model.layers.1.input_layernorm.weight"];
    for name in norms.into_iter().chain([HEAD, EMBEDDING]) {
        for recipe in RECIPES {
            for value in [1e6, f32::NAN] {
                let mut model = TinyLlama::new();
                model.tensor(name).values[3] = value;
                let dir = with_model(&model);
                let refused = quantize(&dir, "model", "out", recipe);
                refused.refused(&[name]);
                assert!(!refused.stderr.contains("block 1/"), "{}", refused.stderr);
                assert!(!dir.path("out").exists() && !dir.path("out.partial").exists());
            }
        }
    }
}

#[cfg(unix)]
#[test]
fn side_files_that_cannot_be_carried_are_refused_before_the_first_block() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let dir = with_model(&TinyLlama::new());
    let odd = dir.path("model").join(OsStr::from_bytes(b"note-\xff.txt"));
    fs::write(&odd, "x").unwrap();
    let refused = quantize(&dir, "model", "out", &[]);
    refused.refused(&["note-", "UTF-8"]);
    assert!(!refused.stderr.contains("block 1/"), "{}", refused.stderr);
    assert!(!dir.path("out.partial").exists());
    fs::remove_file(&odd).unwrap();
    quantize(&dir, "model", "out", &[]).ok();
}
