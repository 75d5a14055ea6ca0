//! Reading a checkpoint folder: mapped weight files, one tensor at a time.
//!
//! Files are mapped and only touched pages are read, so opening a large model costs milliseconds,
//! and memory stays at the tensors in use ([`Checkpoint::release`] gives pages back).

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::arriving::{Arriving, Bring};
use crate::names::{CONFIG_FILE, EMBEDDING, HEAD, QWEIGHT, TEXT_CONFIG};
use crate::strays::{Stored, Strays};
use crate::weight_files::{View, WeightFile};
use crate::weights::{Mapped, Weights};
use crate::wrappers::TIED;
use crate::{
    DType, Error, Head, LinearShape, ModelConfig, QuantizeConfig, Result, TensorRef, TensorSpec,
    pytorch, settings, side_files, strays,
};

/// A checkpoint folder, dense or GPTQ, opened for reading.
///
/// A tied model's one table answers to both names, the embedding's and the head's, whichever it is
/// stored under; [`Checkpoint::names`] lists what is stored.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    quantize: Option<QuantizeConfig>,
    /// The warning about settings that do not hold for the weights.
    ignored_settings: Option<String>,
    weights: Weights,
    head: OnceLock<Head>,
}

/// A tensor as it is stored.
#[derive(Clone, Debug)]
pub struct StoredTensor<'a> {
    /// Its type, which may be one that nothing is computed with.
    pub dtype: safetensors::Dtype,
    /// Its sides.
    pub shape: &'a [usize],
    /// Its values, row by row.
    pub bytes: Cow<'a, [u8]>,
}

