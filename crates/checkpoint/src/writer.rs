//! Writing a quantized checkpoint as a stream.
//!
//! All shapes follow from the configuration, so headers are written first and each tensor goes to
//! its final place as soon as it is solved, in any order; the files are sparse until then. The
//! folder is a [`Partial`] until [`Sealed::publish`] gives it its name.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::names::{
    BLOCKS, CONFIG_FILE, G_IDX, INDEX_END, QUANTIZE_CONFIG_FILE, QWEIGHT, QZEROS, SAFETENSORS_END,
    SCALES,
};
use crate::partial::{Partial, check_space};
use crate::weight_sum::{Sum, WeightSum, sum_of_pieces};
use crate::{
    Checkpoint, DType, Error, FilePlan, GptqLinear, Layout, ModelConfig, OutputError,
    QuantizeConfig, Result, ShardPlan, TensorRef, TensorSpec, json as python_json, plan_files,
    side_files,
};

/// Values of a dense tensor converted at a time, so that an embedding never doubles in memory.
const COPY_VALUES: usize = 1 << 20;

/// A checkpoint being written. Dropped before it is [sealed](Self::seal), it leaves nothing.
#[derive(Debug)]
pub struct CheckpointWriter {
    partial: Partial,
    config: ModelConfig,
    quantize: QuantizeConfig,
    layout: Layout,
    plan: FilePlan,
    files: Vec<File>,
    /// Every planned tensor.
    slots: BTreeMap<String, Slot>,
    failed: bool,
}

/// Where a tensor goes.
#[derive(Debug)]
struct Slot {
    file: usize,
    offset: u64,
    spec: TensorSpec,
    /// The sum of what was written; `None` before.
    sum: Option<Sum>,
}

/// A complete checkpoint that has no name yet.
#[derive(Debug)]
pub struct Sealed {
    /// The working folder; [`Partial::publish`] names it.
    pub folder: Partial,
    /// The weight files, with sums of the bytes that were handed to the disk.
    pub files: Vec<WeightSum>,
    /// Bytes of the weight files.
    pub bytes: u64,
}

/// A complete checkpoint.
#[derive(Debug, Clone)]
pub struct Written {
    /// Its folder.
    pub dir: PathBuf,
    /// Names of the weight files.
    pub files: Vec<String>,
    /// Bytes of the weight files.
    pub bytes: u64,
}

impl CheckpointWriter {
    /// Prepares `out`: makes the working folder, checks the disk, copies the tokenizer and the
    /// other small files of `source`, whose shape the model has, and writes all headers; copies what
    /// belongs to other parts than the language model.
    ///
    /// # Errors
    /// [`OutputError::Exists`], [`OutputError::ForeignPartial`], [`OutputError::PartialInUse`],
    /// [`OutputError::DiskSpace`], everything that [`plan_files`] refuses,
    /// [`OutputError::FileName`], and [`Error::Io`].
    pub fn create(
        out: &Path,
        source: &Checkpoint,
        quantize: &QuantizeConfig,
        layout: Layout,
        extra_metadata: &BTreeMap<String, String>,
        max_shard_bytes: Option<u64>,
    ) -> Result<Self> {
        let config = source.config().clone().untied();
        let plan = plan_files(&config, quantize, layout, extra_metadata, max_shard_bytes)?;
        let partial = Partial::create(out)?;
        check_space(partial.path(), plan.total_bytes)?;
        side_files::carry(source.dir(), &partial)?;
        let mut writer = Self {
            partial,
            config,
            quantize: quantize.clone(),
            layout,
            plan,
            files: Vec::new(),
            slots: BTreeMap::new(),
            failed: false,
        };
        writer.write_headers()?;
        writer.write_frequencies()?;
        writer.carry_parts(source)?;
        Ok(writer)
    }

