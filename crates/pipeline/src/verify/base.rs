//! What comparing with a base needs: that it can be one, and the measure of a distance from it.

use gptq_checkpoint::{Checkpoint, ModelConfig};

use crate::error::{Error, Result};

/// A base has the shape of what was made from it.
pub(super) fn check_base(checkpoint: &Checkpoint, base: &Checkpoint) -> Result<()> {
    let (mine, theirs) = (checkpoint.config(), base.config());
    if base.quantize_config().is_some() {
        return Err(Error::QuantizedBase(base.dir().to_owned()));
    }
    let experts = |of: &ModelConfig| of.any_experts().map_or(0, |experts| experts.count);
    let width = |of: &ModelConfig| of.any_experts().map_or(0, |e| e.intermediate_size);
    let shared = |of: &ModelConfig| {
        of.any_experts().and_then(|experts| experts.shared).map_or(0, |s| s.intermediate_size)
    };
    for (what, mine, theirs) in [
        ("num_hidden_layers", mine.num_hidden_layers, theirs.num_hidden_layers),
        ("hidden_size", mine.hidden_size, theirs.hidden_size),
        ("intermediate_size", mine.intermediate_size, theirs.intermediate_size),
        ("num_attention_heads", mine.num_attention_heads, theirs.num_attention_heads),
        ("num_key_value_heads", mine.num_key_value_heads, theirs.num_key_value_heads),
        ("head_dim", mine.head_dim, theirs.head_dim),
        ("vocab_size", mine.vocab_size, theirs.vocab_size),
        ("num_experts", experts(mine), experts(theirs)),
        ("moe_intermediate_size", width(mine), width(theirs)),
        ("shared_expert_intermediate_size", shared(mine), shared(theirs)),
    ] {
        if mine != theirs {
            return Err(Error::OtherBase { base: base.dir().to_owned(), what, mine, theirs });
        }
    }
    Ok(())
}

/// An error over an energy, where there is one.
pub(super) fn relative(error: f64, energy: f64) -> Option<f64> {
    Some(error / energy).filter(|quotient| energy > 0.0 && quotient.is_finite())
}
