//! How the tensors of a language model are called in a file. Everywhere else they have the names that
//! they have in a model by itself.

use std::borrow::Cow;

use crate::names::{BLOCKS, EMBEDDING, FINAL_NORM, HEAD};

/// The beginning of all names in a model by itself, but the head's.
const MODEL: &str = "model.";

/// What names in a file begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredNames {
    /// Those of the embedding, the blocks and the norm before the head.
    pub(crate) model: &'static str,
    /// The head's whole name.
    pub(crate) head: &'static str,
}

impl StoredNames {
    /// Those of a model by itself.
    pub(crate) const PLAIN: Self = Self { model: MODEL, head: HEAD };

    /// The stored name of a tensor; of one that is not of a language model its own.
    pub(crate) fn stored(self, name: &str) -> Cow<'_, str> {
        if self == Self::PLAIN {
            return Cow::Borrowed(name);
        }
        match name.strip_prefix(MODEL) {
            _ if name == HEAD => Cow::Borrowed(self.head),
            Some(rest) if is_plain(name) => Cow::Owned(format!("{}{rest}", self.model)),
            _ => Cow::Borrowed(name),
        }
    }

    /// The name in a model by itself of a tensor that is stored under this one; `None` where it is not of
    /// the language model.
    pub(crate) fn plain(self, stored: &str) -> Option<Cow<'_, str>> {
        // Also what a packed head would consist of, which is recognized, but not read.
        if let Some(leaf) = stored.strip_prefix(self.head.trim_end_matches("weight")) {
            return Some(Cow::Owned(HEAD.replace("weight", leaf)));
        }
        let rest = stored.strip_prefix(self.model)?;
        Some(match self == Self::PLAIN {
            true => Cow::Borrowed(stored),
            false => Cow::Owned(format!("{MODEL}{rest}")),
        })
    }

    /// Whether some of these names are of blocks that are called so.
    pub(crate) fn fit<'n>(self, mut names: impl Iterator<Item = &'n str>) -> bool {
        let blocks = self.stored(BLOCKS);
        names.any(|name| name.starts_with(&*blocks))
    }
}

/// Whether this is a name of a language model by itself.
pub(crate) fn is_plain(name: &str) -> bool {
    name.starts_with(BLOCKS) || name == EMBEDDING || name == FINAL_NORM || is_head(name)
}

/// Whether it is that of a head, or of what a packed one consists of.
fn is_head(name: &str) -> bool {
    name.starts_with(HEAD.trim_end_matches("weight"))
}

/// The name in a model by itself of a tensor that some reader or other takes for the language model's,
/// however deep it lies; `None` where it is of another part.
pub(crate) fn likely_plain(stored: &str) -> Option<String> {
    let mut rest = stored;
    let inner = |name: &'_ str| -> Option<usize> {
        let parts = [MODEL, "language_model.", "text_model."];
        parts.iter().find(|part| name.starts_with(**part)).map(|part| part.len())
    };
    while let Some(length) = inner(rest) {
        rest = &rest[length..];
    }
    let name = if is_head(rest) { rest.to_owned() } else { format!("{MODEL}{rest}") };
    is_plain(&name).then_some(name)
}
