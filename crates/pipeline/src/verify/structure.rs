//! Configuration files and the list of tensors: what can be checked before a value is read.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;

use gptq_checkpoint::loaders::{Architecture, Bias, LoaderFacts, asks_for_bfloat16};
use gptq_checkpoint::{
    Bits, CONFIG_FILE, Checkpoint, DType, G_IDX, Head, Layout, LinearShape, ModelConfig,
    QUANTIZE_CONFIG_FILE, QuantizeConfig, SCALES, TensorSpec, json_text, tensor_specs,
};
use gptq_report::units::group;
use serde_json::{Map, Value};

use super::contents::Values;
use super::findings::{Check, Findings};
use crate::error::Result;

/// The two places that say how a checkpoint is quantized.
pub(super) struct ConfigFiles {
    /// The keys of each, by the name of its file; absent where the file or the key is.
    found: BTreeMap<&'static str, std::result::Result<Map<String, Value>, String>>,
}

impl ConfigFiles {
    /// Reads both files of a folder.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let mut found = BTreeMap::new();
        for name in [QUANTIZE_CONFIG_FILE, CONFIG_FILE] {
            let path = dir.join(name);
            let text = match json_text(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(source) => return Err(gptq_records::Error::io("read", &path)(source).into()),
            };
            let parsed = serde_json::from_str::<Map<String, Value>>(&text);
            match (parsed, name) {
                (Err(e), _) => drop(found.insert(name, Err(format!("is not JSON: {e}")))),
                (Ok(keys), QUANTIZE_CONFIG_FILE) => drop(found.insert(name, Ok(keys))),
                (Ok(mut keys), _) => match keys.remove("quantization_config") {
                    Some(Value::Object(keys)) => drop(found.insert(name, Ok(keys))),
                    _ => continue,
                },
            }
        }
        Ok(Self { found })
    }

    fn keys(&self, name: &str) -> Option<&Map<String, Value>> {
        self.found.get(name)?.as_ref().ok()
    }
}

/// Bits and groups as the tensors have them; what the configuration says where they do not show it.
pub(super) fn stored_settings(checkpoint: &Checkpoint) -> QuantizeConfig {
    let mut settings = checkpoint.quantize_config().cloned().unwrap_or_else(|| {
        // A dense checkpoint never comes here; these settings describe none of its tensors.
        QuantizeConfig::new(Bits::Four, None, 0.01, false)
    });
    let linears = packed_linears(checkpoint);
    if linears.is_empty() {
        return settings;
    }
    let fits_bits = |bits: Bits| linears.iter().all(|l| l.words == Some(bits.words(l.shape.0)));
    if let Some(bits) = Bits::ALL.into_iter().find(|&bits| fits_bits(bits)) {
        settings.bits = bits;
    }
    let fits = |size: Option<usize>| {
        let groups = |columns: usize| size.map_or(1, |size| columns.div_ceil(size));
        linears.iter().all(|l| l.groups == Some(groups(l.shape.0)))
    };
    if !fits(settings.group_size) {
        // The first group is never the ragged one, so its columns are a whole group's.
        let widest = linears.iter().max_by_key(|l| l.groups);
        let counted = widest.and_then(|l| first_group(checkpoint, &l.name, l.shape.0));
        // Where the index does not show them, groups of one size do.
        let even = widest.and_then(|l| Some(l.shape.0.div_ceil(l.groups?.max(1))));
        let candidates = [None, counted, even];
        if let Some(size) = candidates.into_iter().find(|&size| fits(size)) {
            settings.group_size = size;
        }
    }
    settings
}

/// The shapes of a packed linear's tensors, as far as they are there.
struct PackedLinear {
    name: String,
    /// Inputs and outputs that the model needs.
    shape: (usize, usize),
    /// Rows of qweight.
    words: Option<usize>,
    /// Rows of scales.
    groups: Option<usize>,
}

fn packed_linears(checkpoint: &Checkpoint) -> Vec<PackedLinear> {
    let rows = |name: &str, leaf: &str| {
        let tensor = checkpoint.tensor(&format!("{name}.{leaf}")).ok()?;
        tensor.shape.first().copied()
    };
    let stored = |(name, shape): (String, LinearShape)| PackedLinear {
        words: rows(&name, "qweight"),
        groups: rows(&name, "scales"),
        shape: (shape.in_features, shape.out_features),
        name,
    };
    let linears = checkpoint.config().linears();
    linears.filter(|(name, _)| checkpoint.has_gptq_linear(name)).map(stored).collect()
}

