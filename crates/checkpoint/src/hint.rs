//! What to do about an error, apart from what it says: the command prints it on a line of its own.

use std::borrow::Cow;

use crate::Error;

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::NoModel { advice, .. } | Self::NoSettings { advice, .. } => (*advice).into(),
            Self::NoConfig { advice, .. } => advice.into(),
            Self::InvalidHeader { .. } => {
                "get or make the file again: what wrote it may have been interrupted".into()
            }
            Self::NotQuantized { .. } => {
                "give a folder that gptq quantize made; gptq inspect shows any model".into()
            }
            Self::InvalidPyTorch { advice, .. } => (*advice)?.into(),
            Self::AmbiguousWeights { .. } => {
                "set `model_file_base_name` in `quantize_config.json`".into()
            }
            Self::ArrivingParts { .. } => "leave --discard-shards out".into(),
            Self::MissingShard { .. } => "download it again".into(),
            Self::LfsPointer { .. } => "fetch the weights with `git lfs pull`".into(),
            Self::Prefixed { .. } => "save the model inside of it".into(),
            Self::Unprefixed { .. } => "save the model for causal language modeling".into(),
            Self::Adapter { .. } => {
                "merge the adapter (PEFT: `merge_and_unload`) and save the result".into()
            }
            Self::Alias { .. } => "rename it, or take it out of the file".into(),
            Self::Unindexed { .. } => "write the index again, or take it out of the file".into(),
            Self::FusedExperts { .. } => {
                "save the model by `save_pretrained` of transformers, which parts them".into()
            }
            Self::F16Underflow { .. } => "quantize the dense model again".into(),
            Self::PackedHead { .. } => {
                "quantize the dense model without its head and embedding".into()
            }
            Self::LostOrder { .. } => "get the whole file again".into(),
            Self::Output(error) => error.hint()?.into(),
            Self::NotInHubCache { request, .. } => format!(
                "download it with `gptq fetch {request}`, give a local folder, or set HF_HOME to a \
                 cache that holds it"
            )
            .into(),
            Self::InvalidHubId { id } if id.contains('\\') => {
                "paths have `/` between their parts".into()
            }
            Self::InvalidHubId { .. } => {
                "give a folder that is there, or a model of the Hub as `ORG/NAME`".into()
            }
            Self::NoHubCache { .. } => "give a local folder, or set HF_HOME".into(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error = Error::NotInHubCache {
            id: "a/b".to_owned(),
            revision: "v2".to_owned(),
            looked_in: "/cache".into(),
            request: "a/b --revision v2".to_owned(),
        };
        let hint = error.hint().unwrap();
        assert!(hint.starts_with("download it with `gptq fetch a/b --revision v2`"), "{hint}");
        assert!(!error.to_string().contains("gptq fetch"), "{error}");
        assert_eq!(Error::UnsupportedBits { bits: 5 }.hint(), None);
    }
}
