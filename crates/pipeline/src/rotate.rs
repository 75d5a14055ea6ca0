//! Rotations fused into a model's weights: the same function in other coordinates.
//!
//! With R orthogonal and norms without gains, norm(x R) = norm(x) R, so the residual stream may be
//! turned: embeddings become E R, linears that read the stream W R, linears that write it Rᵀ W. The
//! gains move into the linears that follow, and into what routes tokens to experts, which reads what gate
//! reads; the final norm's moves into the head. A second rotation
//! turns the outputs of every head's v and the inputs of o. Biases turn with the outputs that they
//! are added to; norms of query and key heads stay, as nothing before or after them is turned. Large
//! features are spread over all others, and every linear becomes easier to quantize (QuaRot, Ashkboos
//! et al., arXiv 2404.00456); names, shapes and the architecture stay.
//!
//! A rotation that is the same for all models takes n log n operations a row, which the host does behind a GPU's
//! work. A learned one is a matrix: a GPU turns by it what it holds, the host where it computes itself, or where
//! weights are solved from wider values than a GPU's.

use gptq_checkpoint::{
    Checkpoint, DenseId, DenseShape, EMBEDDING, FINAL_NORM, HEAD, ModelConfig, TensorRef,
};
use gptq_compute::{Device, Turning};
use gptq_model::{Block, Gains, LinearId, Mixture, NormId, Stage};
use gptq_quant::{Rotate, Rotation};
use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{Array2, s};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Fixed seeds: a source and its settings determine the file.
const STREAM_SEED: u64 = 1;
const HEAD_SEED: u64 = 2;

/// The rotations of a model.
#[derive(Debug)]
pub(crate) struct FusedRotations {
    /// Over the residual stream.
    stream: Option<Rotation>,
    /// The same on a GPU, where it is a matrix: what turns weights there.
    turning: Option<Turning>,
    /// Over the features of a head.
    head: Rotation,
    /// Where values begin among the outputs of a linear that makes queries and keys as well.
    fused_values: usize,
    /// What files hold less of gains.
    offset: f32,
}

/// The rotation of the residual stream that is the same for all models of a width.
pub(crate) fn random_stream(config: &ModelConfig) -> Rotation {
    Rotation::new(config.hidden_size, STREAM_SEED)
}

/// Gain of the norm before the head that is written, as it is multiplied with.
pub(crate) fn final_gain(
    source: &Checkpoint,
    rotations: Option<&FusedRotations>,
) -> Result<Vec<f32>> {
    let width = source.config().hidden_size;
    if rotations.is_some_and(|f| f.stream.is_some()) {
        return Ok(vec![1.0; width]);
    }
    let gain = source.tensor_shaped(FINAL_NORM, &[width])?;
    gain.check_finite()?;
    let offset = source.config().norm.offset();
    Ok(gain.to_f16()?.iter().map(|v| v.to_f32() + offset).collect())
}

/// The head `[vocab, hidden]` in the coordinates that are written.
pub(crate) fn dense_head(
    source: &Checkpoint,
    rotations: Option<&FusedRotations>,
) -> Result<Vec<f16>> {
    let table = table(source, HEAD)?;
    let head = match rotations.filter(|f| f.stream.is_some()) {
        Some(rotations) => rotations.table(&table, Some(&final_gain(source, None)?))?,
        None => table.to_f16()?,
    };
    source.release(HEAD);
    Ok(head)
}

impl FusedRotations {
    /// The rotations asked for; `None` when there are none. What `learned` gives is asked for where one is to
    /// be learned from the weights.
    ///
    /// # Errors
    /// Those of `learned`.
    pub(crate) fn new(
        config: &ModelConfig,
        rotate: Rotate,
        learned: impl FnOnce() -> Result<Rotation>,
    ) -> Result<Option<Self>> {
        let stream = match rotate {
            Rotate::None => return Ok(None),
            Rotate::Heads => None,
            Rotate::Full => Some(random_stream(config)),
            Rotate::Learned => Some(learned()?),
        };
        Ok(Some(Self {
            stream,
            turning: None,
            head: Rotation::new(config.head_dim, HEAD_SEED),
            fused_values: (config.num_attention_heads + config.num_key_value_heads)
                * config.head_dim,
            offset: config.norm.offset(),
        }))
    }

