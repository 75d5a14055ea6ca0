//! The main job: every block calibrated, quantised and written, in one walk over the model.
//!
//! Three threads share it: one reads the next block ahead, this one computes, one packs and writes
//! behind. Channels are bounded, so memory stays at two blocks of weights and a few linears.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

use gptq_checkpoint::{
    Bits, Checkpoint, CheckpointWriter, GptqLinear, Layout, ModelConfig, QuantizeConfig, Written,
    pack_rows, pack_transposed,
};
use gptq_compute::{Device, Ranks};
use gptq_model::{Block, LinearId, Model, SourcePrecision};
use gptq_quant::{Codes, QuantSpec, Stored, round_to_nearest};
use half::f16;

use crate::bands::Bands;
use crate::calibrate::{Calibrated, Calibrator, Streams};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::fold::{Folding, HEAD, written_config};
use crate::head;
use crate::memory::{BlockSizes, Parking, Workload, parking};
use crate::progress::{BlockReport, LinearReport, Progress, Silent};
use crate::states::embed;

/// Quantised linears that may wait for the writer.
const WRITE_BEHIND: usize = 4;

/// One branch to make.
#[derive(Clone, Debug)]
pub struct QuantiseJob<'a> {
    /// The dense model.
    pub source: &'a Checkpoint,
    /// Where to compute.
    pub device: Device,
    /// Who else makes the branch; rank 0 writes it.
    pub ranks: Ranks,
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

/// Makes one branch, on every rank of the job. Nothing is left under the output name unless everything succeeded.
pub fn quantise(job: &QuantiseJob<'_>, progress: &dyn Progress) -> Result<QuantiseOutcome> {
    job.spec.validate().map_err(Error::Spec)?;
    if job.source.quantize_config().is_some() {
        return Err(Error::AlreadyQuantised(job.source.dir().to_owned()));
    }
    let rotate = job.spec.choices.rotate;
    let folding = Folding::new(job.source.config(), rotate);
    let progress = if job.ranks.is_first() { progress } else { &Silent };
    let writer = job.ranks.is_first().then(|| writer(job)).transpose()?;
    let windows: &[Vec<u32>] = job.calibration.map_or(&[], |c| &c.windows);
    let seq_len = windows.first().map_or(1, Vec::len);
    let mut model = Model::new(job.source, job.device.clone(), SourcePrecision::Half, seq_len)?
        .with_ranks(job.ranks.clone());
    if let Some(embedding) = folding.as_ref().map(|f| f.embedding(job.source)).transpose()? {
        model = match embedding {
            Some(values) => model.with_embedding(values),
            None => model,
        };
    }
    let folding = folding.as_ref();

    let (walked, mut writer) = std::thread::scope(|scope| {
        let (sender, writing) = write_behind(scope, writer, &job.spec);
        let ahead = read_ahead(scope, &model, folding);
        let walked = walk(&ahead, &model, job, windows, &sender, progress);
        // A reader that waits to hand its block over learns here that nobody takes it.
        drop(ahead);
        drop(sender);
        // A failed writer closes its channel, which stops the walk: its error is the cause.
        let writer = join(writing)?;
        Ok::<_, Error>((walked?, writer))
    })?;
    let (reports, streams) = walked;
    let head = match streams {
        Some(mut streams) if job.spec.choices.head > 0.0 => {
            head::fitted(&model, folding, &job.spec, windows.len(), &mut streams)?
        }
        _ => None,
    };
    if let Some(writer) = &mut writer {
        copy_dense(job.source, folding, head.as_deref(), writer)?;
    }
    let written = told(job, writer.map(CheckpointWriter::finish).transpose()?)?;
    let damp_retries = reports.iter().flat_map(|b| &b.linears).map(|l| l.damp_retries).sum();
    Ok(QuantiseOutcome { written, blocks: reports, damp_retries })
}

/// The writer of a branch, its working folder made.
fn writer(job: &QuantiseJob<'_>) -> Result<CheckpointWriter> {
    Ok(CheckpointWriter::create(
        &job.out,
        job.source,
        &written_config(job.source.config(), &job.spec.choices),
        &quantize_config(&job.spec)?,
        job.layout,
        &metadata(job),
        job.max_shard_bytes,
    )?)
}

