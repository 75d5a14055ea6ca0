//! Multimodal checkpoints whose language model is of a known family: where its settings and its tensors
//! lie. A row says that of a `model_type`; the rules are those of transformers' `configuration_*.py`,
//! `modeling_*.py` and `conversion_mapping.py`.
//!
//! Text alone takes the language model's own way: three rotary positions (mrope) are equal then, what
//! images add to later blocks (deepstack) is nothing, and no token attends to later ones. So the language
//! model is computed, measured and quantized as one by itself, and all else is carried as it is stored.

use serde_json::{Map, Value};

use crate::Result;
use crate::families::{GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3};
use crate::family::{Family, Window};
use crate::fields::Fields;
use crate::stored_names::StoredNames;

/// Key of the language model's settings.
pub(crate) const TEXT: &str = "text_config";

/// A `model_type` of transformers that has a language model in it.
#[derive(Debug, PartialEq)]
pub(crate) struct Wrapper {
    /// `model_type`.
    pub(crate) name: &'static str,
    /// What the language model may be; the first is the default.
    texts: &'static [Text],
    /// The same for messages.
    supported: &'static str,
    /// Default of `tie_word_embeddings`.
    tied: bool,
    /// Settings of the language model may lie among the others instead of in an object of their own.
    flat: bool,
    /// How its tensors are called, as published and as saved since; the first is planned for where no
    /// weights are known.
    pub(crate) names: &'static [StoredNames],
    /// Where transformers 5 has its blocks.
    pub(crate) blocks: &'static str,
}

/// A language model.
#[derive(Debug, PartialEq)]
struct Text {
    family: Family,
    sizes: Sizes,
}

/// Sizes of a language model whose settings leave them out, as those of several published files do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) blocks: usize,
    pub(crate) heads: usize,
    pub(crate) vocabulary: usize,
}

impl Sizes {
    const fn of([hidden, intermediate, blocks, heads, vocabulary]: [usize; 5]) -> Self {
        Self { hidden, intermediate, blocks, heads, vocabulary }
    }
}

const LLAMA_TEXT: Text =
    Text { family: LLAMA, sizes: Sizes::of([4096, 11_008, 32, 32, 32_000]) };
const MISTRAL_TEXT: Text =
    Text { family: MISTRAL, sizes: Sizes::of([4096, 14_336, 32, 32, 32_000]) };
const QWEN2_TEXT: Text = Text { family: QWEN2, sizes: Sizes::of([4096, 22_016, 32, 32, 151_936]) };
const QWEN3_TEXT: Text = Text { family: QWEN3, sizes: Sizes::of([4096, 22_016, 32, 32, 151_936]) };
/// Without the cap on logits, which the model around it does not apply.
const GEMMA3_TEXT: Text = Text {
    family: Family { logit_cap: None, ..GEMMA3 },
    sizes: Sizes::of([2304, 9216, 26, 8, 262_208]),
};

const QWEN2_VL: Family = Family {
    name: "qwen2_vl_text",
    kv_heads: Some(8),
    norm_eps: ("rms_norm_eps", 1e-5),
    window: Window::From { default: 4096, first: 80 },
    theta: 1_000_000.0,
    mrope: true,
    ..QWEN2
};
const QWEN2_VL_TEXT: Text =
    Text { family: QWEN2_VL, sizes: Sizes::of([8192, 29_568, 80, 64, 152_064]) };
const QWEN2_5_VL_TEXT: Text =
    Text { family: Family { name: "qwen2_5_vl_text", ..QWEN2_VL }, ..QWEN2_VL_TEXT };
const QWEN3_VL_TEXT: Text = Text {
    family: Family {
        name: "qwen3_vl_text",
        context: 128_000,
        window: Window::All { default: None },
        theta: 500_000.0,
        mrope: true,
        ..QWEN3
    },
    sizes: Sizes::of([4096, 22_016, 32, 32, 151_936]),
};

/// A model of its own in a folder of others, as files were published.
const WHOLE: StoredNames =
    StoredNames { model: "language_model.model.", head: "language_model.lm_head.weight" };
/// As transformers has it since 4.52.
const INNER: StoredNames = StoredNames { model: "model.language_model.", head: "lm_head.weight" };
const TEXT_MODEL: StoredNames = StoredNames { model: "model.text_model.", head: "lm_head.weight" };

const LLAVA: Wrapper = Wrapper {
    name: "llava",
    texts: &[LLAMA_TEXT, MISTRAL_TEXT, QWEN2_TEXT, QWEN3_TEXT],
    supported: "one of `llama`, `mistral`, `qwen2` and `qwen3`",
    tied: false,
    flat: false,
    names: &[WHOLE, INNER],
    blocks: "model.language_model.layers",
};

