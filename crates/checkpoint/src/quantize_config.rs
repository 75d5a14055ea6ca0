//! `quantize_config.json` and config.json's `quantization_config`: what a loader needs to know.
//!
//! Programs disagree on the names of keys and on the file that they write, so what is read here is
//! the sum of both files: each setting from whichever says it. What they contradict each other in is
//! refused.
//!
//! The text that is written has two readers that set its limits. AutoGPTQ up to 0.4 hands every key
//! of `quantize_config.json` to a constructor and dies on one that it does not know, so nothing
//! beyond its own keys may appear there; transformers reads config.json and requires
//! `quant_method`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::names::{CONFIG_FILE, QUANTIZE_CONFIG_FILE, TEXT_CONFIG};
use crate::quantize_keys::{Keys, OBJECT, Sources};
use crate::wrappers::Wrapper;
use crate::{Bits, CheckpointFormat, Error, GroupSize, Layout, Result, json};

/// How a checkpoint is quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeConfig {
    /// Code width.
    pub bits: Bits,
    /// Columns of a group; `None` is -1 in the file: all of `in_features`.
    pub group_size: Option<usize>,
    /// Damp as a fraction of the Hessian's mean diagonal.
    pub damp_percent: f64,
    /// Columns were solved by descending diagonal of the Hessian.
    pub desc_act: bool,
    /// Symmetric grid.
    pub sym: bool,
    /// Each linear was solved with the linears before it quantized.
    pub true_sequential: bool,
    /// Name of the weight file without `.safetensors`; `None` means AutoGPTQ's own scheme.
    pub model_file_base_name: Option<String>,
    /// How zeros are stored.
    pub checkpoint_format: CheckpointFormat,
    /// The linears of a block that are quantized, such as `self_attn.q_proj`; `None` for all.
    pub modules_in_block: Option<Vec<String>>,
}

impl QuantizeConfig {
    /// A symmetric, true-sequential branch in `model.safetensors`, as this program makes them.
    #[must_use]
    pub fn new(bits: Bits, group_size: Option<usize>, damp_percent: f64, desc_act: bool) -> Self {
        Self {
            bits,
            group_size,
            damp_percent,
            desc_act,
            sym: true,
            true_sequential: true,
            model_file_base_name: Some("model".to_owned()),
            checkpoint_format: CheckpointFormat::Gptq,
            modules_in_block: None,
        }
    }