/// What rank 0 has written, on every rank: none goes on before the files are there.
fn told(job: &QuantiseJob<'_>, written: Option<Written>) -> Result<Written> {
    let words = written.as_ref().map_or_else(Vec::new, |written| {
        let mut words = vec![written.bytes as u32, (written.bytes >> 32) as u32];
        words.extend(written.files.join("\n").chars().map(u32::from));
        words
    });
    let words = job.ranks.exchange(words)?.swap_remove(0);
    if let Some(written) = written {
        return Ok(written);
    }
    let (size, names) = words.split_at(words.len().min(2));
    let bytes = size.iter().rev().fold(0, |bytes, &word| bytes << 32 | u64::from(word));
    let names: String = names.iter().filter_map(|&c| char::from_u32(c)).collect();
    let files = names.lines().map(str::to_owned).collect();
    Ok(Written { dir: job.out.clone(), files, bytes })
}

/// All blocks in order; each is read while the one before is computed. Returns the states after the
/// last, too.
fn walk(
    ahead: &Receiver<Result<Block>>,
    model: &Model<'_>,
    job: &QuantiseJob<'_>,
    windows: &[Vec<u32>],
    writer: &Outbox,
    progress: &dyn Progress,
) -> Result<(Vec<BlockReport>, Option<Streams>)> {
    let blocks = model.config().num_hidden_layers;
    progress.begin("quantise", blocks);
    let mut streams = None;
    let mut parked = Parking::default();
    if job.spec.recipe.calibrates() {
        let own = &windows[job.ranks.share(windows.len(), 1)];
        let tokens = own.iter().map(Vec::len).sum();
        let reference = job.spec.choices.needs_reference();
        let work = Workload { tokens, reference };
        parked = parking(model.device(), BlockSizes::of(model.config()), work)?;
        let own: Vec<&[u32]> = own.iter().map(Vec::as_slice).collect();
        let reference = reference.then(|| embed(model, &own, parked.hidden)).transpose()?;
        let quantised = embed(model, &own, parked.hidden)?;
        streams = Some(Streams { quantised, reference });
    }
    let mut reports = Vec::with_capacity(blocks);
    for index in 0..blocks {
        let start = Instant::now();
        let mut block = next_block(ahead)?;
        let done = match &mut streams {
            Some(streams) => {
                let run = CalibratedRun { model, job, windows: windows.len(), parked };
                run.block(&mut block, streams, writer, progress)?
            }
            None => rounded(model, &block, job, writer)?,
        };
        let report = BlockReport {
            block: index,
            seconds: start.elapsed().as_secs_f64(),
            stages: done.stages,
            linears: done.linears,
        };
        progress.block(&report);
        reports.push(report);
    }
    progress.end();
    Ok((reports, streams))
}

/// What every calibrated block of a job shares.
struct CalibratedRun<'a> {
    model: &'a Model<'a>,
    job: &'a QuantiseJob<'a>,
    windows: usize,
    parked: Parking,
}

impl CalibratedRun<'_> {
    fn block(
        &self,
        block: &mut Block,
        streams: &mut Streams,
        writer: &Outbox,
        progress: &dyn Progress,
    ) -> Result<Calibrated> {
        let calibrator = Calibrator {
            device: self.model.device(),
            rope: self.model.rope(),
            spec: &self.job.spec,
            ranks: &self.job.ranks,
            windows: self.windows,
            parking: self.parked,
            name: &|block, id| linear_name(self.model, block, id),
        };
        let done =
            calibrator.block(block, streams, &mut |name, bands| send(writer, name, bands))?;
        self.check_damping(&done.linears, progress)?;
        Ok(done)
    }

    /// Raised damping is said once for each Hessian, or refused.
    fn check_damping(&self, linears: &[LinearReport], progress: &dyn Progress) -> Result<()> {
        let asked = self.job.spec.damp;
        for linear in linears.iter().filter(|l| l.damp_retries > 0) {
            let damp = linear.damp.unwrap_or(asked);
            if self.job.strict {
                return Err(Error::Strict { linear: linear.name.clone(), damp, asked });
            }
            progress.warn(&format!(
                "the Hessian of `{}` is not positive definite at damping {asked}; used {damp}",
                linear.name
            ));
        }
        Ok(())
    }
}

