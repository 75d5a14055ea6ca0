//! What a model's head is: one rule for all who read it.
//!
//! `tie_word_embeddings` says that the head is the embedding. What a folder holds may say more, and
//! loaders disagree on what follows from it, so it is decided here once:
//!
//! | the configuration | the folder holds | the head is |
//! | --- | --- | --- |
//! | does not tie | `lm_head.weight` | that tensor |
//! | ties | one of the two tables, under either name | that table, which is also the embedding |
//! | ties | both, equal | the embedding: the copy changes nothing |
//! | ties | both, with other values | `lm_head.weight`: trained values are kept |
//!
//! In the last case transformers 5 takes the head from the file, too; before, it took the embedding,
//! and so does vLLM. [`Head::warning`] says so. What is written never depends on any of this: every
//! quantized checkpoint holds both tables and says that they are not tied, the one form that all
//! loaders read (AutoGPTQ 0.7 computes NaN from a tied file without `lm_head.weight`).

/// Where a checkpoint's head comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A tensor of its own, as the configuration has it.
    Own,
    /// The embedding, of which there is one table.
    Tied,
    /// The embedding, which is stored a second time under the head's name.
    Copied,
    /// A tensor of its own, although the configuration ties it to the embedding.
    Untied,
}

impl Head {
    /// The warning for users of such a checkpoint.
    #[must_use]
    pub fn warning(self) -> Option<&'static str> {
        (self == Self::Untied).then_some(
            "config.json ties the head to the embedding, but `lm_head.weight` holds other values: \
             they are taken as the head, as by transformers 5; earlier versions and vLLM take the \
             embedding. Set `tie_word_embeddings` to false to keep the head, or remove the tensor",
        )
    }

    /// In a few words.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Own => "a tensor of its own",
            Self::Tied => "the embedding",
            Self::Copied => "the embedding, stored twice",
            Self::Untied => "a tensor of its own, though config.json ties it to the embedding",
        }
    }
}