    /// Whether the residual stream is turned.
    pub(crate) fn turns_stream(&self) -> bool {
        self.stream.is_some()
    }

    /// Turns by a learned rotation on `device` from now on, where that is a GPU: a host would need longer for it
    /// than a GPU for all else.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn on(mut self, device: &Device) -> Result<Self> {
        let stream = self.stream.as_ref().filter(|stream| stream.is_matrix());
        if let Some(stream) = stream {
            self.turning = device.turning(&stream.matrix())?;
        }
        Ok(self)
    }

    /// Turns the weights of a block on the CPU. What is left for a GPU to turn once they are there, by
    /// [`Self::placed`], follows from the gains that are given back; with `exact`, nothing is.
    pub(crate) fn block(&self, block: &mut Block, exact: bool) -> Result<Option<Gains>> {
        let left = self.turning.is_some() && !exact;
        let gains = self.stream.is_some().then(|| block.gains().clone());
        if self.stream.is_some() {
            for norm in [NormId::BeforeAttention, NormId::BeforeMlp] {
                block.take_gain(norm);
            }
        }
        if let (Some(stream), Some(gains), Some(mixture)) =
            (&self.stream, &gains, block.mixture_mut())
        {
            let gain = gains.get(NormId::BeforeMlp);
            let Mixture { router, shared_gate, .. } = mixture;
            for weight in [Some(router), shared_gate.as_mut()].into_iter().flatten() {
                let turned = self.turned_router(stream, weight.to_host()?, gain);
                *weight = Device::Cpu.upload_f32(turned.mapv(f16::to_f32))?;
            }
        }
        for id in block.ids() {
            if let (Some((rotation, first)), Some(bias)) = (self.of_outputs(id), block.bias_mut(id))
            {
                turn_bias(rotation, &mut bias[first..]);
            }
            if !(self.turns(id) && (!left || turned_by_head(id))) {
                continue;
            }
            let mut weight = block.linear(id).weight.to_host()?;
            self.weight(id, &mut weight, gains.as_ref().filter(|_| !left));
            block.set_weight(id, Device::Cpu.upload_f32(weight)?);
        }
        Ok(gains.filter(|_| left))
    }

    /// Turns what [`Self::block`] left of a block, now on the GPU; `gains` is what it gave.
    pub(crate) fn placed(&self, device: &Device, block: &mut Block, gains: &Gains) -> Result<()> {
        let Some(turning) = &self.turning else { return Ok(()) };
        for id in block.ids() {
            let weight = &block.linear(id).weight;
            let turned = match Stage::of(id) {
                Stage::Qkv => turning.inputs(weight, gains.get(NormId::BeforeAttention))?,
                Stage::GateUp => turning.inputs(weight, gains.get(NormId::BeforeMlp))?,
                Stage::Output | Stage::Down => turning.outputs(weight)?,
            };
            block.set_weight(id, turned);
        }
        // What is read of the GPU waits for all that is queued, so that it is asked when all is.
        for linear in block.linears() {
            if !device.all_finite(&linear.weight)? {
                return Err(Error::Rotated { tensor: format!("{}.weight", linear.name) });
            }
        }
        Ok(())
    }

    /// x ← x R for every run of the residual stream's features.
    pub(crate) fn stream_rows(&self, rows: &mut [f32]) {
        if let Some(stream) = &self.stream {
            stream.apply_rows(rows);
        }
    }

    /// Whether the weights of a linear are others than the source's.
    pub(crate) fn turns(&self, id: LinearId) -> bool {
        self.stream.is_some() || turned_by_head(id)
    }

    /// Turns a linear's weights; `gains` are those of the block's norms, folded into what follows
    /// them where the residual stream is turned.
    pub(crate) fn weight(&self, id: LinearId, weight: &mut Array2<f32>, gains: Option<&Gains>) {
        if let (Some(stream), Some(gains)) = (&self.stream, gains) {
            match Stage::of(id) {
                Stage::Qkv => turn_inputs(stream, weight, gains.get(NormId::BeforeAttention)),
                Stage::GateUp => turn_inputs(stream, weight, gains.get(NormId::BeforeMlp)),
                Stage::Output | Stage::Down => stream.apply_outputs(weight.view_mut()),
            }
        }
        match id {
            LinearId::V | LinearId::Qkv => {
                let first = if id == LinearId::Qkv { self.fused_values } else { 0 };
                self.head.apply_outputs(weight.slice_mut(s![first.., ..]));
            }
            LinearId::O => turn_inputs(&self.head, weight, None),
            _ => {}
        }
    }

    /// What the outputs of a linear are turned by, and the first that are.
    fn of_outputs(&self, id: LinearId) -> Option<(&Rotation, usize)> {
        match id {
            LinearId::V => Some((&self.head, 0)),
            LinearId::Qkv => Some((&self.head, self.fused_values)),
            LinearId::O | LinearId::Down | LinearId::ExpertDown(_) | LinearId::SharedDown => {
                self.stream.as_ref().map(|stream| (stream, 0))
            }
            LinearId::Q | LinearId::K | LinearId::Gate | LinearId::Up | LinearId::GateUp => None,
            LinearId::ExpertGate(_) | LinearId::ExpertUp(_) => None,
            LinearId::SharedGate | LinearId::SharedUp => None,
        }
    }

    /// What routes tokens, `[experts, hidden]`, with the gain of the norm before it and turned, from values
    /// and gains in fp16 and in fp16: what is calibrated is what will run.
    fn turned_router(
        &self,
        stream: &Rotation,
        mut weight: Array2<f32>,
        gain: Option<&[f32]>,
    ) -> Array2<f16> {
        weight.mapv_inplace(|v| f16::from_f32(v).to_f32());
        let stored = |gain: &f32| f16::from_f32(gain - self.offset).to_f32() + self.offset;
        let gain: Option<Vec<f32>> = gain.map(|gain| gain.iter().map(stored).collect());
        turn_inputs(stream, &mut weight, gain.as_deref());
        weight.mapv(f16::from_f32)
    }

    /// As [`Self::turned_router`], from the source; `None` where nothing is turned, and for what is added
    /// to the router's scores.
    fn router(&self, source: &Checkpoint, name: &str, of: &DenseShape) -> Result<Option<Vec<f16>>> {
        let (Some(stream), &[rows, cols], DenseId::Router | DenseId::SharedGate) =
            (&self.stream, of.shape.as_slice(), of.id)
        else {
            return Ok(None);
        };
        let tensor = source.tensor_shaped(name, &of.shape)?;
        tensor.check_finite()?;
        let values = tensor.to_f16()?;
        let values = Array2::from_shape_fn((rows, cols), |(i, j)| values[i * cols + j].to_f32());
        let prefix = name.strip_suffix(of.name.as_str()).unwrap_or_default();
        // All blocks have the same norms of hidden states.
        let norms = source.config().block_norms(0).into_iter();
        let norm = norms.filter(|norm| norm.id == NormId::BeforeMlp).map(|norm| {
            let gain =
                source.tensor_shaped(&format!("{prefix}{}.weight", norm.name), &norm.shape)?;
            Ok::<Vec<f32>, Error>(gain.to_f32().iter().map(|gain| gain + self.offset).collect())
        });
        let gain = norm.last().transpose()?;
        let turned = self.turned_router(stream, values, gain.as_deref());
        if turned.iter().any(|v| !v.is_finite()) {
            return Err(Error::Rotated { tensor: name.to_owned() });
        }
        Ok(Some(turned.into_raw_vec_and_offset().0))
    }

    /// A tensor outside of the blocks, or a block's norm, bias or router, as the file holds it; `None`
    /// when it is the source's own.
    pub(crate) fn tensor(&self, source: &Checkpoint, name: &str) -> Result<Option<Vec<f16>>> {
        if let Some(linear) = name.strip_suffix(".bias") {
            return self.bias(source, name, linear);
        }
        if let Some(dense) = source.config().dense_named(name) {
            return self.router(source, name, &dense);
        }
        let of_heads = name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight");
        if self.stream.is_none() || of_heads {
            return Ok(None);
        }
        if name == EMBEDDING {
            return self.embedding(source);
        }
        if name == HEAD {
            return dense_head(source, Some(self)).map(Some);
        }
        let ones = source.tensor(name)?.shape.iter().product();
        Ok(Some(vec![f16::from_f32(1.0 - self.offset); ones]))
    }

    /// The bias `name` of a linear.
    fn bias(&self, source: &Checkpoint, name: &str, linear: &str) -> Result<Option<Vec<f16>>> {
        let shape = source.config().linear_named(linear);
        let turned = shape.and_then(|shape| self.of_outputs(shape.id));
        let Some((rotation, first)) = turned else { return Ok(None) };
        let values = source.tensor(name)?.to_f16()?;
        let mut bias: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        turn_bias(rotation, &mut bias[first..]);
        let turned: Vec<f16> = bias.into_iter().map(f16::from_f32).collect();
        if turned.iter().any(|v| !v.is_finite()) {
            return Err(Error::Rotated { tensor: name.to_owned() });
        }
        Ok(Some(turned))
    }

    /// T · diag(gain) · R of a table of row vectors, in fp16.
    fn table(&self, table: &TensorRef<'_>, gain: Option<&[f32]>) -> Result<Vec<f16>> {
        let mut turned = table.to_f16()?;
        match (&self.turning, &self.stream) {
            (Some(turning), Some(_)) => turning.rows(&mut turned, gain)?,
            (None, Some(stream)) => turn_rows(stream, &mut turned, gain),
            (_, None) => {}
        }
        if turned.par_iter().any(|v| !v.is_finite()) {
            return Err(Error::Rotated { tensor: table.name.to_owned() });
        }
        Ok(turned)
    }

    /// The embedding; `None` when it is the source's own.
    pub(crate) fn embedding(&self, source: &Checkpoint) -> Result<Option<Vec<f16>>> {
        if self.stream.is_none() {
            return Ok(None);
        }
        let turned = self.table(&table(source, EMBEDDING)?, None)?;
        source.release(EMBEDDING);
        Ok(Some(turned))
    }
}

