//! Reading a checkpoint folder: mapped safetensors, one tensor at a time.
//!
//! Files are mapped and only touched pages are read, so opening a large model costs milliseconds,
//! and memory stays at the tensors in use ([`Checkpoint::release`] gives pages back).

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use serde_json::{Map, Value};

use crate::gptq::check_sides;
use crate::header::{self, Entry};
use crate::quantize_config::is_file_name;
use crate::{
    CheckpointFormat, DType, Error, GptqLinear, LinearShape, ModelConfig, QuantizeConfig, Result,
    TensorRef, side_files,
};

/// A checkpoint folder, dense or GPTQ, opened for reading.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    quantize: Option<QuantizeConfig>,
    files: Vec<WeightFile>,
    /// Tensors by name, with the file that holds them.
    tensors: BTreeMap<String, (usize, Entry)>,
}

/// A mapped safetensors file of a checkpoint.
#[derive(Debug)]
pub struct WeightFile {
    /// Where it is.
    pub path: PathBuf,
    /// What its header says beside its tensors.
    pub metadata: BTreeMap<String, String>,
    /// Tensors that it holds, but that the index does not name: no loader sees them.
    pub unindexed: Vec<String>,
    map: Mmap,
}

impl Checkpoint {
    /// Opens a folder: its configuration, and the headers of its weight files.
    ///
    /// Weights are `model.safetensors`, the shards of `model.safetensors.index.json`, or for a GPTQ
    /// folder also the file that its quantisation config names, or its only safetensors file.
    ///
    /// # Errors
    /// Missing, truncated or malformed files, named; an index that disagrees with its shards; a
    /// folder that only has PyTorch pickles.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let quantize = QuantizeConfig::load(dir, config.raw())?;
        let (files, tensors) = match find_weights(dir, quantize.as_ref())? {
            Weights::Single(path) => {
                let (file, entries) = map_file(&path)?;
                let tensors = entries.into_iter().map(|(name, entry)| (name, (0, entry)));
                (vec![file], tensors.collect())
            }
            Weights::Index(index) => open_shards(dir, &index)?,
        };
        Ok(Self { dir: dir.to_owned(), config, quantize, files, tensors })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How the checkpoint is quantised; `None` for a dense one.
    #[must_use]
    pub fn quantize_config(&self) -> Option<&QuantizeConfig> {
        self.quantize.as_ref()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the tensor is there.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all weight files, headers included.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }

    /// The weight files, in the order of their names.
    #[must_use]
    pub fn weight_files(&self) -> &[WeightFile] {
        &self.files
    }

