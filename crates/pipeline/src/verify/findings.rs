//! What the checks are, and what they find.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::{Error, with_causes};

/// One kind of check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Every file has the sum that was recorded when it was written.
    Sums,
    /// Weight files and their index can be read.
    Files,
    /// quantize_config.json, config.json and the metadata agree with each other and the tensors, and a
    /// report can be read.
    Configuration,
    /// Names, types and shapes of all tensors.
    Tensors,
    /// Zeros are stored as the settings say, and those of a symmetric grid are its middle.
    Zeros,
    /// Every group has its columns, in order where no act-order is declared.
    GroupIndex,
    /// Linears that loaders fuse have one group index.
    FusedOrder,
    /// Scales are finite, and positive unless a linear's are of both signs.
    Scales,
    /// Norms, embeddings, head and the architecture's biases are finite, biases that AutoGPTQ adds
    /// zero.
    Dense,
    /// config.json and the tokenizer make the base's model of the tensors.
    Model,
    /// Every linear is a quantization of the base's.
    Weights,
    /// Tensors that are not quantized are the base's.
    DenseWeights,
    /// Output errors, perplexity and KL divergence are within their limits.
    Limits,
}

impl Check {
    /// What the check is about, in words.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Sums => "recorded sums",
            Self::Files => "weight files",
            Self::Configuration => "configuration",
            Self::Tensors => "names, types, shapes",
            Self::Zeros => "zeros",
            Self::GroupIndex => "group index",
            Self::FusedOrder => "order of fused linears",
            Self::Scales => "scales",
            Self::Dense => "other values",
            Self::Model => "model against the base",
            Self::Weights => "linears against the base",
            Self::DenseWeights => "the rest against the base",
            Self::Limits => "limits on outputs",
        }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check that found it.
    pub check: Check,
    /// Tensor or file.
    pub place: String,
    /// What is wrong with it.
    pub message: String,
    /// What to do about it, where that is known and not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// A check that was made.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Checked {
    /// Which.
    pub check: Check,
    /// How many files, tensors or linears it looked at.
    pub examined: usize,
    /// How many findings it has.
    pub findings: usize,
}

/// Findings and what was looked at, while checks run.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) list: Vec<Finding>,
    pub(super) examined: BTreeMap<Check, usize>,
}

impl Findings {
    pub(super) fn add(
        &mut self,
        check: Check,
        place: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.push(check, place.into(), message.into(), None);
    }

    /// Adds what an error says of a file or tensor.
    pub(super) fn add_error(
        &mut self,
        check: Check,
        place: impl Into<String>,
        error: impl Into<Error>,
    ) {
        let error = error.into();
        let hint = error.hint().map(Cow::into_owned);
        self.push(check, place.into(), with_causes(&error), hint);
    }

    /// Adds what is wrong together with what to do about it.
    pub(super) fn add_with_hint(&mut self, check: Check, place: &str, message: &str, hint: &str) {
        self.push(check, place.to_owned(), message.to_owned(), Some(hint.to_owned()));
    }

    fn push(&mut self, check: Check, place: String, message: String, hint: Option<String>) {
        self.list.push(Finding { check, place, message, hint });
    }

    /// Counts things that a check looks at.
    pub(super) fn examine(&mut self, check: Check, count: usize) {
        *self.examined.entry(check).or_insert(0) += count;
    }

    pub(super) fn of(&self, check: Check) -> usize {
        self.list.iter().filter(|f| f.check == check).count()
    }
}