/// Whether the rotation of heads turns a linear's inputs or outputs.
fn turned_by_head(id: LinearId) -> bool {
    matches!(id, LinearId::V | LinearId::Qkv | LinearId::O)
}

fn table<'a>(source: &'a Checkpoint, name: &str) -> Result<TensorRef<'a>> {
    let config = source.config();
    let table = source.tensor_shaped(name, &[config.vocab_size, config.hidden_size])?;
    table.check_finite()?;
    Ok(table)
}

/// W ← W · diag(gain) · R.
fn turn_inputs(rotation: &Rotation, weight: &mut Array2<f32>, gain: Option<&[f32]>) {
    // Tensors in host memory are in standard layout; a copy makes it true of any.
    if !weight.is_standard_layout() {
        *weight = weight.as_standard_layout().into_owned();
    }
    let Some(values) = weight.as_slice_mut() else { return };
    if let Some(gain) = gain {
        scale_rows(values, gain);
    }
    rotation.apply_rows(values);
}

/// b ← b · R, rounded to fp16 as the file holds it: what is calibrated is what will run.
fn turn_bias(rotation: &Rotation, bias: &mut [f32]) {
    rotation.apply_rows(bias);
    bias.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32());
}

fn scale_rows(values: &mut [f32], gain: &[f32]) {
    values.par_chunks_mut(gain.len()).for_each(|row| {
        for (v, g) in row.iter_mut().zip(gain) {
            *v *= g;
        }
    });
}