    /// Parses the text of a `quantize_config.json`, or a `quantization_config`; `file` is for
    /// messages.
    ///
    /// # Errors
    /// [`Error::Json`], [`Error::InvalidConfig`] for missing or impossible settings, and
    /// [`Error::UnsupportedConfig`] for ones that change the meaning of the tensors.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let map = serde_json::from_str(text).map_err(Error::json(file))?;
        let place = file.display().to_string();
        settings(&Sources { keys: vec![Keys { map: &map, file, place }], agreeing: true })
    }

    /// Reads `quantize_config.json` and `quantization_config` of the config; `None` for a dense
    /// checkpoint. Where both are there, each may say what the other does not. `agreeing` refuses
    /// what they contradict each other in; otherwise the first holds.
    pub(crate) fn load(
        dir: &Path,
        config: &Map<String, Value>,
        agreeing: bool,
    ) -> Result<Option<Self>> {
        let (file, config_file) = (dir.join(QUANTIZE_CONFIG_FILE), dir.join(CONFIG_FILE));
        let map = match json::text(&file) {
            Ok(text) => Some(serde_json::from_str(&text).map_err(Error::json(&file))?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io("read", &file)(e)),
        };
        let mut keys = Vec::new();
        if let Some(map) = &map {
            keys.push(Keys { map, file: &file, place: QUANTIZE_CONFIG_FILE.to_owned() });
        }
        match config.get(OBJECT) {
            None | Some(Value::Null) => {}
            Some(Value::Object(map)) => {
                let place = format!("{OBJECT} of {CONFIG_FILE}");
                keys.push(Keys { map, file: &config_file, place });
            }
            Some(other) => {
                let reason = format!("is `{other}`, expected an object");
                let (path, key) = (config_file, OBJECT.to_owned());
                return Err(Error::InvalidConfig { path, key, reason });
            }
        }
        if keys.is_empty() {
            return Ok(None);
        }
        settings(&Sources { keys, agreeing }).map(Some)
    }

    /// Whether a linear of a block, such as `self_attn.q_proj`, is quantized.
    #[must_use]
    pub fn quantizes(&self, linear: &str) -> bool {
        self.modules_in_block.as_ref().is_none_or(|names| names.iter().any(|name| name == linear))
    }

    /// Groups of a linear with this input width; a last group may be ragged.
    #[must_use]
    pub fn groups(&self, in_features: usize) -> usize {
        self.group_size.map_or(1, |size| in_features.div_ceil(size))
    }

    /// Name of the weight file without `.safetensors`.
    #[must_use]
    pub fn file_stem(&self) -> String {
        let scheme = || format!("gptq_model-{}bit-{}g", self.bits, self.stored_group_size());
        self.model_file_base_name.clone().unwrap_or_else(scheme)
    }

    /// The group size as files say it: -1 for all of `in_features`.
    pub(crate) fn stored_group_size(&self) -> i64 {
        GroupSize(self.group_size).stored()
    }

    /// Text of `quantize_config.json`: indent 2, no newline at the end.
    ///
    /// # Errors
    /// [`Error::Json`] if the text cannot be made.
    pub fn file_text(&self, layout: Layout) -> Result<String> {
        json::indented(&self.keys(layout)).map_err(Error::json(Path::new(QUANTIZE_CONFIG_FILE)))
    }

    /// Text of config.json: the base's keys in their order, `quantization_config` last. The type of
    /// the tensors is what is written, fp16; the `card` layout keeps the base's, as the published
    /// branches do, but for bfloat16, which loaders would run the kernels in. Of a model with other parts
    /// their types stay, and optimum is told where the quantized blocks are.
    pub(crate) fn config_text(
        &self,
        base: &Map<String, Value>,
        wrapper: Option<&Wrapper>,
        layout: Layout,
    ) -> Result<String> {
        let mut config = base.clone();
        config.shift_remove("quantization_config");
        set_type(&mut config, layout);
        if let (Some(_), Some(Value::Object(text))) = (wrapper, config.get_mut(TEXT_CONFIG)) {
            set_type(text, layout);
        }
        let mut keys = self.keys(layout);
        if layout == Layout::Modern {
            keys.insert("checkpoint_format".to_owned(), json!("gptq"));
        }
        if let Some(wrapper) = wrapper {
            keys.insert("block_name_to_quantize".to_owned(), json!(wrapper.blocks));
        }
        keys.insert("quant_method".to_owned(), json!("gptq"));
        config.insert("quantization_config".to_owned(), Value::Object(keys));
        json::indented(&config).map_err(Error::json(Path::new(CONFIG_FILE)))
    }

    /// AutoGPTQ's keys in its order: those of 0.3 for the published branches, with the
    /// `static_groups` that 0.4 adds otherwise.
    fn keys(&self, layout: Layout) -> Map<String, Value> {
        let static_groups = (layout == Layout::Modern).then(|| ("static_groups", json!(false)));
        [
            ("bits", json!(self.bits.get())),
            ("group_size", json!(self.stored_group_size())),
            ("damp_percent", json!(self.damp_percent)),
            ("desc_act", json!(self.desc_act)),
        ]
        .into_iter()
        .chain(static_groups)
        .chain([
            ("sym", json!(self.sym)),
            ("true_sequential", json!(self.true_sequential)),
            ("model_name_or_path", Value::Null),
            ("model_file_base_name", json!(self.model_file_base_name)),
        ])
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
    }
}

/// Says the type of what is written.
fn set_type(config: &mut Map<String, Value>, layout: Layout) {
    for key in ["torch_dtype", "dtype"] {
        let Some(stored) = config.get_mut(key).filter(|value| value.is_string()) else {
            continue;
        };
        if layout == Layout::Modern || stored == "bfloat16" {
            *stored = json!("float16");
        }
    }
}