/// Reads blocks one ahead of their use, and folds rotations into them, on a thread of its own.
pub(crate) fn read_ahead<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    model: &'env Model<'env>,
    folding: Option<&'env Folding>,
) -> Receiver<Result<Block>> {
    // A rendezvous: the block that waits here is the only one beside the one in use.
    let (sender, receiver) = sync_channel(0);
    scope.spawn(move || {
        for index in 0..model.config().num_hidden_layers {
            let block = load(model, index, folding);
            let failed = block.is_err();
            // A closed channel means that the walk has failed elsewhere.
            if sender.send(block).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

fn load(model: &Model<'_>, index: usize, folding: Option<&Folding>) -> Result<Block> {
    let Some(folding) = folding else { return Ok(model.load_block(index)?) };
    // Turned on the host, beside the work of a GPU.
    let mut block = model.load_block_on(&Device::Cpu, index)?;
    folding.block(&mut block)?;
    Ok(block.to_device(model.device())?)
}

/// The next block, or why it could not be read.
pub(crate) fn next_block(ahead: &Receiver<Result<Block>>) -> Result<Block> {
    ahead.recv().map_err(|_| Error::Thread("reading"))?
}

/// The way to the writer; ranks other than the first have none.
type Outbox = Option<SyncSender<(String, Bands)>>;
type Writing<'scope> = Option<ScopedJoinHandle<'scope, Result<CheckpointWriter>>>;

/// Packs and writes linears on a thread of its own, which hands the writer back.
fn write_behind<'scope>(
    scope: &'scope Scope<'scope, '_>,
    writer: Option<CheckpointWriter>,
    spec: &QuantSpec,
) -> (Outbox, Writing<'scope>) {
    let Some(mut writer) = writer else { return (None, None) };
    let (sender, receiver) = sync_channel::<(String, Bands)>(WRITE_BEHIND);
    let spec = spec.clone();
    let thread = scope.spawn(move || {
        for (name, bands) in receiver {
            writer.write_linear(&name, &packed(bands, &spec)?)?;
        }
        Ok(writer)
    });
    (Some(sender), Some(thread))
}

fn send(writer: &Outbox, name: &str, bands: Bands) -> Result<()> {
    let Some(writer) = writer else { return Ok(()) };
    writer.send((name.to_owned(), bands)).map_err(|_| Error::Thread("writing"))
}

fn join(thread: Writing<'_>) -> Result<Option<CheckpointWriter>> {
    thread.map(|thread| thread.join().map_err(|_| Error::Thread("writing"))?).transpose()
}

/// A solved linear in the file's form.
fn packed(bands: Bands, spec: &QuantSpec) -> Result<GptqLinear> {
    let Stored { out_features, in_features, codes, scales, groups, g_idx } = bands.join();
    let bits = Bits::new(spec.bits)?;
    let qweight = match codes {
        Codes::Packed(words) => words,
        Codes::Plain(codes) => pack_transposed(bits, &codes, out_features, in_features)?,
    };
    // Symmetric: one zero for all, stored minus one.
    let zeros = vec![spec.zero() - 1; scales.len()];
    let qzeros = pack_rows(bits, &zeros, groups, out_features)?;
    Ok(GptqLinear { bits, in_features, out_features, groups, qweight, qzeros, scales, g_idx })
}

/// Every linear of a block on its own, without calibration.
fn rounded(
    model: &Model<'_>,
    block: &Block,
    job: &QuantiseJob<'_>,
    writer: &Outbox,
) -> Result<Calibrated> {
    let mut linears = Vec::new();
    for id in LinearId::ALL {
        let name = linear_name(model, block, id);
        let solved = round_to_nearest(model.device(), block.linear(id), &job.spec)
            .map_err(|source| Error::Solve { linear: name.clone(), source })?;
        send(writer, &name, Bands::whole(solved.stored))?;
        linears.push(LinearReport { name, relative_error: None, damp: None, damp_retries: 0 });
    }
    Ok(Calibrated { linears, stages: BTreeMap::new() })
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
    if job.spec.recipe.calibrates() {
        map.insert("choices".to_owned(), job.spec.choices.to_string());
    }
    if let Some(calibration) = job.calibration {
        let windows = &calibration.windows;
        let seq_len = windows.first().map_or(0, Vec::len);
        map.insert("calibration".to_owned(), calibration.dataset.name.clone());
        map.insert("calibration_windows".to_owned(), format!("{} x {seq_len}", windows.len()));
        map.insert("calibration_sha256".to_owned(), calibration.sha256.clone());
    }
    map
}

/// Copies what is not quantised: embeddings, norms and head (the fitted one, if there is one), as
/// fp16, rotated as the linears are.
fn copy_dense(
    source: &Checkpoint,
    folding: Option<&Folding>,
    head: Option<&[f16]>,
    writer: &mut CheckpointWriter,
) -> Result<()> {
    for name in writer.missing() {
        if let (HEAD, Some(values)) = (name.as_str(), head) {
            writer.write_f16(&name, values)?;
            continue;
        }
        if let Some(values) = folding.map(|f| f.tensor(source, &name)).transpose()?.flatten() {
            writer.write_f16(&name, &values)?;
            continue;
        }
        let tensor = source.tensor(&name)?;
        tensor.check_finite()?;
        writer.copy_dense(&name, &tensor)?;
    }
    Ok(())
}
