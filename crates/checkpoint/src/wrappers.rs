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
use crate::family::{Family, Mrope, Window};
use crate::fields::Fields;
use crate::names::TEXT_CONFIG;
use crate::stored_names::StoredNames;

pub(crate) const TIED: &str = "tie_word_embeddings";

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
    /// The language model may say it, too; of others transformers 5 does not look there.
    text_ties: bool,
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

const LLAMA_TEXT: Text = Text { family: LLAMA, sizes: Sizes::of([4096, 11_008, 32, 32, 32_000]) };
/// Without a list of blocks that slide, which is looked for in a model by itself alone.
const MISTRAL_TEXT: Text = Text {
    family: Family { window: Window::All { default: Some(4096) }, ..MISTRAL },
    sizes: Sizes::of([4096, 14_336, 32, 32, 32_000]),
};
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
    mrope: Some(Mrope::Beside([16, 24, 24])),
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
        window: Window::None,
        theta: 500_000.0,
        mrope: Some(Mrope::Interleaved),
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
    text_ties: true,
    flat: false,
    names: &[WHOLE, INNER],
    blocks: "model.language_model.layers",
};

const IDEFICS3: Wrapper = Wrapper {
    name: "idefics3",
    texts: &[LLAMA_TEXT],
    supported: "`llama`",
    text_ties: false,
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
    Wrapper { name: "llava_next", text_ties: false, ..LLAVA },
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
        text_ties: false,
        ..LLAVA
    },
    Wrapper {
        name: "internvl",
        texts: &[QWEN2_TEXT, QWEN3_TEXT, LLAMA_TEXT],
        supported: "one of `qwen2`, `qwen3` and `llama`",
        tied: true,
        text_ties: false,
        ..LLAVA
    },
    Wrapper {
        name: "gemma3",
        texts: &[GEMMA3_TEXT],
        supported: "`gemma3_text`",
        tied: true,
        text_ties: false,
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
        text_ties: false,
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

    /// Whether the head is the embedding, as transformers 5 has it: by the key of the whole, and for some
    /// also by that of the language model.
    pub(crate) fn tied(&self, top: &Fields<'_>) -> Result<bool> {
        let said = |fields: &Fields<'_>| match fields.get(TIED) {
            None => Ok(None),
            Some(_) => fields.flag(TIED).map(Some),
        };
        let (whole, text) = (said(top)?, said(&self.fields)?);
        let Some(wrapper) = self.wrapper else { return Ok(whole.unwrap_or(self.family.tied)) };
        if top.raw.get(TIED).is_some_and(Value::is_null) {
            return Err(top.invalid(TIED, "is `null`, expected a boolean".to_owned()));
        }
        Ok(whole.unwrap_or(wrapper.tied) || (wrapper.text_ties && text == Some(true)))
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
        let fields = match top.get(TEXT_CONFIG) {
            None if self.flat => return Ok(language(&first.family, first.sizes, top)),
            None => return Err(top.invalid(TEXT_CONFIG, "is missing".to_owned())),
            Some(Value::Object(raw)) => Fields { raw, file: top.file, within: "text_config." },
            Some(other) => {
                return Err(top.invalid(TEXT_CONFIG, format!("is `{other}`, expected an object")));
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::ModelConfig;

    fn parse(text: &str) -> crate::Result<ModelConfig> {
        ModelConfig::parse(text, Path::new("config.json"))
    }

    /// As in files of LLaVA 1.5 and Gemma 3, which leave out what transformers has as a default.
    #[test]
    fn sizes_that_are_left_out_are_those_of_transformers() {
        let sizes = |text: &str| {
            let c = parse(text).unwrap();
            let of_heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
            (c.hidden_size, c.intermediate_size, c.num_hidden_layers, of_heads, c.vocab_size)
        };
        let llava = r#"{"model_type":"llava","text_config":{"vocab_size":32064}}"#;
        assert_eq!(sizes(llava), (4096, 11_008, 32, (32, 32, 128), 32_064));
        let gemma = r#"{"model_type":"gemma3","text_config":{"model_type":"gemma3_text",
            "hidden_size":2560,"num_hidden_layers":34}}"#;
        assert_eq!(sizes(gemma), (2560, 9216, 34, (8, 4, 256), 262_208));
        // Settings beside the others, as Qwen's were published.
        let qwen = r#"{"model_type":"qwen2_5_vl","hidden_size":2048,"num_attention_heads":16,
            "num_key_value_heads":2,"rope_scaling":{"type":"mrope","mrope_section":[16,24,24]}}"#;
        assert_eq!(sizes(qwen), (2048, 29_568, 80, (16, 2, 128), 152_064));
        assert_eq!(parse(qwen).unwrap().norm_eps, 1e-5);
        // A model by itself has to say them.
        let message = parse(r#"{"model_type":"llama"}"#).unwrap_err().to_string();
        assert!(message.contains("`hidden_size` is missing"), "{message}");
    }

    #[test]
    fn the_head_is_tied_as_transformers_has_it() {
        let tied = |name: &str, top: &str, text: &str| {
            let text = format!(
                r#"{{"model_type":"{name}"{top},"text_config":{{"hidden_size":64{text}}}}}"#
            );
            parse(&text).unwrap().tie_word_embeddings
        };
        let [yes, no] = [r#","tie_word_embeddings":true"#, r#","tie_word_embeddings":false"#];
        assert!(!tied("llava", "", "") && tied("gemma3", "", ""));
        // tests/multimodal.rs has all of them, as transformers says it.
        assert!(tied("llava", "", yes) && !tied("llava_next", "", yes) && tied("gemma3", "", no));
        assert!(tied("llava", yes, no) && tied("llava", no, yes) && !tied("gemma3", no, yes));
    }

    #[test]
    fn names_are_told_by_what_is_stored() {
        let text = r#"{"model_type":"llava","text_config":{"hidden_size":64}}"#;
        let stored = |names: &[&'static str]| {
            let spec = |name: &str| {
                let dtype = safetensors::Dtype::I64;
                Some(crate::TensorSpec { name: name.to_owned(), dtype, shape: vec![1] })
            };
            let config = parse(text).unwrap().of_weights(names.iter().copied(), spec);
            let carried = config.carried().unwrap().iter().map(|spec| spec.name.clone());
            let shown = |name: &str| config.stored_name(name).into_owned();
            let plain = config.plain_name(names[0]).map(std::borrow::Cow::into_owned);
            (shown("model.layers.1.mlp"), shown(crate::HEAD), plain, carried.collect::<Vec<_>>())
        };
        let first = "language_model.model.layers.0.self_attn.q_proj.weight";
        let plain = Some("model.layers.0.self_attn.q_proj.weight".to_owned());
        let found =
            stored(&[first, "vision_tower.position_ids", "image_newline", "lm_head.weight"]);
        let names = ("language_model.model.layers.1.mlp", "language_model.lm_head.weight");
        // A head that is not where the language model is would take its place.
        let carried = vec!["image_newline".to_owned(), "vision_tower.position_ids".to_owned()];
        assert_eq!(found, (names.0.to_owned(), names.1.to_owned(), plain.clone(), carried));
        let later = "model.language_model.layers.0.self_attn.q_proj.weight";
        let (block, head, found, carried) = stored(&[later, "lm_head.weight"]);
        assert_eq!(
            (block.as_str(), head.as_str()),
            ("model.language_model.layers.1.mlp", crate::HEAD)
        );
        assert_eq!((found, carried), (plain, vec![]));
        // What other readers take for the language model's is no other part.
        let aliases =
            [first, "language_model.layers.0.mlp.up_proj.weight", "text_model.norm.weight"];
        assert_eq!(stored(&aliases).3, Vec::<String>::new());
        let names = parse(text)
            .unwrap()
            .of_weights(["language_model.lm_head.qweight"].into_iter(), |_| None);
        let head =
            names.plain_name("language_model.lm_head.qweight").map(std::borrow::Cow::into_owned);
        assert_eq!(head.as_deref(), Some("lm_head.qweight"));
    }

    #[test]
    fn parts_beside_a_language_model_without_a_folder_are_told_apart() {
        let text = r#"{"model_type":"qwen2_vl","hidden_size":64,"num_attention_heads":2,
            "num_key_value_heads":1,"rope_scaling":{"type":"mrope","mrope_section":[4,6,6]}}"#;
        let names = ["model.layers.0.mlp.up_proj.weight", "model.visual.blocks.0.norm1.weight"];
        let spec = |name: &str| {
            let dtype = safetensors::Dtype::F32;
            Some(crate::TensorSpec { name: name.to_owned(), dtype, shape: vec![1] })
        };
        let config = parse(text).unwrap().of_weights(names.into_iter(), spec);
        let carried: Vec<_> = config.carried().unwrap().iter().map(|spec| &spec.name).collect();
        assert_eq!(carried, [names[1]]);
        assert!(config.is_carried(names[1]) && !config.is_carried(names[0]));
        assert_eq!(
            (config.plain_name(names[0]).as_deref(), config.plain_name(names[1])),
            (Some(names[0]), None)
        );
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, named) in [
            (r#"{"model_type":"paligemma","text_config":{}}"#, "the language model of `llava`"),
            (r#"{"model_type":"llava"}"#, "`text_config` is missing"),
            (r#"{"model_type":"llava","text_config":7}"#, "`text_config` is `7`"),
            (
                r#"{"model_type":"llava","text_config":{"model_type":"opt"}}"#,
                "`text_config.model_type` is `\"opt\"`, which is not supported; only one of `llama`",
            ),
            (
                r#"{"model_type":"mistral3","text_config":{"model_type":"ministral3"}}"#,
                "only `mistral` is",
            ),
            (
                r#"{"model_type":"llava","text_config":{"hidden_act":"gelu"}}"#,
                "`text_config.hidden_act`",
            ),
            // The model around it leaves the cap out.
            (
                r#"{"model_type":"gemma3","text_config":{"final_logit_softcapping":30.0}}"#,
                "`text_config.final_logit_softcapping`",
            ),
            (
                r#"{"model_type":"gemma3","text_config":{"use_bidirectional_attention":true}}"#,
                "`text_config.use_bidirectional_attention`",
            ),
            (
                r#"{"model_type":"llama","hidden_size":64,"intermediate_size":64,"vocab_size":9,
                "num_hidden_layers":1,"num_attention_heads":2,"rope_scaling":{"type":"mrope"}}"#,
                "mrope",
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(named), "{text}: {message}");
        }
    }
}
