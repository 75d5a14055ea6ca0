//! What lies where a model should: other formats, and folders whose names do not fit.
//!
//! Nothing here is read as a model. It only turns "no such file" into what a person wants to know.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::weights::Weights;
use crate::{Checkpoint, Error, ModelConfig, QuantizeConfig, Result};

/// What a path without a model holds instead, where that is something well known.
pub(crate) fn recognize(path: &Path) -> Option<Error> {
    let found = |what, advice| Some(Error::NoModel { path: path.to_owned(), what, advice });
    const GGUF: &str = "it cannot be read: give the safetensors model that it was converted from";
    if path.is_file() {
        return match starts_with(path, b"GGUF") {
            true => found("is a GGUF file", GGUF),
            false => found("is a file", "give the folder that holds config.json and the weights"),
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

fn starts_with(path: &Path, magic: &[u8]) -> bool {
    let mut start = vec![0; magic.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == magic
}

/// The settings that hold for a folder's weights, and what is to be said where they do not: those of
/// bitsandbytes and others are often left over when the weights were made dense again.
pub(crate) fn settings(
    dir: &Path,
    config: &ModelConfig,
    weights: &Weights,
    read: Result<Option<QuantizeConfig>>,
) -> Result<(Option<QuantizeConfig>, Option<String>)> {
    let method = config.raw().get("quantization_config").and_then(|keys| keys.get("quant_method"));
    let method = method.filter(|method| !method.is_null());
    if matches!(read, Ok(None)) || !is_dense(config, weights) {
        // Also where quantize_config.json says otherwise.
        if let Some(method) = method.filter(|method| *method != "gptq") {
            return Err(Error::UnsupportedConfig {
                path: dir.join("config.json"),
                key: "quantization_config.quant_method".to_owned(),
                value: method.to_string(),
                supported: "`gptq`",
            });
        }
        return Ok((read?, None));
    }
    // A file that cannot be read at all says nothing of the weights.
    if let Err(error @ (Error::Io { .. } | Error::Json { .. })) = read {
        return Err(error);
    }
    let method = method.map_or_else(String::new, |method| format!(" of {method}"));
    Ok((
        None,
        Some(format!(
            "the weights are dense although there is a quantisation configuration{method}: it is \
             ignored; remove quantization_config from config.json, and quantize_config.json"
        )),
    ))
}

/// Whether every linear is there as a floating-point weight, and nothing beside it says how it would
/// be quantised. Of weights that are still to come, only names are known.
fn is_dense(config: &ModelConfig, weights: &Weights) -> bool {
    let quantised = |name: &str| {
        let leaf = name.rsplit('.').next().unwrap_or_default();
        !matches!(leaf, "weight" | "bias" | "inv_freq") && name.contains("_proj.")
    };
    let float = |name: &str| match weights.stored_type(name) {
        Some(dtype) => {
            crate::DType::from_safetensors(dtype, name).is_ok_and(crate::DType::is_float)
        }
        None => weights.contains(name),
    };
    config.linears().all(|(name, _)| float(&format!("{name}.weight")))
        && !weights.names().any(quantised)
}

impl Checkpoint {
    /// Why a tensor is not there.
    pub(crate) fn missing(&self, tensor: &str) -> Error {
        let dir = || self.dir().to_owned();
        let tensor = tensor.to_owned();
        if let Some((index, shard)) = self.weights().promised(&tensor) {
            return Error::IndexMismatch { index, tensor, shard };
        }
        let stored =
            |name: &&str| name.strip_suffix(tensor.as_str()).is_some_and(|p| p.ends_with('.'));
        if let Some(name) = self.names().find(stored) {
            let prefix = name[..name.len() - tensor.len()].to_owned();
            return Error::Prefixed { dir: dir(), tensor, prefix };
        }
        if let Some(bare) =
            tensor.strip_prefix("model.").filter(|bare| self.weights().contains(bare))
        {
            let bare = bare.to_owned();
            return Error::Unprefixed { dir: dir(), tensor, bare };
        }
        Error::MissingTensor { dir: dir(), tensor }
    }
}
