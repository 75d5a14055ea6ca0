//! What a language model's configuration says of the parts around it, and of the names that its tensors are
//! stored under.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::names::TEXT_CONFIG;
use crate::stored_names::{StoredNames, is_plain, likely_plain};
use crate::wrappers::TIED;
use crate::{ModelConfig, TensorSpec};

impl ModelConfig {
    /// `model_type` of the whole, of which the language model is a part; `None` where it is all.
    #[must_use]
    pub fn wrapper(&self) -> Option<&'static str> {
        self.wrapper.map(|wrapper| wrapper.name)
    }

    /// The tensors of the other parts by name, which belong to every checkpoint made from this one as they are;
    /// `None` where there are other parts, but no weights are known.
    #[must_use]
    pub fn carried(&self) -> Option<&[TensorSpec]> {
        self.carried.as_deref()
    }

    /// Whether the tensor that is stored under this name is one of those.
    #[must_use]
    pub fn is_carried(&self, stored: &str) -> bool {
        let carried = self.carried.as_deref().unwrap_or_default();
        carried.binary_search_by(|spec| spec.name.as_str().cmp(stored)).is_ok()
    }

    /// The name that a tensor of the language model is stored under. Everywhere else it is called as in a
    /// model by itself.
    #[must_use]
    pub fn stored_name<'a>(&self, name: &'a str) -> Cow<'a, str> {
        self.names.stored(name)
    }

    /// The name in a model by itself of what is stored under this name; `None` where it is of another part.
    #[must_use]
    pub fn plain_name<'a>(&self, stored: &'a str) -> Option<Cow<'a, str>> {
        let plain = self.names.plain(stored)?;
        // Beside a language model that has no folder of its own lie the other parts.
        let beside = self.wrapper.is_some() && self.names == StoredNames::PLAIN;
        (!beside || is_plain(&plain)).then_some(plain)
    }

    /// A size of experts that the configuration leaves out, where a tensor of this name shows it: its key and
    /// what is taken for it.
    pub(crate) fn assumed_of(&self, tensor: &str) -> Option<(&'static str, usize)> {
        let shows = tensor.contains(".experts.") || self.dense_named(tensor).is_some();
        let rules = self.rules.experts.filter(|_| shows)?;
        self.settings().next().and_then(|keys| rules.assumed(keys).next())
    }

    /// What names of the language model's tensors begin with where that is not where transformers 5 has them
    /// in memory, and where that is.
    pub(crate) fn other_names(&self) -> Option<(&'static str, &'static str)> {
        let (blocks, model) = (self.wrapper?.blocks, self.names.model);
        (blocks.strip_suffix("layers") != Some(model)).then_some((model, blocks))
    }

    /// The same model whose weights have tensors of these names, of which `spec` knows types and shapes.
    pub(crate) fn of_weights<'n>(
        mut self,
        names: impl Iterator<Item = &'n str> + Clone,
        spec: impl Fn(&'n str) -> Option<TensorSpec>,
    ) -> Self {
        let Some(wrapper) = self.wrapper else { return self };
        let fitting = wrapper.names.iter().find(|stored| stored.fit(names.clone()));
        self.names = *fitting.unwrap_or(&wrapper.names[0]);
        // What some reader would take for a tensor of the language model is no other part.
        let others =
            names.filter(|name| self.plain_name(name).is_none() && likely_plain(name).is_none());
        let mut carried: Vec<TensorSpec> = others.filter_map(spec).collect();
        carried.sort_by(|a, b| a.name.cmp(&b.name));
        self.carried = Some(carried);
        self
    }

    /// The settings of the language model, and those of the whole where it is a part.
    pub(crate) fn settings(&self) -> impl Iterator<Item = &Map<String, Value>> {
        let text = self.wrapper.and_then(|_| self.raw.get(TEXT_CONFIG)).and_then(Value::as_object);
        text.into_iter().chain([&self.raw])
    }

    /// The language model's settings tie the head, where nobody looks for that.
    pub(crate) fn is_tied_by_text_alone(&self) -> bool {
        let text = self.settings().next().and_then(|keys| keys.get(TIED));
        self.wrapper.is_some() && !self.tie_word_embeddings && text == Some(&Value::Bool(true))
    }

    /// The type that config.json says the language model's weights are stored in.
    #[must_use]
    pub fn stored_dtype(&self) -> Option<&str> {
        self.settings().find_map(|keys| keys.get("dtype").or(keys.get("torch_dtype"))?.as_str())
    }
}