/// Columns of group 0.
fn first_group(checkpoint: &Checkpoint, linear: &str, columns: usize) -> Option<usize> {
    let g_idx = checkpoint.tensor(&format!("{linear}.g_idx")).ok()?;
    let members = g_idx.to_f32().iter().filter(|&&group| group == 0.0).count();
    (g_idx.shape == [columns] && members > 0).then_some(members)
}

/// Both configuration files: there, readable, in agreement with each other and, where the tensors
/// are known, with them; and the weights' metadata.
pub(super) fn check_configs(
    files: &ConfigFiles,
    stored: Option<(&Checkpoint, &QuantizeConfig)>,
    findings: &mut Findings,
) {
    findings.examine(Check::Configuration, 2);
    let mut parsed = Vec::new();
    for name in [QUANTIZE_CONFIG_FILE, CONFIG_FILE] {
        let problem = match files.found.get(name) {
            None if name == CONFIG_FILE => {
                "has no quantization_config: transformers needs it".to_owned()
            }
            // Transformers and others write config.json alone; the table says who needs more.
            None => continue,
            Some(Err(problem)) => problem.clone(),
            Some(Ok(keys)) => {
                let text = Value::Object(keys.clone()).to_string();
                match QuantizeConfig::parse(&text, Path::new(name)) {
                    Ok(config) => {
                        parsed.push((name, config));
                        continue;
                    }
                    Err(error) => {
                        findings.add_error(Check::Configuration, name, error);
                        continue;
                    }
                }
            }
        };
        findings.add(Check::Configuration, name, problem);
    }
    if let Some((_, stored)) = stored {
        for (name, config) in &parsed {
            check_against_tensors(name, config, stored, findings);
        }
    }
    if let [(_, one), (_, other)] = parsed.as_slice() {
        check_agreement(one, other, findings);
    }
    if let Some((checkpoint, stored)) = stored {
        check_metadata(checkpoint, stored, findings);
    }
}

fn check_against_tensors(
    name: &str,
    config: &QuantizeConfig,
    stored: &QuantizeConfig,
    findings: &mut Findings,
) {
    if config.bits != stored.bits {
        let message = format!("says {} bits, but the tensors have {}", config.bits, stored.bits);
        findings.add(Check::Configuration, name, message);
    }
    if config.group_size != stored.group_size {
        let message = format!(
            "says group size {}, but the tensors have {}",
            group(config.group_size),
            group(stored.group_size)
        );
        findings.add(Check::Configuration, name, message);
    }
}

fn check_agreement(one: &QuantizeConfig, other: &QuantizeConfig, findings: &mut Findings) {
    let pairs = |c: &QuantizeConfig| {
        [
            ("bits", c.bits.to_string()),
            ("group_size", group(c.group_size)),
            ("damp_percent", c.damp_percent.to_string()),
            ("desc_act", c.desc_act.to_string()),
            ("sym", c.sym.to_string()),
            ("true_sequential", c.true_sequential.to_string()),
            ("checkpoint_format", c.checkpoint_format.name().to_owned()),
            ("modules_in_block_to_quantize", modules(c)),
        ]
    };
    // That only one of them names the file is no contradiction.
    let names = one.model_file_base_name.as_deref().zip(other.model_file_base_name.as_deref());
    let names =
        names.map(|(mine, theirs)| ["model_file_base_name", mine, theirs].map(str::to_owned));
    let settings = pairs(one).into_iter().zip(pairs(other));
    let settings = settings.map(|((key, mine), (_, theirs))| [key.to_owned(), mine, theirs]);
    for [key, mine, theirs] in settings.chain(names) {
        if mine != theirs {
            let message =
                format!("{key} is {mine} in {QUANTIZE_CONFIG_FILE} and {theirs} in {CONFIG_FILE}");
            findings.add(Check::Configuration, CONFIG_FILE, message);
        }
    }
}

/// The linears that are quantized.
fn modules(config: &QuantizeConfig) -> String {
    let Some(mut names) = config.modules_in_block.clone() else { return "all".to_owned() };
    names.sort();
    names.join(", ")
}

/// What the headers of the weight files say beside their tensors.
fn check_metadata(checkpoint: &Checkpoint, stored: &QuantizeConfig, findings: &mut Findings) {
    let desc_act = if stored.desc_act { "True" } else { "False" };
    let group_size = gptq_checkpoint::GroupSize(stored.group_size).stored();
    let expected = [
        ("gptq_bits", stored.bits.to_string()),
        ("gptq_group_size", group_size.to_string()),
        ("gptq_desc_act", desc_act.to_owned()),
    ];
    for file in checkpoint.weight_files() {
        findings.examine(Check::Configuration, 1);
        let place = file.path.file_name().unwrap_or_default().to_string_lossy();
        match file.metadata.get("format").map(String::as_str) {
            Some("pt") => {}
            Some(other) => {
                let message = format!("has the metadata format = {other}, expected pt");
                findings.add(Check::Configuration, place.as_ref(), message);
            }
            None => {
                let message = "lacks the metadata format = pt, which transformers requires";
                findings.add(Check::Configuration, place.as_ref(), message);
            }
        }
        for (key, wanted) in &expected {
            if let Some(found) = file.metadata.get(*key).filter(|found| *found != wanted) {
                let message = format!("has the metadata {key} = {found}, expected {wanted}");
                findings.add(Check::Configuration, place.as_ref(), message);
            }
        }
    }
}

