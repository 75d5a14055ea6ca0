//! The main job: every block calibrated, quantised and written, in one walk over the model.
//!
//! A block costs one forward pass. Each stage's inputs feed its Gram, the solved weights replace
//! the dense ones, and the same inputs go through them to become the next stage's: what AutoGPTQ
//! computes with five forwards a block, with the same mathematics.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use gptq_checkpoint::{
    Bits, Checkpoint, CheckpointWriter, GptqLinear, Layout, ModelConfig, QuantizeConfig, Written,
};
use gptq_compute::{Device, Tensor};
use gptq_model::{Block, LinearId, Model, SourcePrecision, Stage};
use gptq_quant::{QuantSpec, Quantised, factor, round_to_nearest, solve};

use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::progress::{BlockReport, LinearReport, Progress};
use crate::states::{Chunk, embed};

/// One branch to make.
#[derive(Clone, Debug)]
pub struct QuantiseJob<'a> {
    /// The dense model.
    pub source: &'a Checkpoint,
    /// Where to compute.
    pub device: Device,
    /// Solver choices.
    pub spec: QuantSpec,
    /// Calibration windows; recipes that do not calibrate ignore them.
    pub calibration: Option<&'a Calibration>,
    /// Tensors beside the four of each linear, and metadata.
    pub layout: Layout,
    /// The folder to make.
    pub out: PathBuf,
    /// Split the weights into files of at most this many bytes.
    pub max_shard_bytes: Option<u64>,
    /// Treat raised damping as an error.
    pub strict: bool,
}

/// A branch that was made.
#[derive(Debug)]
pub struct QuantiseOutcome {
    /// Folder, files and bytes.
    pub written: Written,
    /// Every block, in order.
    pub blocks: Vec<BlockReport>,
    /// Linears whose damping had to be raised.
    pub damp_retries: u32,
}

/// Makes one branch. Nothing is left under the output name unless everything succeeded.
pub fn quantise(job: &QuantiseJob<'_>, progress: &dyn Progress) -> Result<QuantiseOutcome> {
    job.spec.validate().map_err(Error::Spec)?;
    if job.source.quantize_config().is_some() {
        return Err(Error::AlreadyQuantised(job.source.dir().to_owned()));
    }
    let config = quantize_config(&job.spec)?;
    let mut writer = CheckpointWriter::create(
        &job.out,
        job.source,
        &config,
        job.layout,
        &metadata(job),
        job.max_shard_bytes,
    )?;
    let windows: &[Vec<u32>] = job.calibration.map_or(&[], |c| &c.windows);
    let seq_len = windows.first().map_or(1, Vec::len);
    let model = Model::new(job.source, job.device.clone(), SourcePrecision::Half, seq_len)?;
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let mut walk = Walk {
        windows: windows.len(),
        chunks: if job.spec.recipe.calibrates() { embed(&model, &windows)? } else { Vec::new() },
        model: &model,
        job,
        writer: &mut writer,
        report: Vec::new(),
    };

    let blocks = model.config().num_hidden_layers;
    let mut reports = Vec::with_capacity(blocks);
    progress.begin("quantise", blocks);
    for index in 0..blocks {
        let report = walk.block(index, progress)?;
        progress.block(&report);
        reports.push(report);
    }
    progress.end();
    copy_dense(job.source, &mut writer)?;
    let written = writer.finish(None)?;
    let damp_retries = reports.iter().flat_map(|b| &b.linears).map(|l| l.damp_retries).sum();
    Ok(QuantiseOutcome { written, blocks: reports, damp_retries })
}

/// Prefix of a linear's tensors in a checkpoint.
pub(crate) fn linear_name(model: &Model<'_>, block: &Block, id: LinearId) -> String {
    let shapes = model.config().block_linears();
    format!("{}.{}", ModelConfig::block_prefix(block.index()), shapes[id as usize].name)
}

/// What quantize_config.json says of a branch.
pub(crate) fn quantize_config(spec: &QuantSpec) -> Result<QuantizeConfig> {
    Ok(QuantizeConfig::new(Bits::new(spec.bits)?, spec.group_size, spec.damp, spec.act_order))
}