    /// A tensor by name, of any supported type.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and [`Error::UnsupportedDType`].
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let Some((name, (file, entry))) = self.tensors.get_key_value(name) else {
            let (dir, tensor) = (self.dir.clone(), name.to_owned());
            return Err(Error::MissingTensor { dir, tensor });
        };
        let dtype = DType::from_safetensors(entry.dtype, name)?;
        let bytes = &self.files[*file].map[entry.range.clone()];
        Ok(TensorRef { name, dtype, shape: &entry.shape, bytes })
    }

    /// A floating-point tensor that must have this shape.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and [`Error::Shape`] or [`Error::DType`] naming both sides.
    pub fn tensor_shaped(&self, name: &str, shape: &[usize]) -> Result<TensorRef<'_>> {
        let tensor = self.tensor(name)?;
        check_shape(&tensor, shape)?;
        if !tensor.dtype.is_float() {
            return Err(wrong_type(&tensor, "F32, F16 or BF16"));
        }
        Ok(tensor)
    }

    /// Whether the linear `prefix`, such as `model.layers.0.self_attn.q_proj`, is quantised.
    #[must_use]
    pub fn has_gptq_linear(&self, prefix: &str) -> bool {
        self.quantize.is_some() && self.contains(&format!("{prefix}.qweight"))
    }

    /// The same checkpoint read with other settings than its files give: what its tensors say,
    /// where the files are wrong.
    #[must_use]
    pub fn with_quantize_config(mut self, quantize: QuantizeConfig) -> Self {
        self.quantize = Some(quantize);
        self
    }

    /// Reads and checks a quantised linear. `prefix` is its full name, such as
    /// `model.layers.0.self_attn.q_proj`. Zeros of `gptq_v2` files are brought to the v1 form.
    ///
    /// # Errors
    /// [`Error::NotQuantised`], missing tensors, types and shapes that do not follow from the
    /// configuration, [`Error::GroupIndex`], scales that are not finite, and
    /// [`Error::LinearBias`].
    pub fn gptq_linear(&self, prefix: &str, shape: &LinearShape) -> Result<GptqLinear> {
        let mut linear = self.gptq_linear_as_stored(prefix, shape)?;
        linear.check(prefix)?;
        self.check_bias(&format!("{prefix}.bias"), shape.out_features)?;
        if self.quantize.as_ref().is_some_and(|q| q.checkpoint_format == CheckpointFormat::GptqV2) {
            linear.shift_v2_zeros()?;
        }
        Ok(linear)
    }

    /// Reads a quantised linear without looking at its values: zeros as they are stored, group
    /// indices and scales as they come.
    ///
    /// # Errors
    /// As [`Checkpoint::gptq_linear`], without those about values.
    pub fn gptq_linear_as_stored(&self, prefix: &str, shape: &LinearShape) -> Result<GptqLinear> {
        let Some(quantize) = &self.quantize else {
            return Err(Error::NotQuantised { dir: self.dir.clone() });
        };
        let &LinearShape { in_features, out_features, .. } = shape;
        check_sides(prefix, in_features, out_features)?;
        let (bits, groups) = (quantize.bits, quantize.groups(in_features));
        let words = |leaf: &str, shape: &[usize]| -> Result<Vec<u32>> {
            let tensor = self.exact(&format!("{prefix}.{leaf}"), DType::I32, shape)?;
            Ok(tensor.to_words())
        };
        let scales =
            self.exact(&format!("{prefix}.scales"), DType::F16, &[groups, out_features])?;
        Ok(GptqLinear {
            bits,
            in_features,
            out_features,
            groups,
            qweight: words("qweight", &[bits.words(in_features), out_features])?,
            qzeros: words("qzeros", &[groups, bits.words(out_features)])?,
            scales: scales.to_f16()?,
            g_idx: words("g_idx", &[in_features])?,
        })
    }

    /// Files beside the weights that are carried over to every checkpoint made from this one:
    /// tokeniser, generation settings, licences. Relative to the folder, in a fixed order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        side_files::names(&self.dir)
    }

    /// Tells the system that a tensor's pages are not needed any more. Advice only: nothing
    /// happens for a name that is not there, or on a system that does not take it.
    pub fn release(&self, name: &str) {
        let Some((file, entry)) = self.tensors.get(name) else { return };
        // SAFETY: the mapping is read-only and backed by a file, so no page holds data of its own:
        // one dropped here is read again from the file when it is next touched. References into it
        // stay valid and see the same values.
        #[expect(unsafe_code, reason = "madvise on a read-only file mapping")]
        let advised = unsafe {
            let range = &entry.range;
            self.files[*file].map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                range.start,
                range.len(),
            )
        };
        // Refused advice costs memory, not correctness.
        drop(advised);
    }

    /// A tensor with exactly this type and shape.
    fn exact(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<TensorRef<'_>> {
        let tensor = self.tensor(name)?;
        check_shape(&tensor, shape)?;
        if tensor.dtype != dtype {
            return Err(wrong_type(&tensor, dtype.name()));
        }
        Ok(tensor)
    }

    /// AutoGPTQ writes a bias of zeros for every linear; any other value would change the model.
    fn check_bias(&self, name: &str, out_features: usize) -> Result<()> {
        if !self.contains(name) {
            return Ok(());
        }
        let bias = self.tensor_shaped(name, &[out_features])?;
        if bias.to_f32().iter().any(|&v| v != 0.0) {
            return Err(Error::LinearBias { tensor: name.to_owned() });
        }
        Ok(())
    }
}

fn check_shape(tensor: &TensorRef<'_>, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    let (found, expected) = (tensor.shape.to_vec(), expected.to_vec());
    Err(Error::Shape { tensor: tensor.name.to_owned(), expected, found })
}