/// Names, types and shapes of all tensors, and the index; gives the layout that they follow.
pub(super) fn check_tensors(
    checkpoint: &Checkpoint,
    stored: &QuantizeConfig,
    findings: &mut Findings,
) -> Layout {
    let modern = tensor_specs(checkpoint.config(), stored, Layout::Modern);
    let required: BTreeSet<String> = modern.into_iter().map(|spec| spec.name).collect();
    // What the card layout adds, programs write in part: biases without frequencies, or the reverse.
    let card = tensor_specs(checkpoint.config(), stored, Layout::Card);
    let known: BTreeSet<&str> = card.iter().map(|spec| spec.name.as_str()).collect();
    let mut layout = Layout::Modern;
    for spec in &card {
        let (name, needed) = (&spec.name, required.contains(&spec.name));
        if checkpoint.contains(name) {
            findings.examine(Check::Tensors, 1);
            check_tensor(checkpoint, spec, findings);
            layout = if needed { layout } else { Layout::Card };
        } else if needed {
            findings.examine(Check::Tensors, 1);
            if let Some(message) = missing(checkpoint, stored, name) {
                findings.add(Check::Tensors, name.clone(), message);
            }
        }
    }
    let config = checkpoint.config();
    let of_known =
        |name: &str| known.contains(&*config.plain_name(name).unwrap_or(Cow::Borrowed(name)));
    for name in checkpoint.names().filter(|name| !of_known(name)) {
        findings.add(Check::Tensors, name, "is not part of such a checkpoint");
    }
    check_index(checkpoint, findings);
    layout
}

/// What a tensor claims to be, against what its role requires.
fn check_tensor(checkpoint: &Checkpoint, spec: &TensorSpec, findings: &mut Findings) {
    // What is carried is of the types and shapes that it is planned as.
    if checkpoint.config().carried().is_some_and(|carried| carried.contains(spec)) {
        return;
    }
    match checkpoint.tensor(&spec.name) {
        Err(error) => findings.add_error(Check::Tensors, spec.name.clone(), error),
        Ok(tensor) => {
            let mut fault = |message| findings.add(Check::Tensors, spec.name.clone(), message);
            if !takes(spec, tensor.dtype) {
                let (found, wanted) = (tensor.dtype.name(), spec.dtype);
                fault(format!("is stored as {found}, expected {wanted}"));
            }
            if tensor.shape != spec.shape {
                fault(format!("has shape {:?}, expected {:?}", tensor.shape, spec.shape));
            }
        }
    }
}

/// Why a required tensor that is not there is a fault; a group index is none where the order of the
/// columns is known without it.
fn missing(checkpoint: &Checkpoint, stored: &QuantizeConfig, name: &str) -> Option<String> {
    let Some(linear) = name.strip_suffix(".g_idx") else { return Some("is missing".to_owned()) };
    let shape = checkpoint.config().linear_named(linear)?;
    stored.order_is_stored(shape.in_features).then(|| {
        "is missing: with act-order only it says which group a column belongs to".to_owned()
    })
}

/// Loaders cast what is not quantized; the tensors of a linear have one type each.
fn takes(spec: &TensorSpec, found: DType) -> bool {
    let cast = !spec.is(DType::I32) && !spec.name.ends_with(".scales");
    spec.is(found) || (cast && found != DType::I32)
}

/// Every tensor of every shard is in the index, and the index knows how much that is.
fn check_index(checkpoint: &Checkpoint, findings: &mut Findings) {
    for file in checkpoint.weight_files() {
        let place = file.path.file_name().unwrap_or_default().to_string_lossy();
        for name in &file.unindexed {
            let message = format!("holds {name}, which the index does not name");
            findings.add(Check::Files, place.as_ref(), message);
        }
        for name in &file.absent {
            let message = format!("lacks {name}, which the index places there");
            findings.add(Check::Files, place.as_ref(), message);
        }
    }
    let Some((name, total)) = index_total(checkpoint) else { return };
    let tensors = checkpoint.names().filter_map(|name| checkpoint.stored(name).ok());
    let bytes: u64 = tensors.map(|tensor| tensor.bytes.len() as u64).sum();
    if total != bytes {
        let message = format!("says total_size {total}, but the tensors have {bytes} bytes");
        findings.add(Check::Files, name, message);
    }
}