/// Provenance for the file's metadata; the `card` layout leaves it out.
fn metadata(job: &QuantiseJob<'_>) -> BTreeMap<String, String> {
    let mut map = BTreeMap::from([
        ("quantizer".to_owned(), concat!("gptq ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("recipe".to_owned(), job.spec.recipe.name().to_owned()),
    ]);
    if let Some(calibration) = job.calibration {
        let windows = &calibration.windows;
        let seq_len = windows.first().map_or(0, Vec::len);
        map.insert("calibration".to_owned(), calibration.dataset.name.clone());
        map.insert("calibration_windows".to_owned(), format!("{} x {seq_len}", windows.len()));
        map.insert("calibration_sha256".to_owned(), calibration.sha256.clone());
    }
    map
}

/// Copies what is not quantised: embeddings, norms and head, as fp16.
fn copy_dense(source: &Checkpoint, writer: &mut CheckpointWriter) -> Result<()> {
    for name in writer.missing() {
        let tensor = source.tensor(&name)?;
        tensor.check_finite()?;
        writer.copy_dense(&name, &tensor)?;
    }
    Ok(())
}

/// The state of a walk over the blocks.
struct Walk<'a> {
    model: &'a Model<'a>,
    job: &'a QuantiseJob<'a>,
    writer: &'a mut CheckpointWriter,
    chunks: Vec<Chunk>,
    windows: usize,
    /// Linears of the current block.
    report: Vec<LinearReport>,
}

impl Walk<'_> {
    fn block(&mut self, index: usize, progress: &dyn Progress) -> Result<BlockReport> {
        let start = Instant::now();
        let mut block = self.model.load_block(index)?;
        if self.job.spec.recipe.calibrates() {
            self.calibrated(&mut block, progress)?;
        } else {
            self.rounded(&block)?;
        }
        Ok(BlockReport {
            block: index,
            seconds: start.elapsed().as_secs_f64(),
            linears: std::mem::take(&mut self.report),
        })
    }

    /// The staged forward: look at a stage's inputs, solve its linears, go on with the solved ones.
    fn calibrated(&mut self, block: &mut Block, progress: &dyn Progress) -> Result<()> {
        let model = self.model;
        let device = model.device();
        let inputs = self.inputs(|chunk| block.attention_input(device, &chunk.hidden))?;
        self.solve_stage(block, Stage::Qkv, &inputs, progress)?;

        let mut contexts = Vec::with_capacity(inputs.len());
        for (input, chunk) in inputs.into_iter().zip(&self.chunks) {
            contexts.push(block.attention_context(device, &input, model.rope(), chunk.seq_len)?);
        }
        self.solve_stage(block, Stage::Output, &contexts, progress)?;
        for (context, chunk) in contexts.into_iter().zip(&mut self.chunks) {
            block.attention_output(device, &context, &mut chunk.hidden)?;
        }

        let inputs = self.inputs(|chunk| block.mlp_input(device, &chunk.hidden))?;
        self.solve_stage(block, Stage::GateUp, &inputs, progress)?;
        let mut activations = Vec::with_capacity(inputs.len());
        for input in inputs {
            activations.push(block.mlp_activation(device, &input)?);
        }
        self.solve_stage(block, Stage::Down, &activations, progress)?;
        for (activation, chunk) in activations.into_iter().zip(&mut self.chunks) {
            block.mlp_output(device, &activation, &mut chunk.hidden)?;
        }
        Ok(())
    }

    fn inputs(&self, of: impl Fn(&Chunk) -> gptq_model::Result<Tensor>) -> Result<Vec<Tensor>> {
        Ok(self.chunks.iter().map(of).collect::<gptq_model::Result<_>>()?)
    }

    /// Gram, factor, and one solve for each linear of a stage.
    fn solve_stage(
        &mut self,
        block: &mut Block,
        stage: Stage,
        inputs: &[Tensor],
        progress: &dyn Progress,
    ) -> Result<()> {
        let device = self.model.device();
        let spec = &self.job.spec;
        let scale = 2.0 / self.windows as f32;
        let first = linear_name(self.model, block, stage.linears()[0]);
        let mut gram = device.gram(block.linear(stage.linears()[0]).cols())?;
        for input in inputs {
            device.gram_add(&mut gram, input)?;
        }
        let factored = factor(device, &gram, scale, spec).map_err(|source| match source {
            gptq_quant::Error::NotFinite { .. } => Error::Activations { linear: first.clone() },
            source => Error::Solve { linear: first.clone(), source },
        })?;
        if factored.damp_retries > 0 {
            if self.job.strict {
                return Err(Error::Strict { linear: first, damp: factored.damp, asked: spec.damp });
            }
            progress.warn(&format!(
                "the Hessian of `{first}` is not positive definite at damping {}; used {}",
                spec.damp, factored.damp
            ));
        }
        for &id in stage.linears() {
            let name = linear_name(self.model, block, id);
            let weight = block.linear(id);
            let energy = gram.quadratic_form(weight)? * f64::from(scale);
            let solved = solve(device, weight, &factored, spec)
                .map_err(|source| Error::Solve { linear: name.clone(), source })?;
            self.write(&name, &solved)?;
            self.report.push(LinearReport {
                name,
                relative_error: solved.loss.map(|loss| loss / energy.max(f64::MIN_POSITIVE)),
                damp: Some(factored.damp),
                damp_retries: factored.damp_retries,
            });
            block.set_linear(id, solved.weight);
        }
        Ok(())
    }

    /// Every linear on its own, without calibration.
    fn rounded(&mut self, block: &Block) -> Result<()> {
        for id in LinearId::ALL {
            let name = linear_name(self.model, block, id);
            let rounded = round_to_nearest(self.model.device(), block.linear(id), &self.job.spec)
                .map_err(|source| Error::Solve { linear: name.clone(), source })?;
            self.write(&name, &rounded)?;
            self.report.push(LinearReport {
                name,
                relative_error: None,
                damp: None,
                damp_retries: 0,
            });
        }
        Ok(())
    }

    fn write(&mut self, name: &str, solved: &Quantised) -> Result<()> {
        let (out_features, in_features) = solved.weight.shape();
        let zeros = vec![self.job.spec.zero(); solved.scales.len()];
        let packed = GptqLinear::pack(
            Bits::new(self.job.spec.bits)?,
            in_features,
            out_features,
            &solved.codes,
            &zeros,
            &solved.scales,
            &solved.g_idx,
        )?;
        Ok(self.writer.write_linear(name, &packed)?)
    }
}
