//! What works for which family of models, from the data that the code decides by: the table of README.

use std::path::Path;

use gptq_checkpoint::{ModelConfig, family_names, wrapper_names};
use gptq_model::has_step_program;

use crate::error::Result;
use crate::recipe_fit::{has_experts, unrotatable, unshiftable};

const YES: &str = "✓";

/// The smallest model of a family, with all that the family leaves to defaults.
fn smallest(family: &str) -> Result<ModelConfig> {
    let text = format!(
        r#"{{"model_type":"{family}","hidden_size":64,"intermediate_size":64,"vocab_size":32,
        "num_hidden_layers":4,"num_attention_heads":2,"num_key_value_heads":2,"head_dim":32}}"#
    );
    Ok(ModelConfig::parse(&text, Path::new(family))?)
}

/// A Markdown table of all multimodal models whose language model is quantized.
#[must_use]
pub fn wrapper_table() -> String {
    let mut lines = vec![
        "| `model_type` | language model (`text_config`) |".to_owned(),
        "| --- | --- |".to_owned(),
    ];
    for (name, texts) in wrapper_names() {
        let texts: Vec<String> = texts.iter().map(|text| format!("`{text}`")).collect();
        lines.push(format!("| `{name}` | {} |", texts.join(", ")));
    }
    lines.join("\n")
}

/// A Markdown table of all families: a mark where something holds, and why where it does not.
///
/// # Errors
/// None for families as they are.
pub fn table() -> Result<String> {
    let mut lines = vec![
        "| `model_type` | `ppl` | `quantize` | `best` | several GPUs | `generate` |".to_owned(),
        "| --- | --- | --- | --- | --- | --- |".to_owned(),
    ];
    for family in family_names() {
        let model = smallest(family)?;
        let (best, generate) = (best(&model), generate(&model));
        lines.push(format!("| `{family}` | {YES} | {YES} | {best} | {YES} | {generate} |"));
    }
    Ok(lines.join("\n"))
}

/// What `best` does without, and why.
fn best(model: &ModelConfig) -> String {
    let (rotation, shift) = (unrotatable(model), unshiftable(model));
    match (rotation, shift) {
        (None, None) if has_experts(model) => {
            format!("{YES}; `residual` for o, not for downs of experts")
        }
        (None, None) => YES.to_owned(),
        (Some(one), Some(other)) if one == other => {
            format!("{YES}, without `rotate=learned` and `residual`: {one}")
        }
        _ => {
            let of = |choice: &str, why: Option<_>| why.map(|why| format!("`{choice}`: {why}"));
            let without = [of("rotate=learned", rotation), of("residual", shift)];
            let without: Vec<String> = without.into_iter().flatten().collect();
            format!("{YES}, without {}", without.join("; "))
        }
    }
}

/// How text is made on a GPU.
fn generate(model: &ModelConfig) -> String {
    match has_step_program(model, 1) {
        true => YES.to_owned(),
        false => format!("{YES}; on a GPU without its program for whole steps"),
    }
}