/// What the places say, put together.
fn settings(sources: &Sources<'_>) -> Result<QuantizeConfig> {
    sources.keys.iter().try_for_each(Keys::check)?;
    let bits = sources.merged(Keys::bits)?;
    let group_size = sources.merged(Keys::group_size)?;
    let flag = |key, default| {
        let read = |keys: &Keys<'_>| keys.typed(key, Value::as_bool);
        Ok::<_, Error>(sources.merged(read)?.unwrap_or(default))
    };
    Ok(QuantizeConfig {
        bits: bits.ok_or_else(|| sources.missing("bits", &["wbits", "w_bit", "w_bits"]))?,
        group_size: group_size
            .ok_or_else(|| sources.missing("group_size", &["groupsize", "q_group_size"]))?,
        // How it was made changes nothing that is read.
        damp_percent: sources
            .first(|keys| keys.typed("damp_percent", Value::as_f64))?
            .unwrap_or(0.01),
        desc_act: flag("desc_act", false)?,
        sym: flag("sym", true)?,
        true_sequential: sources
            .first(|keys| keys.typed("true_sequential", Value::as_bool))?
            .unwrap_or(true),
        // Files are renamed, and then the name beside them is the one that is changed.
        model_file_base_name: sources.keys[0].base_name()?.map(|(_, name)| name),
        checkpoint_format: sources.merged(Keys::format)?.unwrap_or(CheckpointFormat::Gptq),
        modules_in_block: sources.merged(Keys::modules)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_GROUP_SIZE;

    fn config(group_size: Option<usize>, desc_act: bool) -> QuantizeConfig {
        QuantizeConfig::new(Bits::Four, group_size, 0.01, desc_act)
    }

    #[test]
    fn card_text_has_the_published_bytes() {
        let text = |group_size, act| config(group_size, act).file_text(Layout::Card).unwrap();
        assert_eq!(
            text(None, true),
            "{\n  \"bits\": 4,\n  \"group_size\": -1,\n  \"damp_percent\": 0.01,\n  \
             \"desc_act\": true,\n  \"sym\": true,\n  \"true_sequential\": true,\n  \
             \"model_name_or_path\": null,\n  \"model_file_base_name\": \"model\"\n}"
        );
        assert_eq!(text(None, true).len(), 186);
        assert_eq!(text(Some(32), true).len(), 186);
        assert_eq!(text(Some(128), true).len(), 187);
        assert_eq!(text(Some(128), false).len(), 188);
    }

    #[test]
    fn config_json_has_the_published_length() {
        // The published base is 629 bytes without its newline, and its quantized form 888.
        let base: Map<String, Value> =
            serde_json::from_str(r#"{"z": 1, "rms_norm_eps": 1e-05}"#).unwrap();
        let before = json::indented(&base).unwrap();
        assert_eq!(before, "{\n  \"z\": 1,\n  \"rms_norm_eps\": 1e-05\n}");
        let added = |group_size, act| {
            let text = config(group_size, act).config_text(&base, None, Layout::Card).unwrap();
            assert!(text.ends_with("\"quant_method\": \"gptq\"\n  }\n}"));
            text.len() - before.len()
        };
        assert_eq!(added(Some(64), true), 888 - 629);
        assert_eq!(added(Some(128), true), 889 - 629);
        assert_eq!(added(Some(128), false), 890 - 629);
    }

    #[test]
    fn a_former_quantization_is_replaced_and_order_kept() {
        let base = r#"{"z":1,"quantization_config":{},"a":2,"b":3}"#;
        let base: Map<String, Value> = serde_json::from_str(base).unwrap();
        let text = config(Some(32), true).config_text(&base, None, Layout::Modern).unwrap();
        let read: Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["z", "a", "b", "quantization_config"]);
    }

    #[test]
    fn modern_adds_only_what_autogptq_0_4_knows() {
        let text = config(None, true).file_text(Layout::Modern).unwrap();
        assert!(text.contains("\"desc_act\": true,\n  \"static_groups\": false,\n  \"sym\""));
        assert!(!text.contains("quant_method") && !text.contains("checkpoint_format"));
    }

    #[test]
    fn what_was_written_is_read_back() {
        for group_size in [None, Some(32), Some(MAX_GROUP_SIZE)] {
            for layout in [Layout::Card, Layout::Modern] {
                let written = config(group_size, true);
                let text = written.file_text(layout).unwrap();
                assert_eq!(QuantizeConfig::parse(&text, Path::new("f")).unwrap(), written);
            }
        }
    }

    #[test]
    fn other_formats_and_nonsense_are_refused() {
        for (rest, named) in [
            (r#""quant_method":"awq""#, "quant_method"),
            (r#""is_marlin_format":true"#, "is_marlin_format"),
            (r#""dynamic":{"x":{}}"#, "dynamic"),
            (r#""checkpoint_format":"marlin""#, "checkpoint_format"),
            (r#""format":"marlin""#, "format"),
            (r#""modules_in_block_to_quantize":[1]"#, "modules_in_block_to_quantize"),
            (r#""bits":5"#, "bits"),
            (r#""group_size":0"#, "group_size"),
            (r#""group_size":-2"#, "group_size"),
            (r#""group_size":268435457"#, "1 to 268435456"),
            (r#""group_size":18446744073709551615"#, "1 to 268435456"),
            (r#""desc_act":"yes""#, "desc_act"),
            (r#""model_file_base_name":"../x""#, "model_file_base_name"),
        ] {
            let text = format!(r#"{{"bits":4,"group_size":128,{rest}}}"#);
            let message = QuantizeConfig::parse(&text, Path::new("f")).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        assert!(QuantizeConfig::parse("", Path::new("f")).is_err());
    }

    fn parse(rest: &str) -> Result<QuantizeConfig> {
        let text = format!(r#"{{"bits":4,"group_size":32,{rest}}}"#);
        QuantizeConfig::parse(&text, Path::new("f"))
    }

    #[test]
    fn both_names_of_the_format_are_read_and_have_to_agree() {
        for (rest, v2) in [
            (r#""format":"gptq_v2""#, true),
            (r#""format":"gptq""#, false),
            (r#""format":null,"checkpoint_format":"gptq_v2""#, true),
            (r#""format":"gptq_v2","checkpoint_format":"gptq_v2""#, true),
        ] {
            let format = parse(rest).unwrap().checkpoint_format;
            assert_eq!(format == CheckpointFormat::GptqV2, v2, "{rest}");
        }
        let message = parse(r#""format":"gptq_v2","checkpoint_format":"gptq""#).unwrap_err();
        let message = message.to_string();
        assert!(message.contains("`format` is `gptq_v2`"), "{message}");
        assert!(message.contains("`checkpoint_format` is `gptq`"), "{message}");
    }

    #[test]
    fn names_of_linears_come_flat_or_in_lists() {
        for list in [r#"["mlp.up_proj","a"]"#, r#"[["mlp.up_proj"],["a"]]"#] {
            let config = parse(&format!(r#""modules_in_block_to_quantize":{list}"#)).unwrap();
            assert!(config.quantizes("mlp.up_proj") && !config.quantizes("mlp.down_proj"));
        }
        assert!(parse(r#""sym":true"#).unwrap().quantizes("mlp.down_proj"));
    }

    #[test]
    fn names_that_others_give_a_setting_are_pointed_out() {
        let message = |text| QuantizeConfig::parse(text, Path::new("f")).unwrap_err().to_string();
        let bits = message(r#"{"wbits":4,"groupsize":128}"#);
        assert!(bits.contains("`bits` is missing") && bits.contains("`wbits`"), "{bits}");
        let group = message(r#"{"bits":4,"groupsize":128}"#);
        assert!(group.contains("`group_size` is missing") && group.contains("`groupsize`"));
        assert_eq!(message(r#"{"bits":null,"group_size":1}"#), "`f`: `bits` is missing");
    }
}
