//! How a query weighs the keys before it.

use crate::error::{Error, Result};

/// What scores are and which keys have any: softmax(s) v over the keys that a token attends to, with
/// s = cap · tanh(q·k · scale / cap), or q·k · scale where there is no cap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionRule {
    /// Times the product of query and key; positive.
    pub scale: f32,
    /// What scores stay below (Gemma 2, arXiv 2408.00118, section 2.2); positive.
    pub softcap: Option<f32>,
    /// Tokens that a token attends to at most, itself included; all before it without one.
    pub window: Option<usize>,
}

impl AttentionRule {
    /// 1/√`head_dim`, no cap and no window.
    #[must_use]
    pub fn llama(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f32).sqrt(), softcap: None, window: None }
    }

    /// The first of the keys that the token at `position` attends to.
    pub(crate) fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// That weights come out of it.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let positive = |value: f32| value > 0.0 && value.is_finite();
        let whole = self.window.is_none_or(|window| window > 0);
        if positive(self.scale) && self.softcap.is_none_or(positive) && whole {
            return Ok(());
        }
        let reason = format!("scale, cap and window of scores have to be positive in {self:?}");
        Err(Error::Unsupported { op, reason })
    }
}
