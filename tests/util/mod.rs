//! What the tests of the command share: running the built binary in a folder of its own, and
//! making Llama checkpoints small enough that a run takes milliseconds.

#[allow(dead_code, reason = "the tests of devices use it")]
pub(crate) mod gpus;
#[allow(dead_code, reason = "tests that need more than a computer use it")]
pub(crate) mod needs;
pub(crate) mod runs;
mod split_mix;
pub(crate) mod torch_file;
#[allow(dead_code, reason = "tests of the verifier use it")]
pub(crate) mod weight_file;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use torch_file::TorchFile;

/// Words of the tiny tokenizer, `<unk>` and `<s>` included.
const VOCABULARY: usize = 64;

/// The root of the repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// A folder that commands run in; gone when dropped.
pub(crate) struct Workdir(TempDir);

/// What a command left behind.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Workdir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn gptq(&self, args: &[&str]) -> Outcome {
        self.gptq_env(args, &[])
    }

    /// Runs the binary with nothing of the caller's environment but what is given.
    pub(crate) fn gptq_env(&self, args: &[&str], env: &[(&str, &str)]) -> Outcome {
        let output = Command::new(env!("CARGO_BIN_EXE_gptq"))
            .args(args)
            .current_dir(self.0.path())
            .env_clear()
            .env("NO_COLOR", "1")
            // Help is wrapped to the terminal's width.
            .env("COLUMNS", "100")
            // What is not there is not to be downloaded.
            .env("HF_HUB_OFFLINE", "1")
            .envs(env.iter().copied())
            .output()
            .unwrap();
        let dir = self.0.path().to_str().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().replace(dir, "[DIR]");
        Outcome {
            // A process that was killed has no code.
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

impl Outcome {
    /// The whole outcome as one text for a snapshot, seconds and peak memory replaced.
    pub(crate) fn snapshot(&self) -> String {
        let part = |name: &str, text: &str| {
            let text = text.trim_end();
            if text.is_empty() { String::new() } else { format!("--- {name}\n{text}\n") }
        };
        let text = part("stdout", &self.stdout) + &part("stderr", &self.stderr);
        format!("exit code {}\n{}", self.code, mask_numbers(&text))
    }

    /// Asserts success and gives stdout.
    #[track_caller]
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "stderr: {}", self.stderr);
        &self.stdout
    }

    /// Asserts success and reads stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(self.ok()).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    /// Asserts the user's fault, told in one line on stderr that holds every one of `names`.
    #[track_caller]
    pub(crate) fn refused(&self, names: &[&str]) {
        assert_eq!(self.code, 1, "stdout: {}stderr: {}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        let errors: Vec<&str> = self.stderr.lines().filter(|l| l.contains("error:")).collect();
        assert_eq!(errors.len(), 1, "{}", self.stderr);
        assert!(errors[0].starts_with("error: "), "{}", self.stderr);
        let hints = self.stderr.lines().filter(|line| line.starts_with("hint: "));
        let lines: Vec<&str> = errors.into_iter().chain(hints).collect();
        for name in names {
            let named = lines.iter().any(|line| line.contains(name));
            assert!(named, "`{name}` is not named in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// Replaces what differs from run to run: the numbers of `12.3 s` and `peak memory 10.1 MB`.
fn mask_numbers(text: &str) -> String {
    let mut words: Vec<String> = text.split(' ').map(str::to_owned).collect();
    for i in 1..words.len() {
        let unit = words[i].split(['\n', ',']).next().unwrap();
        let peak = i > 1 && words[i - 2] == "memory";
        if (unit == "s" || peak) && words[i - 1].parse::<f64>().is_ok() {
            words[i - 1] = "[N]".to_owned();
            words[i] = words[i].replacen("kB", "MB", 1);
        }
    }
    words.join(" ")
}

/// Numbers between -1 and 1 that are the same in every run.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> f32 {
        (split_mix::split_mix(&mut self.0) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A tensor of a tiny checkpoint.
#[derive(Clone)]
pub(crate) struct Weights {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// A dense Llama of two blocks, to be damaged before it is written.
#[derive(Clone)]
pub(crate) struct TinyLlama {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Weights>,
}

impl TinyLlama {
    /// Hidden size 64, MLP 96 (so that groups of 64 leave a ragged one), 4 query and 2 key-value
    /// heads, untied head.
    pub(crate) fn new() -> Self {
        Self::with_mlp(96)
    }

    pub(crate) fn with_mlp(mlp: usize) -> Self {
        let hidden = 64;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 1,
            "torch_dtype": "float32",
        });
        let mut model = Self { config, tensors: BTreeMap::new() };
        let mut noise = Noise::new(1);
        let mut add = |name: String, shape: &[usize], scale: f32, offset: f32| {
            let count = shape.iter().product();
            let values = (0..count).map(|_| offset + scale * noise.next()).collect();
            model
                .tensors
                .insert(name, Weights { dtype: Dtype::F32, shape: shape.to_vec(), values });
        };
        add("model.embed_tokens.weight".to_owned(), &[VOCABULARY, hidden], 1.0, 0.0);
        add("lm_head.weight".to_owned(), &[VOCABULARY, hidden], 0.3, 0.0);
        add("model.norm.weight".to_owned(), &[hidden], 0.1, 1.0);
        for block in 0..2 {
            let linears = [
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", hidden / 2, hidden),
                ("self_attn.v_proj", hidden / 2, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", mlp, hidden),
                ("mlp.up_proj", mlp, hidden),
                ("mlp.down_proj", hidden, mlp),
            ];
            for (name, rows, cols) in linears {
                add(format!("model.layers.{block}.{name}.weight"), &[rows, cols], 0.2, 0.0);
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("model.layers.{block}.{name}.weight"), &[hidden], 0.1, 1.0);
            }
        }
        model
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Weights {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Writes the model as one file.
    pub(crate) fn write(&self, dir: &Path) {
        self.write_small_files(dir);
        write_safetensors(&dir.join("model.safetensors"), Box::new(self.tensors.iter()));
    }

    /// Writes the model as one PyTorch file.
    pub(crate) fn write_bin(&self, dir: &Path) {
        self.write_small_files(dir);
        write_torch_file(&dir.join("pytorch_model.bin"), Box::new(self.tensors.iter()));
    }

    /// Writes the model as shards that an index names; gives their paths.
    pub(crate) fn write_sharded(&self, dir: &Path, shards: usize) -> Vec<PathBuf> {
        self.write_shards(dir, shards, ("model", "safetensors"), write_safetensors)
    }

    /// As [`Self::write_sharded`], as PyTorch files.
    pub(crate) fn write_bin_sharded(&self, dir: &Path, shards: usize) -> Vec<PathBuf> {
        self.write_shards(dir, shards, ("pytorch_model", "bin"), write_torch_file)
    }

    fn write_shards<'a>(
        &'a self,
        dir: &Path,
        shards: usize,
        (stem, extension): (&str, &str),
        write: fn(&Path, Part<'a>),
    ) -> Vec<PathBuf> {
        self.write_small_files(dir);
        let mut places = serde_json::Map::new();
        let mut paths = Vec::new();
        for shard in 0..shards {
            let name = format!("{stem}-{:05}-of-{shards:05}.{extension}", shard + 1);
            let part = || self.tensors.iter().skip(shard).step_by(shards);
            places.extend(part().map(|(tensor, _)| (tensor.clone(), json!(name))));
            paths.push(dir.join(&name));
            write(&paths[shard], Box::new(part()));
        }
        let index = json!({"metadata": {}, "weight_map": places});
        fs::write(dir.join(format!("{stem}.{extension}.index.json")), index.to_string()).unwrap();
        paths
    }

    pub(crate) fn write_small_files(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    }
}

/// Whole words `w2`, `w3`, … parted by white space.
pub(crate) fn tokenizer() -> Value {
    let mut vocabulary = serde_json::Map::new();
    vocabulary.insert("<unk>".to_owned(), json!(0));
    vocabulary.insert("<s>".to_owned(), json!(1));
    vocabulary.extend((2..VOCABULARY).map(|id| (format!("w{id}"), json!(id))));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    })
}

/// A text of so many tokens.
pub(crate) fn words(tokens: usize) -> String {
    let mut noise = Noise::new(2);
    let mut word = || format!("w{} ", 2 + ((noise.next() + 1.0) * 30.9) as usize);
    (0..tokens).map(|_| word()).collect()
}

/// Tensors of one file.
type Part<'a> = Box<dyn Iterator<Item = (&'a String, &'a Weights)> + 'a>;

fn write_torch_file(path: &Path, tensors: Part<'_>) {
    let mut file = TorchFile::default();
    for (name, w) in tensors {
        let (kind, size) = match w.dtype {
            Dtype::F32 => ("FloatStorage", 4),
            Dtype::BF16 => ("BFloat16Storage", 2),
            other => panic!("no storage for {other:?}"),
        };
        file.tensor(name, kind, size, &w.shape, encode(w.dtype, &w.values));
    }
    fs::write(path, file.bytes()).unwrap();
}

fn write_safetensors(path: &Path, tensors: Part<'_>) {
    let encoded: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = tensors
        .map(|(name, w)| (name.as_str(), w.dtype, w.shape.clone(), encode(w.dtype, &w.values)))
        .collect();
    let views = encoded.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::BF16 => {
            values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
        }
        Dtype::I32 => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
        other => panic!("no encoder for {other:?}"),
    }
}

/// Names in a folder, sorted.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every file below a folder by relative path, hidden ones of a sweep's own apart.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if !name.starts_with(".gptq-sweep/") {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Whether this process, and so its children, ignore SIGHUP, as under nohup.
#[allow(dead_code, reason = "each test binary uses a part of it")]
pub(crate) fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}
