//! Shards that come one after the other: read as others are, and deleted when they have been.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use gptq_checkpoint::{Checkpoint, Error};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::TempDir;

/// Blocks of the model, each with a shard of its own.
const BLOCKS: usize = 3;

/// A model of hidden size 32 in `dir`, and the names of each shard's tensors.
fn write_model(dir: &Path) -> Vec<Vec<String>> {
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 8, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let shapes = gptq_checkpoint::ModelConfig::load(dir).unwrap().block_linears(0);
    let mut shards = Vec::new();
    for block in 0..BLOCKS {
        let mut names: Vec<(String, Vec<usize>)> = shapes
            .iter()
            .map(|s| (format!("model.layers.{block}.{}.weight", s.name), vec![32, 32]))
            .collect();
        names.push((format!("model.layers.{block}.input_layernorm.weight"), vec![32]));
        if block == 0 {
            names.push(("model.embed_tokens.weight".to_owned(), vec![8, 32]));
        }
        shards.push(names);
    }
    shards.push(vec![("model.norm.weight".to_owned(), vec![32])]);
    let mut places = BTreeMap::new();
    for (index, names) in shards.iter().enumerate() {
        let file = shard(index);
        let values: Vec<(String, Vec<usize>, Vec<u8>)> = names
            .iter()
            .map(|(name, shape)| {
                let count: usize = shape.iter().product();
                let value = |i: usize| ((index * 7 + name.len() * 3 + i) % 97) as f32;
                let bytes = (0..count).flat_map(|i| value(i).to_le_bytes()).collect();
                (name.clone(), shape.clone(), bytes)
            })
            .collect();
        let views = values.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        fs::write(dir.join(&file), safetensors::serialize(views, None).unwrap()).unwrap();
        places.extend(names.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    let index = json!({"metadata": {}, "weight_map": places}).to_string();
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    shards.into_iter().map(|names| names.into_iter().map(|(name, _)| name).collect()).collect()
}

fn shard(index: usize) -> String {
    format!("model-{:05}-of-{:05}.safetensors", index + 1, BLOCKS + 1)
}

/// A store with all shards, and an empty folder that they come to as links into a cache.
struct Setting {
    store: TempDir,
    folder: TempDir,
    shards: Vec<Vec<String>>,
    /// Shards in the order in which they were asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Setting {
    fn new() -> Self {
        let (store, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let shards = write_model(store.path());
        for name in ["config.json", "model.safetensors.index.json"] {
            fs::copy(store.path().join(name), folder.path().join(name)).unwrap();
        }
        Self { store, folder, shards, asked: Arc::default() }
    }

    fn open(&self) -> Checkpoint {
        let (store, folder) = (self.store.path().to_owned(), self.folder.path().to_owned());
        let asked = Arc::clone(&self.asked);
        let bring = move |name: &str| {
            asked.lock().unwrap().push(name.to_owned());
            fs::create_dir_all(folder.join("blobs"))?;
            let blob = folder.join("blobs").join(name);
            fs::copy(store.join(name), &blob)?;
            Ok(std::os::unix::fs::symlink(blob, folder.join(name))?)
        };
        Checkpoint::open_arriving(self.folder.path(), Box::new(bring)).unwrap()
    }

    fn on_disk(&self) -> usize {
        let count = |dir: &Path| {
            let files = fs::read_dir(dir).into_iter().flatten();
            files.filter(|f| f.as_ref().unwrap().file_name() != "blobs").count()
        };
        // What the links lead to may be somebody else's, and stays.
        let asked = self.asked.lock().unwrap().len();
        assert_eq!(count(&self.folder.path().join("blobs")), asked);
        count(self.folder.path()) - 2
    }
}

#[test]
fn each_shard_comes_once_and_goes_with_its_last_linear() {
    let setting = Setting::new();
    let whole = Checkpoint::open(setting.store.path()).unwrap();
    let arriving = setting.open();
    assert!(arriving.names().eq(whole.names()));
    assert_eq!(setting.on_disk(), 0);
    for (index, names) in setting.shards.iter().enumerate() {
        let linears: Vec<&String> = names.iter().filter(|n| n.ends_with("_proj.weight")).collect();
        for name in names {
            let (one, other) = (arriving.tensor(name).unwrap(), whole.tensor(name).unwrap());
            assert_eq!((one.shape, one.dtype), (other.shape, other.dtype));
            assert_eq!(one.bytes, other.bytes, "{name}");
        }
        // A shard without linears has nothing to wait for.
        assert_eq!(setting.on_disk(), usize::from(!linears.is_empty()));
        for (given_up, name) in linears.iter().enumerate() {
            arriving.tensor(name).unwrap();
            arriving.discard(name).unwrap();
            let refused = arriving.tensor(name).unwrap_err();
            assert!(matches!(refused, Error::Discarded { .. }), "{refused}");
            assert_eq!(setting.on_disk(), usize::from(given_up + 1 < linears.len()));
        }
        assert_eq!(setting.asked.lock().unwrap().len(), index + 1);
    }
    // What is no linear is there to the end.
    for name in whole.names().filter(|name| !name.ends_with("_proj.weight")) {
        assert_eq!(arriving.tensor(name).unwrap().bytes, whole.tensor(name).unwrap().bytes);
    }
    assert_eq!(setting.asked.lock().unwrap().len(), BLOCKS + 1);
    assert!(matches!(arriving.tensor("x"), Err(Error::MissingTensor { .. })));
}

#[test]
fn what_is_wrong_with_a_shard_is_reported_when_it_comes() {
    let setting = Setting::new();
    let (first, second) = (&setting.shards[0][0], &setting.shards[1][0]);
    fs::remove_file(setting.store.path().join(shard(0))).unwrap();
    fs::copy(setting.store.path().join(shard(2)), setting.store.path().join(shard(1))).unwrap();
    let arriving = setting.open();
    let missing = arriving.tensor(first).unwrap_err();
    assert!(missing.to_string().contains(&shard(0)), "{missing}");
    assert!(matches!(missing, Error::Bring { .. }), "{missing}");
    // Others that wait for it get the same error, without another try.
    let again = arriving.tensor(first).unwrap_err();
    let cause = |error: &Error| error.source().unwrap().downcast_ref::<std::io::Error>().is_some();
    assert!(cause(&missing) && cause(&again), "{again:?}");
    assert_eq!(setting.asked.lock().unwrap().len(), 1);
    let wrong = arriving.tensor(second).unwrap_err();
    assert!(matches!(wrong, Error::IndexMismatch { .. }), "{wrong}");
    assert!(wrong.to_string().contains(&shard(1)), "{wrong}");
}
