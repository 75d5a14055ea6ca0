//! What lies where a model should: other formats, and folders whose names do not fit.
//!
//! Nothing here is read as a model. It only turns "no such file" into what a person wants to know.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::names::CONFIG_FILE;

const WANTED: &str = "give the folder that holds config.json and the weights";

/// Folders that an error names, at most.
const SHOWN: usize = 3;

/// What a path without a model holds instead, where that is something well known.
pub(crate) fn recognize(path: &Path) -> Option<Error> {
    let found = |what, advice| Some(Error::NoModel { path: path.to_owned(), what, advice });
    const GGUF: &str = "give the safetensors model that it was converted from";
    if path.is_file() {
        return match starts_with(path, b"GGUF") {
            true => found("is a GGUF file", GGUF),
            false => found("is a file", WANTED),
        };
    }
    let names: Vec<String> = fs::read_dir(path)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    let any = |test: &dyn Fn(&str) -> bool| names.iter().any(|name| test(name));
    if any(&|name| name.ends_with(".gguf")) {
        return found("holds GGUF files and no model beside them", GGUF);
    }
    if any(&|name| name.starts_with("adapter_model.")) {
        let advice = "merge it into its base first (PEFT: `merge_and_unload`) and give that folder";
        return found("holds an adapter, not a model", advice);
    }
    if any(&|name| name.starts_with("consolidated.")) {
        let advice = "convert it with transformers' convert_llama_weights_to_hf.py";
        return found("holds a model in Meta's own format", advice);
    }
    None
}

/// What is said of a folder without a configuration: often it holds the folders of models.
pub(crate) fn without_config(dir: &Path) -> Option<Error> {
    let mut models: Vec<PathBuf> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join(CONFIG_FILE).is_file())
        .collect();
    models.sort();
    let named: Vec<String> = models.iter().map(|model| format!("`{}`", model.display())).collect();
    let advice = match &named[..] {
        [] => WANTED.to_owned(),
        [first, .., _] if named.len() > SHOWN => {
            format!("give one of the {} models in it, such as {first}", named.len())
        }
        few => format!("give {}", few.join(" or ")),
    };
    Some(Error::NoConfig { dir: dir.to_owned(), advice })
}

fn starts_with(path: &Path, magic: &[u8]) -> bool {
    let mut start = vec![0; magic.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == magic
}