impl Checkpoint {
    /// Opens a folder: its configuration, and the headers of its weight files.
    ///
    /// Weights are `model.safetensors`, the shards of `model.safetensors.index.json`, or for a GPTQ
    /// folder also the file that its quantization config names, or its only safetensors file. Where
    /// there is none of these, they are `pytorch_model.bin` or the shards of its index: pickles, of
    /// which nothing is executed.
    ///
    /// # Errors
    /// Missing, truncated or malformed files, named; an index that disagrees with its shards; a
    /// pickle that needs more than a state dict does; packed tensors that nothing says how to read,
    /// or that two files say contradictory things of.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_settled(dir, true)
    }

    /// As [`Checkpoint::open`], but quantize_config.json holds where config.json contradicts it. For
    /// a search for all that is wrong.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], without [`Error::ContradictingConfig`].
    pub fn open_contradicting(dir: &Path) -> Result<Self> {
        Self::open_settled(dir, false)
    }

    fn open_settled(dir: &Path, agreeing: bool) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let quantize = QuantizeConfig::load(dir, config.raw(), agreeing);
        let named = quantize.as_ref().ok().and_then(Option::as_ref);
        match Mapped::open(dir, named) {
            Ok(weights) => Self::new(dir, config, quantize, Weights::Mapped(weights)),
            Err(error) => Err(quantize.err().unwrap_or(error)),
        }
    }

    /// Opens a dense model whose shards are elsewhere: `dir` holds its configuration and its index,
    /// and `bring` gives each shard's path when the first of its tensors is asked for. A shard is
    /// deleted when the last linear that it holds was given to [`Checkpoint::discard`]; its other
    /// tensors (embedding, norms, head) are kept in memory.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] for what is in `dir`, and [`Error::ArrivingParts`]. What a shard holds is
    /// checked when it comes.
    pub fn open_arriving(dir: &Path, bring: Box<Bring>) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        if let Some(wrapper) = config.wrapper() {
            return Err(Error::ArrivingParts { dir: dir.to_owned(), wrapper });
        }
        let quantize = QuantizeConfig::load(dir, config.raw(), true);
        let weights = Weights::Arriving(Arriving::open(dir, &config, bring)?);
        Self::new(dir, config, quantize, weights)
    }

    fn new(
        dir: &Path,
        config: ModelConfig,
        quantize: Result<Option<QuantizeConfig>>,
        weights: Weights,
    ) -> Result<Self> {
        let config = named_by(config, &weights);
        let (quantize, ignored_settings) = settings::that_hold(dir, &config, &weights, quantize)?;
        settings::refuse_unreadable(dir, &config, quantize.as_ref(), &weights)?;
        let (dir, head) = (dir.to_owned(), OnceLock::new());
        Ok(Self { dir, config, quantize, ignored_settings, weights, head })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How the checkpoint is quantized; `None` for a dense one.
    #[must_use]
    pub fn quantize_config(&self) -> Option<&QuantizeConfig> {
        self.quantize.as_ref()
    }

    /// Names of all tensors as they are stored, sorted. What takes a name takes these, too.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.names()
    }

    /// Whether the tensor is there.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.weights.contains(&self.stored_name(name))
    }

    /// Where the head comes from. The first call compares two stored tables, where a tied model has
    /// both; of [`Checkpoint::open_arriving`], that waits for their shards.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn head(&self) -> Result<Head> {
        if let Some(&head) = self.head.get() {
            return Ok(head);
        }
        let head = self.compare_tables()?;
        Ok(*self.head.get_or_init(|| head))
    }

    /// Compares the tables of embedding and head, where both are stored.
    fn compare_tables(&self) -> Result<Head> {
        if !self.config().tie_word_embeddings {
            return Ok(Head::Own);
        }
        let stored = |name| self.weights.contains(&self.config.stored_name(name));
        if !(stored(EMBEDDING) && stored(HEAD)) {
            return Ok(Head::Tied);
        }
        let equal = self.tensor(HEAD)?.equals(&self.tensor(EMBEDDING)?);
        self.release(HEAD);
        self.release(EMBEDDING);
        Ok(if equal { Head::Copied } else { Head::Untied })
    }

    /// Stored tensors that are left out, whatever is done with the model.
    #[must_use]
    pub fn strays(&self) -> Strays {
        let packed = |linear: &str| self.has_gptq_linear(linear);
        Stored { config: &self.config, packed: &packed }.strays(self.names())
    }

    /// What a reader of the checkpoint should know: a sentence each. Of
    /// [`Checkpoint::open_arriving`], what names can show: [`Checkpoint::head`] waits for shards.
    ///
    /// # Errors
    /// As [`Checkpoint::head`].
    pub fn warnings(&self) -> Result<Vec<String>> {
        let head = if self.is_arriving() { None } else { self.head()?.warning() };
        let mut warnings: Vec<String> = head.into_iter().map(str::to_owned).collect();
        warnings.extend(self.ignored_settings.clone());
        warnings.extend(self.strays().warnings(&self.config));
        let absent: Vec<&String> =
            self.weight_files().iter().flat_map(|file| &file.absent).collect();
        if let Some(first) = absent.first() {
            warnings.push(format!(
                "the index names {} that its shards do not hold, such as `{first}`",
                strays::tensors(absent.len())
            ));
        }
        Ok(warnings)
    }

    /// Whether shards come as they are needed.
    #[must_use]
    pub fn is_arriving(&self) -> bool {
        matches!(self.weights, Weights::Arriving(_))
    }

    /// Bytes of all weight files, headers included.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.weight_files().iter().map(WeightFile::bytes).sum()
    }

    /// The mapped weight files, in the order of their names; none of [`Checkpoint::open_arriving`].
    #[must_use]
    pub fn weight_files(&self) -> &[WeightFile] {
        match &self.weights {
            Weights::Mapped(mapped) => mapped.files(),
            Weights::Arriving(_) => &[],
        }
    }

    /// A tensor by name, of any supported type.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and [`Error::UnsupportedDType`]; of [`Checkpoint::open_arriving`]
    /// also [`Error::Discarded`], and whatever is wrong with the shard.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let (name, stored) = self.named(name)?;
        let dtype = DType::from_safetensors(stored.dtype, name)?;
        Ok(TensorRef { name, dtype, shape: stored.shape, bytes: stored.bytes })
    }

    /// A tensor by name, of any type: what is computed with comes from [`Checkpoint::tensor`].
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], but for its type.
    pub fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        Ok(self.named(name)?.1)
    }

    fn named(&self, name: &str) -> Result<(&str, StoredTensor<'_>)> {
        let Some(View { name, entry, bytes }) = self.weights.view(&self.stored_name(name))? else {
            return Err(self.missing(name));
        };
        let bytes = match &entry.strides {
            None => bytes,
            Some(strides) => {
                let size = entry.dtype.bitsize() / 8;
                Cow::Owned(pytorch::gather(&bytes, size, &entry.shape, strides))
            }
        };
        Ok((name, StoredTensor { dtype: entry.dtype, shape: &entry.shape, bytes }))
    }

    /// The type a tensor of a mapped file is stored in, whether or not it is one that can be read;
    /// `None` when it is not there.
    #[must_use]
    pub fn stored_type(&self, name: &str) -> Option<safetensors::Dtype> {
        self.weights.stored_type(&self.stored_name(name))
    }

    /// A floating-point tensor that must have this shape.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and [`Error::Shape`] or [`Error::DType`] naming both sides.
    pub fn tensor_shaped(&self, name: &str, shape: &[usize]) -> Result<TensorRef<'_>> {
        let tensor = self.tensor(name)?;
        check_float(tensor.name, tensor.dtype, (tensor.shape, shape))?;
        Ok(tensor)
    }

    /// Checks that every tensor that the configuration implies is there, in a float type and the
    /// right shape; of a quantized checkpoint those that are not quantized. Checks, too, that blocks
    /// hold no other weights. Reads headers only: what is wrong with a shard that is still to come
    /// shows when it comes.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or what explains it; [`Error::UnsupportedDType`], [`Error::Shape`],
    /// [`Error::DType`], [`Error::UnknownWeight`] and [`Error::Adapter`]; [`Error::InvalidConfig`] where the
    /// configuration leaves out a size of experts that do not fit.
    pub fn check_tensors(&self) -> Result<()> {
        self.compare_tensors().map_err(|error| self.explained(error))
    }

    /// Of experts that do not fit it may be the configuration that leaves out how many there are, or how
    /// wide.
    fn explained(&self, error: Error) -> Error {
        let tensor = match &error {
            Error::MissingTensor { tensor, .. } => tensor,
            Error::Shape { tensor, .. } | Error::UnknownWeight { tensor, .. } => tensor,
            _ => return error,
        };
        let Some((key, value)) = self.config.assumed_of(tensor) else { return error };
        let reason = format!("is missing; with {value}, which is usual, `{tensor}` does not fit");
        Error::InvalidConfig { path: self.dir.join(CONFIG_FILE), key: key.to_owned(), reason }
    }

    fn compare_tensors(&self) -> Result<()> {
        let packed = |linear: &str| self.has_gptq_linear(linear);
        Stored { config: &self.config, packed: &packed }.check(self.names())?;
        self.check_indexed()?;
        for (tensor, shape) in self.config.dense_tensors() {
            let linear = tensor.strip_suffix(".weight").unwrap_or(&tensor);
            if self.has_gptq_linear(linear) {
                continue;
            }
            if !self.contains(&tensor) {
                return Err(self.missing(&tensor));
            }
            let Weights::Mapped(mapped) = &self.weights else { continue };
            let stored = self.stored_name(&tensor);
            let Some(entry) = mapped.entry(&stored) else { continue };
            let dtype = DType::from_safetensors(entry.dtype, &stored)?;
            check_float(&stored, dtype, (&entry.shape, &shape))?;
        }
        Ok(())
    }

    /// Refuses shards that hold more than their index says where that may be of a part that is carried.
    fn check_indexed(&self) -> Result<()> {
        let Weights::Mapped(mapped) = &self.weights else { return Ok(()) };
        let unnamed = mapped.files().iter().find_map(|file| Some((file, file.unindexed.first()?)));
        match unnamed.filter(|_| self.config.wrapper().is_some()) {
            Some((file, tensor)) => {
                Err(Error::Unindexed { shard: file.path.clone(), tensor: tensor.clone() })
            }
            None => Ok(()),
        }
    }

    /// The same checkpoint read with other settings than its files give: what its tensors say,
    /// where the files are wrong.
    #[must_use]
    pub fn with_quantize_config(mut self, quantize: QuantizeConfig) -> Self {
        self.quantize = Some(quantize);
        self
    }

    /// Files beside the weights that are carried over to every checkpoint made from this one:
    /// tokenizer, generation settings, licenses. Relative to the folder, in a fixed order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        side_files::names(&self.dir)
    }

    /// The bias of a linear, dense or quantized; `None` where the model has none. `prefix` is as for
    /// [`Checkpoint::gptq_linear`].
    ///
    /// # Errors
    /// A missing tensor, another shape, and [`Error::LinearBias`] for values where the model has no
    /// bias: AutoGPTQ writes one of zeros for every linear, but any other would change the model.
    pub fn linear_bias(&self, prefix: &str, shape: &LinearShape) -> Result<Option<TensorRef<'_>>> {
        let name = format!("{prefix}.bias");
        if !shape.bias && !self.contains(&name) {
            return Ok(None);
        }
        let bias = self.tensor_shaped(&name, &[shape.out_features])?;
        bias.check_finite()?;
        if shape.bias {
            return Ok(Some(bias));
        }
        if bias.to_f32().iter().any(|&v| v != 0.0) {
            return Err(Error::LinearBias { tensor: name });
        }
        Ok(None)
    }

    /// Tells the system that a tensor's pages are not needed any more. Advice only: nothing
    /// happens for a name that is not there, or on a system that does not take it.
    pub fn release(&self, name: &str) {
        if let Weights::Mapped(mapped) = &self.weights {
            mapped.release(&self.stored_name(name));
        }
    }

    /// As [`Checkpoint::release`], of some bytes of the tensor.
    pub fn release_part(&self, name: &str, part: Range<usize>) {
        if let Weights::Mapped(mapped) = &self.weights {
            mapped.release_part(&self.stored_name(name), part);
        }
    }

    /// Tells the system that a tensor is read soon, so that it comes from its disk meanwhile. Advice
    /// only, as with [`Checkpoint::release`].
    pub fn announce(&self, name: &str) {
        if let Weights::Mapped(mapped) = &self.weights {
            mapped.announce(&self.stored_name(name));
        }
    }

    /// Says that a linear's weight was read for the last time. Where shards arrive and go, the last
    /// one of its shard deletes that; elsewhere nothing happens.
    ///
    /// # Errors
    /// [`Error::Io`] where the shard cannot be deleted.
    pub fn discard(&self, name: &str) -> Result<()> {
        match &self.weights {
            Weights::Mapped(_) => Ok(()),
            Weights::Arriving(arriving) => arriving.discard(name),
        }
    }

    /// The name that a tensor is stored under: a tied model's one table has two.
    fn stored_name<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let named = |name| self.config.stored_name(name);
        let other = match name {
            EMBEDDING => HEAD,
            HEAD => EMBEDDING,
            _ => return named(name),
        };
        let stored = |name| self.weights.contains(&named(name));
        let elsewhere = self.config.tie_word_embeddings && !stored(name) && stored(other);
        named(if elsewhere { other } else { name })
    }

    /// Whether the linear `prefix`, such as `model.layers.0.self_attn.q_proj`, is quantized.
    #[must_use]
    pub fn has_gptq_linear(&self, prefix: &str) -> bool {
        self.quantize_config().is_some() && self.contains(&format!("{prefix}.{QWEIGHT}"))
    }

    /// Why a tensor is not there.
    pub(crate) fn missing(&self, tensor: &str) -> Error {
        let dir = || self.dir().to_owned();
        let tensor = self.config.stored_name(tensor).into_owned();
        if let Some((index, shard)) = self.weights.promised(&tensor) {
            return Error::IndexMismatch { index, tensor, shard };
        }
        if let Some(wrapper) = self.config.wrapper() {
            if tensor == self.config.stored_name(HEAD) && self.config.is_tied_by_text_alone() {
                let (path, key) = (self.dir.join(CONFIG_FILE), format!("{TEXT_CONFIG}.{TIED}"));
                let reason = format!(
                    "is `true`, but the weights have no `{tensor}`, and transformers 5 ties the head of \
                     `{wrapper}` by the key of the whole alone"
                );
                return Error::InvalidConfig { path, key, reason };
            }
            return Error::MissingTensor { dir: dir(), tensor };
        }
        let stored =
            |name: &&str| name.strip_suffix(tensor.as_str()).is_some_and(|p| p.ends_with('.'));
        if let Some(name) = self.names().find(stored) {
            let prefix = name[..name.len() - tensor.len()].to_owned();
            return Error::Prefixed { dir: dir(), tensor, prefix };
        }
        if let Some(bare) = tensor.strip_prefix("model.").filter(|bare| self.weights.contains(bare))
        {
            let bare = bare.to_owned();
            return Error::Unprefixed { dir: dir(), tensor, bare };
        }
        Error::MissingTensor { dir: dir(), tensor }
    }

    /// The groups of columns that are stored as 64-bit integers.
    pub(crate) fn wide_index(&self, name: &str, columns: usize, groups: usize) -> Result<Vec<u32>> {
        let Some(View { name, entry, bytes }) = self.weights.view(&self.stored_name(name))? else {
            return Err(self.missing(name));
        };
        check_shape(name, (&entry.shape, &[columns]))?;
        let bytes = match &entry.strides {
            None => bytes,
            Some(strides) => Cow::Owned(pytorch::gather(&bytes, 8, &entry.shape, strides)),
        };
        let stored = bytes.as_chunks().0.iter().map(|&value| i64::from_le_bytes(value));
        let narrow = |(index, group): (usize, i64)| {
            let beyond = |_| Error::GroupIndex { tensor: name.to_owned(), index, group, groups };
            i32::try_from(group).map(|group| group as u32).map_err(beyond)
        };
        stored.enumerate().map(narrow).collect()
    }

    /// A tensor with exactly this type and shape.
    pub(crate) fn exact(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<TensorRef<'_>> {
        let tensor = self.tensor(name)?;
        check_shape(tensor.name, (tensor.shape, shape))?;
        if tensor.dtype != dtype {
            return Err(wrong_type(tensor.name, tensor.dtype, dtype.name()));
        }
        Ok(tensor)
    }
}

/// The model as these weights name it.
fn named_by(config: ModelConfig, weights: &Weights) -> ModelConfig {
    let Weights::Mapped(mapped) = weights else { return config };
    let spec = |name: &str| {
        let entry = mapped.entry(name)?;
        Some(TensorSpec { name: name.to_owned(), dtype: entry.dtype, shape: entry.shape.clone() })
    };
    config.of_weights(mapped.names(), spec)
}

/// Checks what a tensor of floating-point values claims to be.
fn check_float(name: &str, dtype: DType, shapes: (&[usize], &[usize])) -> Result<()> {
    check_shape(name, shapes)?;
    if dtype.is_float() { Ok(()) } else { Err(wrong_type(name, dtype, "F32, F16 or BF16")) }
}

fn check_shape(name: &str, (found, expected): (&[usize], &[usize])) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let (found, expected) = (found.to_vec(), expected.to_vec());
    Err(Error::Shape { tensor: name.to_owned(), expected, found })
}

fn wrong_type(name: &str, found: DType, expected: &'static str) -> Error {
    Error::DType { tensor: name.to_owned(), expected, found: found.name() }
}
