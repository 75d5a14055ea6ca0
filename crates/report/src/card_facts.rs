//! What only a person knows of a model: its author, license, prompt. A TOML file says it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a card says of the model that was quantized.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardFacts {
    /// The model's name, without its author.
    pub name: String,
    /// Hub repository of the quantized branches, as `ORG/NAME`.
    pub repository: String,
    /// Hub id of the model that was quantized, if it is there.
    pub base_model: Option<String>,
    /// Who made the model.
    pub author: String,
    /// Their page.
    pub author_link: Option<String>,
    /// The Hub's identifier of the license.
    pub license: String,
    /// What else is to be said of it.
    pub license_note: Option<String>,
    /// Language codes.
    pub languages: Vec<String>,
    /// Hub ids of the data that the model was trained on.
    #[serde(default)]
    pub datasets: Vec<String>,
    /// Who publishes the branches.
    pub quantized_by: Option<String>,
    /// What the model is, in a sentence or two.
    pub description: String,
    /// How it wants to be asked; absent for models that only continue a text.
    pub prompt: Option<Prompt>,
    /// Further reading.
    #[serde(default)]
    pub links: Vec<Link>,
}

/// A prompt template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// What the format is called.
    pub name: String,
    /// The text, with `{prompt}` and perhaps `{system_message}`.
    pub template: String,
}

/// A place to read on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// What is there.
    pub text: String,
    /// Its address.
    pub url: String,
}

impl CardFacts {
    /// Reads the facts; `repository` replaces theirs.
    ///
    /// # Errors
    /// [`gptq_records::Error::Io`] and [`Error::Facts`], which name the file.
    pub fn open(path: &Path, repository: Option<&str>) -> Result<Self> {
        let text = gptq_checkpoint::read_small_text(path)
            .map_err(gptq_records::Error::io("read", path))?;
        let facts = Self::parse(&text, path)?;
        match repository {
            Some(repository) => {
                let facts = Self { repository: repository.to_owned(), ..facts };
                facts.check(path)?;
                Ok(facts)
            }
            None => Ok(facts),
        }
    }

    /// Reads the facts from their text; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Facts`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let facts: Self = toml::from_str(text)
            .map_err(|e| Error::Facts { path: path.to_owned(), message: e.message().to_owned() })?;
        facts.check(path)?;
        Ok(facts)
    }

    /// The repository and the base model stand in commands and addresses.
    fn check(&self, path: &Path) -> Result<()> {
        let invalid = |message: String| Error::Facts { path: path.to_owned(), message };
        for id in [Some(&self.repository), self.base_model.as_ref()].into_iter().flatten() {
            if !id.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name)) {
                return Err(invalid(format!("`{id}` is no Hub repository of the form ORG/NAME")));
            }
        }
        match &self.prompt {
            Some(prompt) if !prompt.template.contains("{prompt}") => {
                Err(invalid("the prompt template has no {prompt}".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// True for names that stand in commands and addresses as they are.
pub(crate) fn plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with(['-', '.']) && name.chars().all(plain)
}
