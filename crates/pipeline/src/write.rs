//! The file of a branch: its settings and provenance, linears packed and written behind the walk,
//! and what is copied because it is not quantized.

use std::collections::BTreeMap;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use gptq_checkpoint::{
    Bits, Checkpoint, CheckpointWriter, GptqLinear, HEAD, QuantizeConfig, pack_transposed,
};
use gptq_quant::{Codes, QuantSpec, Stored};
use gptq_records::branch_report::TOOL;
use gptq_records::dataset_identity::DatasetIdentity;
use gptq_records::source_dtype::SourceDtype;
use gptq_text::calibration::{Calibration, CalibrationRecipe};

use crate::error::{Error, Result};
use crate::job::QuantizeJob;
use crate::rotate::{FusedRotations, dense_head};
use crate::row_shards::RowShards;

/// Quantized linears that may wait for the writer.
const WRITE_BEHIND: usize = 4;

/// The writer of a branch, its working folder made.
pub(crate) fn writer(job: &QuantizeJob<'_>) -> Result<CheckpointWriter> {
    Ok(CheckpointWriter::create(
        &job.out,
        job.source,
        &quantize_config(&job.spec)?,
        job.layout,
        &metadata(&job.spec, job.source_dtype, job.calibration),
        job.max_shard_bytes,
    )?)
}

/// What quantize_config.json says of a branch.
pub(crate) fn quantize_config(spec: &QuantSpec) -> Result<QuantizeConfig> {
    Ok(QuantizeConfig::new(Bits::new(spec.bits)?, spec.group_size, spec.damp, spec.act_order))
}

/// Provenance for the file's metadata; the `card` layout leaves it out.
pub(crate) fn metadata(
    spec: &QuantSpec,
    source_dtype: SourceDtype,
    calibration: Option<&Calibration>,
) -> BTreeMap<String, String> {
    let calibration =
        calibration.map(|c| (&c.dataset, (c.windows.len(), c.seq_len), c.sha256.as_str()));
    provenance(spec, source_dtype, calibration)
}

/// Metadata as long as that of a branch calibrated by `recipe`: only the windows' hash, which needs
/// their text, is another.
#[must_use]
pub fn planned_metadata(
    spec: &QuantSpec,
    source_dtype: SourceDtype,
    recipe: &CalibrationRecipe,
) -> BTreeMap<String, String> {
    let dataset = recipe.unread();
    let hash = "0".repeat(64);
    let calibration = (&dataset, (recipe.windows(), recipe.seq_len), hash.as_str());
    provenance(spec, source_dtype, spec.recipe.calibrates().then_some(calibration))
}

fn provenance(
    spec: &QuantSpec,
    source_dtype: SourceDtype,
    calibration: Option<(&DatasetIdentity, (usize, usize), &str)>,
) -> BTreeMap<String, String> {
    let mut map = BTreeMap::from([
        ("quantizer".to_owned(), TOOL.to_owned()),
        ("recipe".to_owned(), spec.recipe.name().to_owned()),
        ("source_dtype".to_owned(), source_dtype.name().to_owned()),
    ]);
    if spec.recipe.calibrates() {
        map.insert("choices".to_owned(), spec.choices.to_string());
    }
    if let Some((dataset, (windows, seq_len), sha256)) = calibration {
        map.insert("calibration".to_owned(), dataset.portable().name);
        map.insert("calibration_windows".to_owned(), format!("{windows} x {seq_len}"));
        map.insert("calibration_sha256".to_owned(), sha256.to_owned());
    }
    map
}

/// Copies what is not quantized, before the first block is: what fp16 cannot hold, or is not finite,
/// shows now and not after the last. A head that will be fitted is only tried. Of shards that are
/// still to come nothing can be known.
pub(crate) fn copy_ahead(
    job: &QuantizeJob<'_>,
    rotations: Option<&FusedRotations>,
    writer: &mut CheckpointWriter,
) -> Result<()> {
    let source = job.source;
    if source.is_arriving() {
        return Ok(());
    }
    // Norms and biases that are folded or turned leave other values in the file.
    for (name, shape) in source.config().dense_tensors() {
        if shape.len() == 1 {
            let vector = source.tensor(&name)?;
            vector.check_finite()?;
            if job.source_dtype == SourceDtype::Fp16 {
                vector.to_f16()?;
            }
        }
    }
    let fitted = job.spec.recipe.calibrates() && job.spec.choices.head > 0.0;
    copy_dense(source, rotations, |name| !(fitted && name == HEAD), writer)?;
    if fitted {
        dense_head(source, rotations)?;
        source.release(HEAD);
    }
    Ok(())
}

/// Copies what is not quantized and not written yet, as fp16, rotated as the linears are.
pub(crate) fn copy_dense(
    source: &Checkpoint,
    rotations: Option<&FusedRotations>,
    wanted: impl Fn(&str) -> bool,
    writer: &mut CheckpointWriter,
) -> Result<()> {
    for name in writer.missing().into_iter().filter(|name| wanted(name)) {
        match rotations.map(|f| f.tensor(source, &name)).transpose()?.flatten() {
            Some(values) => writer.write_f16(&name, &values)?,
            None => {
                let tensor = source.tensor(&name)?;
                tensor.check_finite()?;
                writer.copy_dense(&name, &tensor)?;
            }
        }
        source.release(&name);
    }
    Ok(())
}

/// The way to the writer; ranks other than the first have none.
pub(crate) type Outbox = Option<SyncSender<(String, RowShards)>>;
pub(crate) type Writing<'scope> = Option<ScopedJoinHandle<'scope, Result<CheckpointWriter>>>;

/// Packs and writes linears on a thread of its own, which hands the writer back.
pub(crate) fn write_behind<'scope>(
    scope: &'scope Scope<'scope, '_>,
    writer: Option<CheckpointWriter>,
    spec: &QuantSpec,
) -> (Outbox, Writing<'scope>) {
    let Some(mut writer) = writer else { return (None, None) };
    let (sender, receiver) = sync_channel::<(String, RowShards)>(WRITE_BEHIND);
    let spec = spec.clone();
    let thread = scope.spawn(move || {
        for (name, shards) in receiver {
            writer.write_linear(&name, &packed(shards, &spec)?)?;
        }
        Ok(writer)
    });
    (Some(sender), Some(thread))
}

/// Hands a solved linear over; waits while the writer has enough.
pub(crate) fn send(writer: &Outbox, name: &str, shards: RowShards) -> Result<()> {
    let Some(writer) = writer else { return Ok(()) };
    writer.send((name.to_owned(), shards)).map_err(|_| Error::Thread("writing"))
}

/// The writer, once everything handed over is written.
pub(crate) fn join(thread: Writing<'_>) -> Result<Option<CheckpointWriter>> {
    thread.map(|thread| thread.join().map_err(|_| Error::Thread("writing"))?).transpose()
}

/// A solved linear in the file's form.
pub(crate) fn packed(shards: RowShards, spec: &QuantSpec) -> Result<GptqLinear> {
    let Stored { out_features, in_features, codes, scales, g_idx, .. } = shards.join();
    let bits = Bits::new(spec.bits)?;
    let qweight = match codes {
        Codes::Packed(words) => words,
        Codes::Plain(codes) => pack_transposed(bits, &codes, out_features, in_features)?,
    };
    Ok(GptqLinear::symmetric(bits, [in_features, out_features], qweight, scales, g_idx)?)
}
