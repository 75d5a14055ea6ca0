//! The small files of a source that belong to every checkpoint made from it: tokenizer,
//! generation settings, chat template, licenses.
//!
//! What is carried is decided by what is not: weights in any format, configs that the writer makes
//! itself, the source's own README, hidden files, and what training left behind. A license may lie
//! in a folder of its own, so one level of folders is looked into.

use std::fs;
use std::path::{Path, PathBuf};

use crate::names::{
    CARD_FILE, CONFIG_FILE, INDEX_END, MANIFEST_FILE, QUANTIZE_CONFIG_FILE, REPORT_FILE,
};
use crate::partial::Partial;
use crate::small_file::read_small;
use crate::{Error, OutputError, Result};

/// Larger files are weights of some kind, whatever their name.
const MAX_BYTES: u64 = 64 << 20;

/// Extensions of weights and of archives of weights.
const WEIGHTS: [&str; 12] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "onnx",
    "h5",
    "msgpack",
    "tflite",
    "partial",
    // Shards that are on their way.
    "incomplete",
];

/// Files that are made for every checkpoint, or that describe the source only.
const NOT_CARRIED: [&str; 6] =
    [CONFIG_FILE, QUANTIZE_CONFIG_FILE, "quant_config.json", REPORT_FILE, MANIFEST_FILE, CARD_FILE];

/// What training leaves beside a model. An adapter's configuration would even replace the model:
/// transformers with PEFT then loads the base that it names.
const TRAINING: [&str; 8] = [
    "adapter_config.json",
    "trainer_state.json",
    "trainer_log.jsonl",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "latest",
    "zero_to_fp32.py",
];

/// Starts of the names of such files and folders.
const TRAINING_STARTS: [&str; 10] = [
    "optimizer",
    "scheduler",
    "rng_state",
    "training_args",
    "training_loss",
    "events.out.tfevents",
    "global_step",
    "checkpoint-",
    "wandb",
    "mlruns",
];

/// Folders of logs.
const LOGS: [&str; 3] = ["runs", "logs", "tensorboard"];

/// Copies the source's side files into the working folder.
pub(crate) fn carry(source: &Path, partial: &Partial) -> Result<()> {
    for name in names(source)? {
        if let Some(dir) = name.parent() {
            let to = partial.path().join(dir);
            fs::create_dir_all(&to).map_err(Error::io("create", &to))?;
        }
        copy(source, &name, partial)?;
    }
    Ok(())
}

/// The source's side files, relative to its folder, in a fixed order.
pub(crate) fn names(source: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for name in listed(source)? {
        let path = source.join(&name);
        let meta = fs::metadata(&path).map_err(Error::io("read", &path))?;
        if meta.is_file() && carried(&name, meta.len()) {
            names.push(recordable(source, name)?);
        } else if meta.is_dir() && carried_dir(&path, &name) {
            for inner in listed(&path)? {
                let (name, path) = (name.join(&inner), path.join(&inner));
                let meta = fs::metadata(&path).map_err(Error::io("read", &path))?;
                if meta.is_file() && carried(&name, meta.len()) {
                    names.push(recordable(source, name)?);
                }
            }
        }
    }
    Ok(names)
}

/// Manifests and the Hub know names in UTF-8 only.
fn recordable(source: &Path, name: PathBuf) -> Result<PathBuf> {
    match name.to_str() {
        Some(_) => Ok(name),
        None => Err(OutputError::FileName { path: source.join(name) }.into()),
    }
}

/// Copies contents only: the cache's files are links, and often read-only.
fn copy(source: &Path, name: &Path, partial: &Partial) -> Result<()> {
    let from = source.join(name);
    let bytes = read_small(&from).map_err(Error::io("read", &from))?;
    partial.write(name, &bytes)
}

/// Names in a folder, sorted, without dangling links.
fn listed(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        if entry.path().exists() {
            names.push(PathBuf::from(entry.file_name()));
        }
    }
    names.sort();
    Ok(names)
}

fn carried(path: &Path, bytes: u64) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    // The one hidden file that belongs to a repository says which files are stored as blobs.
    let hidden = name.starts_with('.') && name != ".gitattributes";
    !hidden
        && bytes <= MAX_BYTES
        && !NOT_CARRIED.contains(&&*name)
        && !is_of_training(&name)
        && !name.ends_with(INDEX_END)
        && !WEIGHTS.contains(&&*extension)
}

fn is_of_training(name: &str) -> bool {
    TRAINING.contains(&name) || TRAINING_STARTS.iter().any(|start| name.starts_with(start))
}

/// Folders that are no checkpoints themselves, such as an earlier output inside the source.
fn carried_dir(path: &Path, name: &Path) -> bool {
    let text = name.to_string_lossy();
    let hidden = text.starts_with('.') || is_of_training(&text) || LOGS.contains(&&*text);
    let weights = name.extension().is_some_and(|e| WEIGHTS.iter().any(|w| e == *w));
    !hidden && !weights && !path.join(CONFIG_FILE).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_are_carried_and_weights_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let yes = [
            "generation_config.json",
            "tokenizer.json",
            "tokenizer.model",
            "chat_template.jinja",
            "LICENSE.txt",
            "Notice",
            ".gitattributes",
            "LLAMA 2 LICENSE/LICENSE.txt",
        ];
        let no = [
            "config.json",
            "quantize_config.json",
            "README.md",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "training_args.bin",
            ".DS_Store",
            ".cache/x",
            "original/consolidated.00.pth",
            "quantized/config.json",
            "quantized/tokenizer.json",
            "a/b/too_deep.txt",
            "adapter_config.json",
            "trainer_state.json",
            "optimizer.json",
            "latest",
            "wandb/run.log",
            "runs/events.txt",
            "global_step100/zero.txt",
            "checkpoint-500/trainer_state.json",
        ];
        for name in yes.iter().chain(&no) {
            let path = source.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, name).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", source.join("dangling.txt")).unwrap();
        let read_only = source.join("tokenizer.json");
        let mut mode = fs::metadata(&read_only).unwrap().permissions();
        mode.set_readonly(true);
        fs::set_permissions(&read_only, mode).unwrap();

        // The output may lie inside the source; it is not carried into itself.
        let partial = Partial::create(&source.join("out")).unwrap();
        carry(&source, &partial).unwrap();
        for name in yes {
            let to = partial.path().join(name);
            assert_eq!(fs::read_to_string(&to).unwrap(), name);
            assert!(!fs::metadata(&to).unwrap().permissions().readonly());
        }
        for name in no {
            assert!(!partial.path().join(name).exists(), "{name}");
        }
        assert!(!partial.path().join("original").exists());
        assert!(!partial.path().join("out.partial").exists());
    }
}
