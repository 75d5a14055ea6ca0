//! Which quantization settings hold for the weights of a folder.
//!
//! What config.json and quantize_config.json say, and what the weights are, may contradict each
//! other.

use std::path::Path;

use crate::names::CONFIG_FILE;
use crate::small_file::read_small_text;
use crate::weights::Weights;
use crate::{Error, ModelConfig, QuantizeConfig, Result};

/// The settings that hold for a folder's weights, and what is to be said where they do not: those of
/// bitsandbytes and others are often left over when the weights were made dense again.
pub(crate) fn that_hold(
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
                path: dir.join(CONFIG_FILE),
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
            "the weights are dense although there is a quantization configuration{method}: it is \
             ignored; remove quantization_config from config.json, and quantize_config.json"
        )),
    ))
}

/// Whether every linear is there as a floating-point weight, and nothing beside it says how it would
/// be quantized. Of weights that are still to come, only names are known.
fn is_dense(config: &ModelConfig, weights: &Weights) -> bool {
    // Of the language model alone: other parts are stored as they like.
    let quantized = |name: &str| {
        let leaf = name.rsplit('.').next().unwrap_or_default();
        config.plain_name(name).is_some()
            && !matches!(leaf, "weight" | "bias" | "inv_freq")
            && name.contains("_proj.")
    };
    let float = |name: &str| match weights.stored_type(name) {
        Some(dtype) => {
            crate::DType::from_safetensors(dtype, name).is_ok_and(crate::DType::is_float)
        }
        None => weights.contains(name),
    };
    config.linears().all(|(name, _)| float(&config.stored_name(&format!("{name}.weight"))))
        && !weights.names().any(quantized)
}

/// What was found packed that cannot be read, for a folder whose weights are known.
pub(crate) fn refuse_unreadable(
    dir: &Path,
    config: &ModelConfig,
    quantize: Option<&QuantizeConfig>,
    weights: &Weights,
) -> Result<()> {
    let of_table = |name: &&str| {
        let plain = config.plain_name(name);
        plain.is_some_and(|p| ["lm_head.qweight", "model.embed_tokens.qweight"].contains(&&*p))
    };
    if let Some(tensor) = quantize.and_then(|_| weights.names().find(of_table)) {
        return Err(Error::PackedHead { tensor: tensor.to_owned() });
    }
    let mut packed = weights.names().filter(|name| name.ends_with(".qweight"));
    let Some(tensor) = packed.next().filter(|_| quantize.is_none()) else { return Ok(()) };
    let (reason, advice) = no_settings(dir, weights);
    Err(Error::NoSettings { dir: dir.to_owned(), tensor: tensor.to_owned(), reason, advice })
}

/// Why packed tensors have no settings, as far as it shows, and what to do.
fn no_settings(dir: &Path, weights: &Weights) -> (String, &'static str) {
    const AWQ: &str = "quant_config.json";
    let awq = read_small_text(&dir.join(AWQ));
    if awq.is_ok_and(|text| text.contains("\"w_bit\"")) {
        let reason = format!(
            "`{AWQ}` beside them is AutoAWQ's: AWQ packs weights in another order, which is not \
             supported"
        );
        return (reason, "quantize the dense model instead");
    }
    let metadata = match weights {
        Weights::Mapped(mapped) => mapped.files().iter().find_map(|file| {
            let value = |key: &str| file.metadata.get(key).map(String::as_str);
            let (bits, size) = (value("gptq_bits")?, value("gptq_group_size").unwrap_or("?"));
            Some(format!("; the metadata of the weights says {bits} bits, group size {size}"))
        }),
        Weights::Arriving(_) => None,
    };
    let tgi = weights.contains("gptq_bits").then(|| {
        "; TGI stores them in the tensors `gptq_bits` and `gptq_groupsize`, which are not read"
            .to_owned()
    });
    let more = metadata.or(tgi).unwrap_or_default();
    let write = "write `bits`, `group_size`, `desc_act` and `sym` into quantize_config.json";
    (format!("no file says how they are quantized{more}"), write)
}
