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
            let made = quantize(&dir, name, &out, &[recipe, &["--strict"]].concat());
            made.ok();
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
        let said = warnings.filter(|line| line.contains("ties") && line.contains(HEAD)).count();
        assert_eq!(said, 1, "{}", outcome.stderr);
    };

    let measured = ppl(&dir, "tied", &[]);
    warned(&measured);
    assert_eq!(measured.ok(), ppl(&dir, "model", &[]).ok());
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

    let told = dir.gptq(&["inspect", "tied"]);
    assert!(told.ok().contains("though config.json ties it"), "{}", told.stdout);
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
    let text = "model = \"embedding\"\ncalibration = \"card\"\nLAYOUT\n\
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