    /// Names of the dense tensors (embedding, norms, routers, the model's own biases, head) that are still
    /// to be written, sorted.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let dense = |name: &str| {
            !name.starts_with(BLOCKS)
                || name.ends_with("norm.weight")
                || self.config.dense_named(name).is_some()
                || name.strip_suffix(".bias").is_some_and(|linear| self.has_bias(linear))
        };
        let missing = self.slots.iter().filter(|(name, slot)| slot.sum.is_none() && dense(name));
        missing.map(|(name, _)| name.clone()).collect()
    }

    /// Writes the tensors of a quantized linear, and in the `card` layout a zero bias if the model
    /// has none there; its own is a dense tensor. `prefix` is the full name, such as
    /// `model.layers.0.self_attn.q_proj`.
    ///
    /// # Errors
    /// A linear that disagrees with itself or with the plan, [`OutputError::WrittenTwice`], and
    /// [`Error::Io`]. After any other error than that, nothing of this linear was written.
    pub fn write_linear(&mut self, prefix: &str, linear: &GptqLinear) -> Result<()> {
        linear.check(prefix)?;
        let (words, groups) = (linear.bits.words(linear.in_features), linear.groups);
        let zero_words = linear.bits.words(linear.out_features);
        let bias = vec![f16::ZERO; linear.out_features];
        let mut tensors: Vec<(&str, DType, Vec<usize>, &[u8])> = vec![
            (QWEIGHT, DType::I32, vec![words, linear.out_features], bytes(&linear.qweight)),
            (QZEROS, DType::I32, vec![groups, zero_words], bytes(&linear.qzeros)),
            (SCALES, DType::F16, vec![groups, linear.out_features], bytes(&linear.scales)),
            (G_IDX, DType::I32, vec![linear.in_features], bytes(&linear.g_idx)),
        ];
        if self.layout == Layout::Card && !self.has_bias(prefix) {
            tensors.push(("bias", DType::F16, vec![linear.out_features], bytes(&bias)));
        }
        for (leaf, dtype, shape, _) in &tensors {
            self.slot(&format!("{prefix}.{leaf}"), *dtype, Some(shape))?;
        }
        for (leaf, _, _, bytes) in tensors {
            self.put(&format!("{prefix}.{leaf}"), bytes)?;
        }
        Ok(())
    }

    /// Reads back a quantized linear that was written; `prefix` is its full name.
    ///
    /// # Errors
    /// [`OutputError::UnplannedTensor`] for a name of no linear, [`OutputError::MissingTensors`] for one
    /// that is not written yet, and [`Error::Io`].
    pub fn read_linear(&self, prefix: &str) -> Result<GptqLinear> {
        let name = |leaf: &str| format!("{prefix}.{leaf}");
        let unplanned = || OutputError::UnplannedTensor { tensor: name(QWEIGHT) };
        let shape = self.config.linear_named(prefix).ok_or_else(unplanned)?;
        let (out_features, in_features) = (shape.out_features, shape.in_features);
        let scales: Vec<f16> = self.read(&name(SCALES))?;
        let linear = GptqLinear {
            bits: self.quantize.bits,
            in_features,
            out_features,
            groups: scales.len() / out_features,
            qweight: self.read(&name(QWEIGHT))?,
            qzeros: self.read(&name(QZEROS))?,
            scales,
            g_idx: self.read(&name(G_IDX))?,
        };
        linear.check(prefix)?;
        Ok(linear)
    }

    /// Writes other scales `[groups, out]` over those of a quantized linear that was written.
    ///
    /// # Errors
    /// As [`CheckpointWriter::read_linear`], [`Error::Length`], and [`Error::NonFinite`].
    pub fn replace_scales(&mut self, prefix: &str, scales: &[f16]) -> Result<()> {
        let name = format!("{prefix}.{SCALES}");
        let slot = self.written(&name)?;
        let expected = slot.spec.shape.iter().product();
        if scales.len() != expected {
            return Err(Error::Length { what: name, expected, found: scales.len() });
        }
        if let Some(index) = scales.iter().position(|scale| !scale.is_finite()) {
            let value = scales[index].to_f32();
            return Err(Error::NonFinite { tensor: name, index, value });
        }
        self.put(&name, bytes(scales))
    }

    /// Writes a dense F16 tensor, row-major in its planned shape.
    ///
    /// # Errors
    /// [`OutputError::UnplannedTensor`], [`OutputError::WrittenTwice`], [`Error::DType`],
    /// [`Error::Length`] and [`Error::Io`].
    pub fn write_f16(&mut self, name: &str, values: &[f16]) -> Result<()> {
        let slot = self.slot(name, DType::F16, None)?;
        let expected = slot.spec.shape.iter().product();
        if values.len() != expected {
            return Err(Error::Length { what: name.to_owned(), expected, found: values.len() });
        }
        self.put(name, bytes(values))
    }

    /// Writes a tensor of the source as fp16, rounded to nearest, ties to even; one that is planned as f32 as
    /// such.
    ///
    /// # Errors
    /// As [`CheckpointWriter::write_f16`], with [`Error::Shape`] for another shape than planned,
    /// and [`Error::F16Overflow`].
    pub fn copy_dense(&mut self, name: &str, tensor: &TensorRef<'_>) -> Result<()> {
        if !tensor.dtype.is_float() {
            let (tensor, found) = (tensor.name.to_owned(), tensor.dtype.name());
            return Err(Error::DType { tensor, expected: "F32, F16 or BF16", found });
        }
        if self.slots.get(name).is_some_and(|slot| slot.spec.is(DType::F32)) {
            self.slot(name, DType::F32, Some(tensor.shape))?;
            return self.put(name, bytes(&tensor.to_f32()));
        }
        let slot = self.slot(name, DType::F16, Some(tensor.shape))?;
        let (file, offset) = (slot.file, slot.offset);
        let mut values = vec![f16::ZERO; COPY_VALUES.min(tensor.len())];
        let mut sum = Sha256::new();
        for start in (0..tensor.len()).step_by(COPY_VALUES) {
            let count = COPY_VALUES.min(tensor.len() - start);
            let values = &mut values[..count];
            tensor.read_f16(start, values)?;
            self.write_at(file, offset + 2 * start as u64, bytes(values))?;
            sum.update(bytes(values));
        }
        self.mark(name, sum.finalize().into());
        Ok(())
    }

    /// Completes the checkpoint: configuration and index; everything is synced to disk.
    ///
    /// # Errors
    /// [`OutputError::MissingTensors`] naming the first that were never written, and [`Error::Io`];
    /// the working folder is removed in every case.
    pub fn seal(self) -> Result<Sealed> {
        self.check_alive()?;
        self.check_complete()?;
        for (file, shard) in self.files.iter().zip(&self.plan.shards) {
            let path = self.partial.path().join(&shard.file_name);
            file.sync_all().map_err(Error::io("write", &path))?;
        }
        let (raw, wrapper) = (self.config.raw(), self.config.wrapper);
        let text = self.quantize.config_text(raw, wrapper, self.layout)?;
        self.partial.write(Path::new(CONFIG_FILE), text.as_bytes())?;
        let text = self.quantize.file_text(self.layout)?;
        self.partial.write(Path::new(QUANTIZE_CONFIG_FILE), text.as_bytes())?;
        if self.plan.shards.len() > 1 {
            let name = format!("{}{SAFETENSORS_END}{INDEX_END}", self.quantize.file_stem());
            self.partial.write(Path::new(&name), self.index_text()?.as_bytes())?;
        }
        let files = self.plan.shards.iter().map(|shard| self.sum(shard)).collect();
        let Self { partial: folder, plan, .. } = self;
        Ok(Sealed { folder, files, bytes: plan.total_bytes })
    }

    /// A file's sum, all of whose tensors are written.
    fn sum(&self, shard: &ShardPlan) -> WeightSum {
        let header = Sha256::digest(&shard.header).into();
        let tensors = shard.tensors.iter().filter_map(|t| self.slots.get(&t.spec.name)?.sum);
        WeightSum {
            file_name: shard.file_name.clone(),
            bytes: shard.size,
            sum: sum_of_pieces(std::iter::once(header).chain(tensors)),
        }
    }

    fn write_headers(&mut self) -> Result<()> {
        for (file, shard) in self.plan.shards.iter().enumerate() {
            let path = self.partial.path().join(&shard.file_name);
            let handle = File::create_new(&path).map_err(Error::io("create", &path))?;
            handle.set_len(shard.size).map_err(Error::io("write", &path))?;
            handle.write_all_at(&shard.header, 0).map_err(Error::io("write", &path))?;
            self.files.push(handle);
            for tensor in &shard.tensors {
                let (offset, spec) = (tensor.offset, tensor.spec.clone());
                self.slots.insert(spec.name.clone(), Slot { file, offset, spec, sum: None });
            }
        }
        Ok(())
    }

    /// Whether the linear of this full name has a bias in the model.
    fn has_bias(&self, prefix: &str) -> bool {
        self.config.linear_named(prefix).is_some_and(|linear| linear.bias)
    }

    /// `theta^(-2i/dims)` in f32, the buffer that checkpoints of the `card` layout hold.
    /// Loaders of that time stretch the positions, and later ones compute it: it is not stretched
    /// itself.
    fn write_frequencies(&mut self) -> Result<()> {
        let (theta, dim) = (self.config.rope.theta, self.config.rope.dims);
        let frequency = |i: usize| {
            // The exponent and the power are rounded to f32 as in the original computation.
            let exponent = (2 * i) as f32 / dim as f32;
            1.0 / theta.powf(f64::from(exponent)) as f32
        };
        let values: Vec<f32> = (0..dim / 2).map(frequency).collect();
        // Those of other parts are carried.
        let own = |name: &str| name.starts_with(BLOCKS) && name.ends_with(".inv_freq");
        let names: Vec<String> = self.slots.keys().filter(|name| own(name)).cloned().collect();
        for name in names {
            self.put(&name, bytes(&values))?;
        }
        Ok(())
    }

    /// Copies the tensors of other parts, bit for bit.
    fn carry_parts(&mut self, source: &Checkpoint) -> Result<()> {
        for TensorSpec { name, .. } in source.config().carried().unwrap_or_default() {
            self.put(name, &source.stored(name)?.bytes)?;
            source.release(name);
        }
        Ok(())
    }

    /// The slot of a tensor that may be written now, in this type and shape.
    fn slot(&self, name: &str, dtype: DType, shape: Option<&[usize]>) -> Result<&Slot> {
        self.check_alive()?;
        let tensor = name.to_owned();
        let Some(slot) = self.slots.get(name) else {
            return Err(OutputError::UnplannedTensor { tensor }.into());
        };
        if slot.sum.is_some() {
            return Err(OutputError::WrittenTwice { tensor }.into());
        }
        if !slot.spec.is(dtype) {
            // What is written by value is planned as one of these.
            let planned = DType::from_safetensors(slot.spec.dtype, name)?;
            let (expected, found) = (planned.name(), dtype.name());
            return Err(Error::DType { tensor, expected, found });
        }
        match shape {
            Some(shape) if slot.spec.shape != shape => {
                let (expected, found) = (slot.spec.shape.clone(), shape.to_vec());
                Err(Error::Shape { tensor, expected, found })
            }
            _ => Ok(slot),
        }
    }

    /// The slot of a tensor that was written.
    fn written(&self, name: &str) -> Result<&Slot> {
        self.check_alive()?;
        let unplanned = || OutputError::UnplannedTensor { tensor: name.to_owned() };
        let slot = self.slots.get(name).ok_or_else(unplanned)?;
        if slot.sum.is_none() {
            return Err(
                OutputError::MissingTensors { count: 1, examples: format!("`{name}`") }.into()
            );
        }
        Ok(slot)
    }

    /// The values of a tensor that was written, of the type that it is stored in.
    fn read<T: bytemuck::Pod>(&self, name: &str) -> Result<Vec<T>> {
        let slot = self.written(name)?;
        let mut values = vec![T::zeroed(); slot.spec.shape.iter().product()];
        let file = &self.files[slot.file];
        file.read_exact_at(bytemuck::cast_slice_mut(&mut values), slot.offset).map_err(
            |source| {
                let path = self.partial.path().join(&self.plan.shards[slot.file].file_name);
                Error::Io { action: "read", path, source }
            },
        )?;
        Ok(values)
    }

    /// Writes a checked tensor's bytes at their place.
    fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(slot) = self.slots.get(name) else {
            return Err(OutputError::UnplannedTensor { tensor: name.to_owned() }.into());
        };
        self.write_at(slot.file, slot.offset, bytes)?;
        self.mark(name, Sha256::digest(bytes).into());
        Ok(())
    }

    /// Remembers that a tensor is written.
    fn mark(&mut self, name: &str, sum: Sum) {
        if let Some(slot) = self.slots.get_mut(name) {
            slot.sum = Some(sum);
        }
    }

    /// A failed write gives the disk back at once: it is most likely full, and the caller may hold
    /// on to the writer for long.
    fn write_at(&mut self, file: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.files[file].write_all_at(bytes, offset).map_err(|source| {
            let path = self.partial.path().join(&self.plan.shards[file].file_name);
            self.failed = true;
            self.files.clear();
            self.partial.discard();
            Error::Io { action: "write", path, source }
        })
    }

    fn check_alive(&self) -> Result<()> {
        if self.failed {
            return Err(OutputError::WriterFailed { path: self.partial.out().to_owned() }.into());
        }
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        let missing: Vec<&str> = self
            .slots
            .iter()
            .filter(|(_, s)| s.sum.is_none())
            .map(|(name, _)| name.as_str())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let first = missing.iter().take(5).map(|name| format!("`{name}`"));
        let mut examples = first.collect::<Vec<_>>().join(", ");
        if missing.len() > 5 {
            examples.push_str(", ...");
        }
        Err(OutputError::MissingTensors { count: missing.len(), examples }.into())
    }

    /// The index of a sharded checkpoint, as transformers writes it.
    fn index_text(&self) -> Result<String> {
        let mut total = 0;
        let mut weight_map = Map::new();
        for (name, slot) in &self.slots {
            total += slot.spec.bytes();
            let name = self.config.stored_name(name).into_owned();
            weight_map.insert(name, json!(self.plan.shards[slot.file].file_name));
        }
        let mut index = Map::new();
        index.insert("metadata".to_owned(), json!({ "total_size": total }));
        index.insert("weight_map".to_owned(), Value::Object(weight_map));
        let text = python_json::indented(&index).map_err(Error::json(self.partial.path()))?;
        Ok(text + "\n")
    }
}

impl Sealed {
    /// Gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Io`]; the working folder is kept.
    pub fn publish(self) -> Result<Written> {
        let Self { folder, files, bytes } = self;
        let files = files.into_iter().map(|file| file.file_name).collect();
        Ok(Written { dir: folder.publish()?, files, bytes })
    }
}

fn bytes<T: bytemuck::NoUninit>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}