/// T ← T · diag(gain) · R on the host.
fn turn_rows(stream: &Rotation, turned: &mut [f16], gain: Option<&[f32]>) {
    turned.par_chunks_mut(Rotation::ROWS * stream.order()).for_each_init(Vec::new, |wide, rows| {
        wide.resize(rows.len(), 0.0_f32);
        rows.convert_to_f32_slice(wide);
        if let Some(gain) = gain {
            scale_rows(wide, gain);
        }
        stream.apply_rows(wide);
        rows.convert_from_f32_slice(wide);
    });
}

#[cfg(test)]
#[path = "../../../tests/util/family_models.rs"]
pub(crate) mod family_models;

#[cfg(test)]
mod tests {
    use gptq_compute::{FloatType, HostMatrix, Ranks};
    use gptq_model::{FinalNorm, Model, SourcePrecision};

    use ndarray::ArrayView1;

    use super::{family_models, *};
    use crate::learn_rotation::learned;
    use crate::progress::Silent;
    use crate::recipe_fit::{has_experts, unrotatable};

    /// Of one window, or where there are experts of short ones, each of which keeps a token that goes
    /// another way to itself.
    fn logits(source: &Checkpoint, rotations: Option<&FusedRotations>) -> Array2<f32> {
        let seq_len = if has_experts(source.config()) { 4 } else { 48 };
        let (device, ids) = (Device::Cpu, (0..48).map(|i| i * 7 % 64).collect::<Vec<u32>>());
        let mut model =
            Model::new(source, device.clone(), SourcePrecision::Half, ids.len()).unwrap();
        if let Some(values) = rotations.and_then(|f| f.embedding(source).unwrap()) {
            model = model.with_embedding(values);
        }
        let mut hidden = model.embed(&ids).unwrap();
        for index in 0..model.config().num_hidden_layers {
            let mut block = model.load_block(index).unwrap();
            if let Some(rotations) = rotations {
                assert!(rotations.block(&mut block, false).unwrap().is_none());
            }
            block.forward(&device, &mut hidden, model.ropes(seq_len), seq_len).unwrap();
        }
        let gain = final_gain(source, rotations).unwrap();
        let normed = FinalNorm::new(model.config(), gain).apply(&device, &hidden).unwrap();
        let head = dense_head(source, rotations).unwrap();
        let (rows, cols) = (model.config().vocab_size, model.config().hidden_size);
        let head = HostMatrix::new(bytemuck::cast_slice(&head), FloatType::F16, rows, cols);
        device.linear(&normed, &device.upload(head).unwrap()).unwrap().to_host().unwrap()
    }