fn wrong_type(tensor: &TensorRef<'_>, expected: &'static str) -> Error {
    Error::DType { tensor: tensor.name.to_owned(), expected, found: tensor.dtype.name() }
}

/// Where a folder keeps its weights.
enum Weights {
    Single(PathBuf),
    Index(PathBuf),
}

fn find_weights(dir: &Path, quantize: Option<&QuantizeConfig>) -> Result<Weights> {
    let mut stems = Vec::new();
    if let Some(quantize) = quantize {
        stems.push(quantize.file_stem());
        // A folder may follow AutoGPTQ's scheme although its config names a base.
        let scheme = QuantizeConfig { model_file_base_name: None, ..quantize.clone() };
        stems.push(scheme.file_stem());
    }
    stems.push("model".to_owned());
    for stem in stems {
        let single = dir.join(format!("{stem}.safetensors"));
        if single.is_file() {
            return Ok(Weights::Single(single));
        }
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            return Ok(Weights::Index(index));
        }
    }
    let dir_owned = dir.to_owned();
    let mut named = list_extension(dir, "safetensors")?;
    match (quantize, named.len()) {
        (Some(_), 1) => Ok(Weights::Single(named.remove(0))),
        (Some(_), count) if count > 1 => Err(Error::AmbiguousWeights { dir: dir_owned, count }),
        (_, 0) if !list_extension(dir, "bin")?.is_empty() => {
            Err(Error::BinWeights { dir: dir_owned })
        }
        _ => Err(Error::NoWeights { dir: dir_owned }),
    }
}

/// Files of a folder with this extension.
fn list_extension(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.extension().is_some_and(|e| e == extension) && path.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

type Opened = (Vec<WeightFile>, BTreeMap<String, (usize, Entry)>);

/// Opens the shards of an index, and checks that each holds what the index says.
fn open_shards(dir: &Path, index: &Path) -> Result<Opened> {
    let mut files = Vec::new();
    let mut tensors = BTreeMap::new();
    for (shard, names) in read_index(index)? {
        let path = dir.join(&shard);
        if !path.is_file() {
            return Err(Error::MissingShard { index: index.to_owned(), shard });
        }
        let (mut file, entries) = map_file(&path)?;
        let mut entries: BTreeMap<String, Entry> = entries.into_iter().collect();
        for tensor in names {
            let Some(entry) = entries.remove(&tensor) else {
                return Err(Error::IndexMismatch { index: index.to_owned(), tensor, shard });
            };
            tensors.insert(tensor, (files.len(), entry));
        }
        file.unindexed = entries.into_keys().collect();
        files.push(file);
    }
    Ok((files, tensors))
}

/// The index's tensors by shard.
fn read_index(index: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let invalid = |key: &str, reason: String| Error::InvalidConfig {
        path: index.to_owned(),
        key: key.to_owned(),
        reason,
    };
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let parsed: Map<String, Value> = serde_json::from_str(&text).map_err(Error::json(index))?;
    let Some(Value::Object(weight_map)) = parsed.get("weight_map") else {
        return Err(invalid("weight_map", "is missing or no object".to_owned()));
    };
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let Some(shard) = shard.as_str().filter(|name| is_file_name(name)) else {
            return Err(invalid(tensor, format!("is `{shard}`, expected a plain file name")));
        };
        shards.entry(shard.to_owned()).or_default().push(tensor.clone());
    }
    Ok(shards)
}

/// Maps a safetensors file and checks its header.
fn map_file(path: &Path) -> Result<(WeightFile, Vec<(String, Entry)>)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the mapping is read-only, and every bit pattern is a valid value of what is read from
    // it, so the only hazard is another process truncating the file while it is in use, which ends
    // this one with SIGBUS; checkpoints are not edited in place, and the writer here renames.
    #[expect(unsafe_code, reason = "mapping a checkpoint instead of reading all of it")]
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    let (entries, metadata) = header::parse(&map)
        .map_err(|reason| Error::InvalidHeader { path: path.to_owned(), reason })?;
    Ok((WeightFile { path: path.to_owned(), metadata, unindexed: Vec::new(), map }, entries))
}