/// Name of the index and the size that it gives, for sharded weights whose index gives one.
fn index_total(checkpoint: &Checkpoint) -> Option<(String, u64)> {
    let stem = sharded_stem(checkpoint)?;
    let name = format!("{stem}.safetensors.index.json");
    let text = json_text(&checkpoint.dir().join(&name)).ok()?;
    let index: Value = serde_json::from_str(&text).ok()?;
    Some((name, index["metadata"]["total_size"].as_u64()?))
}

/// `model` of `model-00001-of-00002.safetensors`; `None` for weights in one file.
fn sharded_stem(checkpoint: &Checkpoint) -> Option<String> {
    let stem = checkpoint.weight_files().first()?.path.file_stem()?.to_str()?;
    let (rest, total) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(total) && digits(number)).then(|| stem.to_owned())
}

/// What loaders look at.
pub(super) fn loader_facts(
    checkpoint: &Checkpoint,
    stored: &QuantizeConfig,
    files: &ConfigFiles,
    values: &Values,
) -> LoaderFacts {
    let weights = checkpoint.weight_files();
    let stem = weights.first().and_then(|file| file.path.file_stem()).unwrap_or_default();
    let sharded = sharded_stem(checkpoint);
    LoaderFacts {
        architecture: Architecture::from(checkpoint.config()),
        quantize: stored.clone(),
        act_order: values.out_of_order,
        zeros: if values.other_zeros {
            stored.checkpoint_format.other()
        } else {
            stored.checkpoint_format
        },
        zeros_of_zero: values.zeros_of_zero,
        gptqmodel_stamp: files.found.values().flatten().any(gptqmodel_made),
        group_index: values.group_index(),
        dense_linear: checkpoint.config().block_linears(0).into_iter().find_map(|shape| {
            let name = format!("{}.{}", ModelConfig::block_prefix(0), shape.name);
            (!checkpoint.has_gptq_linear(&name)).then(|| shape.name.into_owned())
        }),
        head_only_tied: checkpoint.head().is_ok_and(|head| head == Head::Tied),
        bfloat16: asks_for_bfloat16(checkpoint.config()),
        shared_order: values.shared_order,
        bias: match (values.biases, values.bias_values) {
            (_, true) => Bias::Values,
            (true, false) => Bias::Zero,
            (false, false) => Bias::Absent,
        },
        other_types: other_types(checkpoint),
        frequencies: checkpoint.names().any(|name| {
            name.ends_with(".inv_freq") && checkpoint.config().plain_name(name).is_some()
        }),
        file_stem: sharded.clone().unwrap_or_else(|| stem.to_string_lossy().into_owned()),
        sharded: sharded.is_some(),
        pt_metadata: weights.iter().all(|f| f.metadata.get("format").is_some_and(|v| v == "pt")),
        quantize_config: files
            .keys(QUANTIZE_CONFIG_FILE)
            .map(|keys| keys.keys().cloned().collect()),
        quantization_config: files
            .keys(CONFIG_FILE)
            .is_some_and(|keys| keys.get("quant_method").is_some_and(|m| m == "gptq")),
    }
}

/// Scales and group indices that are not of the format's types.
fn other_types(checkpoint: &Checkpoint) -> Vec<String> {
    let stored = |leaf: &str, usual: DType| {
        let linears = checkpoint.config().linears();
        let types: BTreeSet<String> = linears
            .filter_map(|(name, _)| checkpoint.stored_type(&format!("{name}.{leaf}")))
            .map(|dtype| dtype.to_string())
            .filter(|dtype| dtype != usual.name())
            .collect();
        types.into_iter().map(move |dtype| format!("{leaf} stored as {dtype}")).collect::<Vec<_>>()
    };
    [stored(SCALES, DType::F16), stored(G_IDX, DType::I32)].concat()
}

/// Whether GPTQModel 0.9 or later made the file, by its stamp: `gptqmodel:1.4.5`, or a list of such.
fn gptqmodel_made(keys: &Map<String, Value>) -> bool {
    let stamp = &keys.get("meta").unwrap_or(&Value::Null)["quantizer"];
    let stamps = match stamp {
        Value::Array(several) => several.as_slice(),
        one => std::slice::from_ref(one),
    };
    stamps.iter().filter_map(Value::as_str).any(|stamp| {
        let stamp = stamp.to_ascii_lowercase();
        let Some(version) = stamp.strip_prefix("gptqmodel:") else { return false };
        let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (0, 9)
    })
}