    /// Those of a source, learned by itself where one is.
    fn rotations(source: &Checkpoint, rotate: Rotate) -> Option<FusedRotations> {
        FusedRotations::new(source.config(), rotate, || {
            let (start, alone) = (random_stream(source.config()), Ranks::alone());
            let learned = learned(source, &start, (&Device::Cpu, &alone), &Silent)?;
            assert!(learned.record.after < learned.record.before, "{:?}", learned.record);
            Ok(learned.rotation)
        })
        .unwrap()
    }

    /// Only tables and biases are rounded to fp16, once: that is what may differ.
    #[test]
    fn rotated_models_of_every_family_are_the_same_function() {
        const ROUNDINGS: f32 = 0.02;
        for name in family_models::names() {
            let dir = tempfile::tempdir().unwrap();
            family_models::assemble(dir.path(), name);
            let source = Checkpoint::open(dir.path()).unwrap();
            let want = logits(&source, None);
            let streams = [Rotate::Full, Rotate::Learned].into_iter();
            let streams = streams.filter(|_| unrotatable(source.config()).is_none());
            for rotate in [Rotate::Heads].into_iter().chain(streams) {
                let rotations = rotations(&source, rotate);
                let got = logits(&source, rotations.as_ref());
                // In the total order NaN is the largest, where `max` would drop it.
                let largest = |row: ArrayView1<'_, f32>| {
                    row.iter().map(|e| e.abs()).max_by(f32::total_cmp).unwrap()
                };
                let off = &got - &want;
                let mut tokens: Vec<f32> = off.rows().into_iter().map(largest).collect();
                tokens.sort_by(f32::total_cmp);
                // Roundings of states and of a router may send a token to another of two experts that are next
                // to equal, which it and those after it show: of experts most tokens count.
                let place =
                    if has_experts(source.config()) { tokens.len() / 2 } else { tokens.len() - 1 };
                let worst = tokens[place];
                assert!(worst < ROUNDINGS, "{name}, {rotate:?}: {worst} of {tokens:?}");
            }
        }
    }

    /// Otherwise agreement would say nothing of the models that are left out.
    #[test]
    fn what_cannot_be_rotated_would_be_another_function() {
        for name in ["gemma2", "olmo2", "glm4", "cohere-plain"] {
            let dir = tempfile::tempdir().unwrap();
            family_models::assemble(dir.path(), name);
            let source = Checkpoint::open(dir.path()).unwrap();
            assert!(unrotatable(source.config()).is_some(), "{name}");
            let rotations = rotations(&source, Rotate::Full);
            let (got, want) = (logits(&source, rotations.as_ref()), logits(&source, None));
            let worst = (&got - &want).iter().map(|e| e.abs()).max_by(f32::total_cmp).unwrap();
            assert!(worst > 0.1, "{name}: {worst}");
        }
    }
}
