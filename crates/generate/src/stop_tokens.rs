//! The tokens that end a text.

use std::path::Path;

use gptq_checkpoint::{CONFIG_FILE, TEXT_CONFIG};
use gptq_text::tokens::TextTokenizer;

use crate::error::Result;
use crate::generation_config::{GENERATION_CONFIG_FILE, GenerationConfig, eos_token_ids};
use crate::json_file::JsonFile;
use crate::special_tokens::SpecialTokens;

/// Which file named them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopOrigin {
    /// `eos_token_id` of `generation_config.json`.
    GenerationConfig,
    /// `eos_token_id` of `config.json`, or of `text_config` in it.
    Config,
    /// `eos_token` of the tokenizer's configuration.
    Tokenizer,
    /// No file names one: a text ends with its window, its limit or a stop string.
    Nothing,
}

/// The tokens that end a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopTokens {
    /// The tokens, in the file's order.
    pub ids: Vec<u32>,
    /// Where they come from.
    pub origin: StopOrigin,
}

impl StopTokens {
    /// Those of `generation_config.json`, else those of `config.json`, else the tokenizer's.
    ///
    /// # Errors
    /// [`Error::Read`](crate::Error::Read) and [`Error::Invalid`](crate::Error::Invalid).
    pub fn find(
        folder: &Path,
        generation: Option<&GenerationConfig>,
        tokenizer: &TextTokenizer,
    ) -> Result<Self> {
        let found = |ids, origin| Ok(Self { ids, origin });
        if let Some(generation) = generation.filter(|config| !config.eos_token_ids.is_empty()) {
            return found(generation.eos_token_ids.clone(), StopOrigin::GenerationConfig);
        }
        if let Some(config) = JsonFile::open(folder.join(CONFIG_FILE))? {
            // As transformers has it: what the whole of a multimodal model says, else its language model.
            for settings in [Some(&config), config.object(TEXT_CONFIG).as_ref()] {
                let ids = settings.map(eos_token_ids).transpose()?.unwrap_or_default();
                if !ids.is_empty() {
                    return found(ids, StopOrigin::Config);
                }
            }
        }
        let eos = SpecialTokens::open(folder)?.eos;
        match eos.and_then(|token| tokenizer.token_to_id(&token)) {
            Some(id) => found(vec![id], StopOrigin::Tokenizer),
            None => found(Vec::new(), StopOrigin::Nothing),
        }
    }

    /// Whether a text ends with this token, which is no part of it.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// The file that named them; `None` where none did.
    #[must_use]
    pub fn file(&self) -> Option<&'static str> {
        match self.origin {
            StopOrigin::GenerationConfig => Some(GENERATION_CONFIG_FILE),
            StopOrigin::Config => Some(CONFIG_FILE),
            StopOrigin::Tokenizer => Some("tokenizer_config.json"),
            StopOrigin::Nothing => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_first_file_that_names_one_decides() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/demo-llama");
        let tokenizer = TextTokenizer::open(&demo, 1 << 20).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let find = || {
            let generation = GenerationConfig::open(folder.path()).unwrap();
            StopTokens::find(folder.path(), generation.as_ref(), &tokenizer)
        };
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(find().unwrap(), StopTokens { ids: vec![], origin: StopOrigin::Nothing });
        let token = tokenizer.id_to_token(5).unwrap();
        let config = serde_json::json!({"eos_token": token});
        write("tokenizer_config.json", &config.to_string());
        assert_eq!(find().unwrap(), StopTokens { ids: vec![5], origin: StopOrigin::Tokenizer });
        write("config.json", r#"{"eos_token_id": [3, 4]}"#);
        assert_eq!(find().unwrap(), StopTokens { ids: vec![3, 4], origin: StopOrigin::Config });
        write("config.json", r#"{"eos_token_id": null, "text_config": {"eos_token_id": 6}}"#);
        assert_eq!(find().unwrap(), StopTokens { ids: vec![6], origin: StopOrigin::Config });
        write("config.json", r#"{"text_config": {"eos_token_id": [6, -1]}}"#);
        let error = find().unwrap_err().to_string();
        assert!(
            error.contains("config.json") && error.contains("text_config.eos_token_id"),
            "{error}"
        );
        write("config.json", r#"{"eos_token_id": 4, "text_config": {"eos_token_id": 6}}"#);
        assert_eq!(find().unwrap().ids, [4]);
        write("generation_config.json", "{}");
        assert_eq!(find().unwrap().origin, StopOrigin::Config);
        write("generation_config.json", r#"{"eos_token_id": 2}"#);
        let stop = find().unwrap();
        assert_eq!(stop, StopTokens { ids: vec![2], origin: StopOrigin::GenerationConfig });
        assert!(stop.contains(2) && !stop.contains(3));
        assert_eq!(stop.file(), Some("generation_config.json"));
        write("generation_config.json", "{}");
        write("config.json", r#"{"eos_token_id": "x"}"#);
        let error = find().unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("eos_token_id"), "{error}");
    }
}