const IDEFICS3: Wrapper = Wrapper {
    name: "idefics3",
    texts: &[LLAMA_TEXT],
    supported: "`llama`",
    names: &[TEXT_MODEL],
    blocks: "model.text_model.layers",
    ..LLAVA
};

const QWEN2_VL_WRAPPER: Wrapper = Wrapper {
    name: "qwen2_vl",
    texts: &[QWEN2_VL_TEXT],
    supported: "`qwen2_vl_text`",
    flat: true,
    names: &[StoredNames::PLAIN, INNER],
    ..LLAVA
};

pub(crate) static WRAPPERS: [Wrapper; 11] = [
    LLAVA,
    Wrapper { name: "llava_next", ..LLAVA },
    Wrapper {
        name: "llava_onevision",
        texts: &[QWEN2_TEXT, LLAMA_TEXT, MISTRAL_TEXT, QWEN3_TEXT],
        ..LLAVA
    },
    Wrapper {
        name: "mistral3",
        texts: &[MISTRAL_TEXT],
        supported: "`mistral`",
        tied: true,
        ..LLAVA
    },
    Wrapper {
        name: "internvl",
        texts: &[QWEN2_TEXT, QWEN3_TEXT, LLAMA_TEXT],
        supported: "one of `qwen2`, `qwen3` and `llama`",
        tied: true,
        ..LLAVA
    },
    Wrapper {
        name: "gemma3",
        texts: &[GEMMA3_TEXT],
        supported: "`gemma3_text`",
        tied: true,
        ..LLAVA
    },
    QWEN2_VL_WRAPPER,
    Wrapper {
        name: "qwen2_5_vl",
        texts: &[QWEN2_5_VL_TEXT],
        supported: "`qwen2_5_vl_text`",
        ..QWEN2_VL_WRAPPER
    },
    Wrapper {
        name: "qwen3_vl",
        texts: &[QWEN3_VL_TEXT],
        supported: "`qwen3_vl_text`",
        names: &[INNER],
        ..LLAVA
    },
    IDEFICS3,
    Wrapper { name: "smolvlm", ..IDEFICS3 },
];

/// `model_type` of every multimodal model whose language model the engine computes, with those of the
/// language models that it may have.
pub fn wrapper_names() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    WRAPPERS.iter().map(|w| (w.name, w.texts.iter().map(|text| text.family.name).collect()))
}

/// The language model that a config.json describes.
pub(crate) struct Language<'a> {
    /// What it is a part of, if it is not all.
    pub(crate) wrapper: Option<&'static Wrapper>,
    pub(crate) family: &'static Family,
    /// Its settings.
    pub(crate) fields: Fields<'a>,
    /// What these leave out; `None` where they may not.
    pub(crate) sizes: Option<Sizes>,
}

impl<'a> Language<'a> {
    /// The language model of the settings in a file.
    pub(crate) fn of(raw: &'a Map<String, Value>, file: &'a std::path::Path) -> Result<Self> {
        let fields = Fields::new(raw, file);
        let wrapper = WRAPPERS
            .iter()
            .find(|wrapper| fields.get("model_type").is_some_and(|name| name == wrapper.name));
        match wrapper {
            Some(wrapper) => wrapper.language(fields),
            None => {
                let family = Family::of(&fields)?;
                Ok(Self { wrapper: None, family, fields, sizes: None })
            }
        }
    }

    /// Default of `tie_word_embeddings`, which the wrapper says first and the language model then.
    pub(crate) fn tied(&self, top: &Fields<'_>) -> Result<bool> {
        const KEY: &str = "tie_word_embeddings";
        let default = self.wrapper.map_or(self.family.tied, |wrapper| wrapper.tied);
        for fields in [top, &self.fields] {
            if fields.get(KEY).is_some() {
                return fields.flag(KEY);
            }
        }
        Ok(default)
    }
}

impl Wrapper {
    /// The language model in it.
    fn language<'a>(&'static self, top: Fields<'a>) -> Result<Language<'a>> {
        let language = |family, sizes, fields| Language {
            wrapper: Some(self),
            family,
            fields,
            sizes: Some(sizes),
        };
        let first = &self.texts[0];
        let fields = match top.get(TEXT) {
            None if self.flat => return Ok(language(&first.family, first.sizes, top)),
            None => return Err(top.invalid(TEXT, "is missing".to_owned())),
            Some(Value::Object(raw)) => Fields { raw, file: top.file, within: "text_config." },
            Some(other) => {
                return Err(top.invalid(TEXT, format!("is `{other}`, expected an object")));
            }
        };
        let text = match fields.get("model_type") {
            None => first,
            Some(name) => {
                let known = self.texts.iter().find(|text| name == text.family.name);
                known.ok_or_else(|| fields.unsupported("model_type", name, self.supported))?
            }
        };
        Ok(language(&text.family, text.sizes, fields))
    }
}
