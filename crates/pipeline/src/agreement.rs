//! What the ranks of a job must have alike, so that their parts make up one result.
//!
//! Every setting, text and weight that a rank's part depends on is here, and nothing else: where
//! rank 0 writes, what reports call the model and how much memory a card may use are its own. How many
//! ranks there are, on what devices and of which build, they compare when they meet.

use gptq_checkpoint::{Checkpoint, QuantizeConfig};
use gptq_compute::Agreement;
use gptq_records::source_digest::source_digest;
use gptq_text::evaluation::EvalText;

use crate::error::Result;
use crate::job::QuantizeJob;

/// What ranks that make a branch compare.
pub(crate) fn quantize(job: &QuantizeJob<'_>) -> Result<Agreement> {
    let spec = &job.spec;
    let config = job.source.config();
    let linears: Vec<_> = config.linears().map(|(_, linear)| linear.sides()).collect();
    let same = Agreement::new(words_of_block(config.hidden_size, &linears))
        .with("the command", "quantize")
        .with("the source model", source_digest(job.source)?)
        .with("source dtype", job.source_dtype.name())
        .with("bits", spec.bits)
        .with("group size", gptq_checkpoint::GroupSize(spec.group_size))
        .with("act-order", spec.act_order)
        .with("damp", spec.damp)
        .with("recipe", spec.recipe.name())
        .with("layout", job.layout.name())
        .with("strict", job.strict);
    if !spec.recipe.calibrates() {
        return Ok(same);
    }
    let same = same.with("choices", spec.choices);
    let Some(calibration) = job.calibration else { return Ok(same) };
    let (windows, seq_len) = (calibration.windows.len(), calibration.seq_len);
    Ok(same
        .with("calibration windows", format!("{windows} × {seq_len} tokens"))
        .with("calibration seed", calibration.seed)
        .with("calibration text", &calibration.dataset.fingerprint)
        .with("calibration tokens", &calibration.sha256))
}

/// What ranks that measure a model, and perhaps its distance from another, compare.
///
/// # Errors
/// Checkpoints that cannot be read.
pub fn perplexity(
    model: &Checkpoint,
    base: Option<&Checkpoint>,
    text: &EvalText,
) -> Result<Agreement> {
    let tokens: usize = text.windows.iter().map(|window| window.tokens.len()).sum();
    let digest = base.map_or_else(|| Ok("none".to_owned()), source_digest)?;
    let same = Agreement::new(tokens as u64)
        .with("the command", "ppl")
        .with("the model", source_digest(model)?)
        .with("the base", digest);
    let same = with_settings(same, "the model's", Some(model));
    Ok(with_settings(same, "the base's", base)
        .with("protocol", &text.protocol)
        .with("windows", format!("{} of at most {} tokens", text.windows.len(), text.seq_len))
        .with("the text", &text.identity.fingerprint)
        .with("the text's tokens", text.sha256()))
}

/// Adds how packed tensors of a checkpoint are read, whatever file says it: the digest of a model knows
/// config.json and the tensors, and one word of quantize_config.json makes other weights of them. Every
/// field: which of them change what is read is the reader's matter.
fn with_settings(same: Agreement, whose: &str, of: Option<&Checkpoint>) -> Agreement {
    let Some(config) = of.and_then(Checkpoint::quantize_config) else {
        return same.with(&format!("{whose} quantization settings"), "none");
    };
    let QuantizeConfig {
        bits,
        group_size,
        damp_percent,
        desc_act,
        sym,
        true_sequential,
        model_file_base_name,
        checkpoint_format,
        modules_in_block,
    } = config;
    let words = |of: &Option<Vec<String>>| of.as_ref().map_or("all".to_owned(), |m| m.join(" "));
    let field = |name: &str| format!("{whose} {name}");
    same.with(&format!("{whose} quantization settings"), "some")
        .with(&field("bits"), bits.get())
        .with(&field("group_size"), group_size.map_or("none".to_owned(), |n| n.to_string()))
        .with(&field("damp_percent"), damp_percent)
        .with(&field("desc_act"), desc_act)
        .with(&field("sym"), sym)
        .with(&field("true_sequential"), true_sequential)
        .with(&field("model_file_base_name"), model_file_base_name.as_deref().unwrap_or("none"))
        .with(&field("checkpoint_format"), checkpoint_format.name())
        .with(&field("modules_in_block_to_quantize"), words(modules_in_block))
}

/// The most words that a rank sends at once for a block of these linears, rows and columns: a Gram, a
/// weight, or numbers of each linear.
pub(crate) fn words_of_block(hidden: usize, linears: &[(usize, usize)]) -> u64 {
    let squares = linears.iter().flat_map(|&(rows, cols)| [rows * cols, cols * cols]);
    squares.chain([hidden * hidden, 1 << 16]).max().unwrap_or(0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gram_or_weight_is_what_a_rank_sends() {
        let linears = [(4096, 4096), (11_008, 4096), (4096, 11_008)];
        assert_eq!(words_of_block(4096, &linears), 11_008 * 11_008);
        assert_eq!(words_of_block(64, &[(4096, 64)]), 4096 * 64);
        assert_eq!(words_of_block(64, &[(64, 64)]), 1 << 16);
    }
}
