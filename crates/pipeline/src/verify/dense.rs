//! What is not quantized against the base's, in the same coordinates.

use gptq_checkpoint::{
    Checkpoint, DType, HEAD, LEAVES, Layout, QuantizeConfig, TensorSpec, tensor_specs,
};
use half::f16;
use rayon::prelude::*;

use super::base_weight::BaseWeight;
use super::findings::{Check, Findings};
use crate::error::Result;
use crate::rotate::FusedRotations;

/// Values that a task compares.
const BATCH: usize = 1 << 16;

/// Embeddings, norms, routers and the architecture's own biases: everything but the head, which a recipe may
/// have fitted; and what is carried of other parts.
pub(super) fn check(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    (stored, rotations): (&QuantizeConfig, Option<&FusedRotations>),
    findings: &mut Findings,
) -> Result<()> {
    check_carried(checkpoint, base, findings)?;
    let specs = tensor_specs(base.config(), stored, Layout::Modern).into_iter();
    let quantized = |name: &str| name.rsplit('.').next().is_some_and(|leaf| LEAVES.contains(&leaf));
    let dense = |s: &TensorSpec| {
        !quantized(&s.name) && s.name != HEAD && !base.config().is_carried(&s.name)
    };
    for spec in specs.filter(dense) {
        let (exact_type, name) = (spec.is(DType::F32), spec.name);
        findings.examine(Check::DenseWeights, 1);
        let Ok(found) = checkpoint.tensor(&name) else {
            // The checkpoint's own configuration does without it.
            findings.add(Check::DenseWeights, name, "is missing, but the base has it");
            continue;
        };
        let turned = rotations.map(|f| f.tensor(base, &name)).transpose()?.flatten();
        let exact = turned.is_none();
        if exact_type {
            let wanted = base.tensor(&name)?.to_f32();
            let given = found.to_f32();
            let wrong = given.iter().zip(&wanted).filter(|(a, b)| a != b).count();
            report(&name, wrong, (found.len(), wanted.len()), findings);
            continue;
        }
        let expected = match turned {
            Some(values) => values,
            None => base.tensor(&name)?.to_f16()?,
        };
        // Turned values are sums, which another processor may round the other way.
        let near = |found: f32, wanted: f32| {
            (found - wanted).abs() <= if exact { 0.0 } else { wanted.abs() / 256.0 + 1e-3 }
        };
        let wrong = |(batch, expected): (usize, &[f16])| {
            let mut given =
                vec![0.0; expected.len().min(found.len().saturating_sub(batch * BATCH))];
            found.read_f32(batch * BATCH, &mut given);
            given.iter().zip(expected).filter(|(a, b)| !near(**a, b.to_f32())).count()
        };
        let wrong: usize = expected.par_chunks(BATCH).enumerate().map(wrong).sum();
        report(&name, wrong, (found.len(), expected.len()), findings);
    }
    Ok(())
}

/// The tensors of a checkpoint's other parts.
fn carried(of: &Checkpoint) -> impl Iterator<Item = &TensorSpec> {
    of.config().carried().unwrap_or_default().iter()
}

/// They are the base's bit for bit, whatever they are.
fn check_carried(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    findings: &mut Findings,
) -> Result<()> {
    for TensorSpec { name, .. } in carried(base) {
        findings.examine(Check::DenseWeights, 1);
        let other = other_place(name);
        let Some(found) = [name, &other].into_iter().find(|name| checkpoint.contains(name)) else {
            findings.add(Check::DenseWeights, name.clone(), "is missing, but the base has it");
            continue;
        };
        let (given, wanted) = (checkpoint.stored(found)?, base.stored(name)?);
        let same = given.dtype == wanted.dtype
            && given.shape == wanted.shape
            && given.bytes == wanted.bytes;
        if !same {
            findings.add(Check::DenseWeights, found.clone(), "is not the base's, bit for bit");
        }
        checkpoint.release(found);
        base.release(name);
    }
    for TensorSpec { name, .. } in carried(checkpoint) {
        if !base.contains(name) && !base.contains(&other_place(name)) {
            findings.add(Check::DenseWeights, name.clone(), "is in no part of the base");
        }
    }
    Ok(())
}

/// Where a tensor of another part lies in files of the other kind: programs that save such models since
/// transformers 4.52 put them one level lower.
fn other_place(name: &str) -> String {
    name.strip_prefix("model.").map_or_else(|| format!("model.{name}"), str::to_owned)
}

/// Says that values of a tensor are not the base's, if some are not.
fn report(name: &str, wrong: usize, (found, expected): (usize, usize), findings: &mut Findings) {
    if wrong > 0 || found != expected {
        let message = format!("has {wrong} values of {found} that the base does not");
        findings.add(Check::DenseWeights, name, message);
    }
}

/// How far a linear that was left dense is from the base's: energy of the difference, and the base's.
pub(super) fn energies(
    checkpoint: &Checkpoint,
    name: &str,
    base: &BaseWeight<'_>,
) -> Result<(f64, f64)> {
    let found = checkpoint.tensor(&format!("{name}.weight"))?;
    let width = found.shape.last().copied().unwrap_or(1).max(1);
    let (mut halves, mut given, mut wanted) = (Vec::new(), vec![0.0; width], vec![0.0; width]);
    let (mut error, mut energy) = (0.0, 0.0);
    for row in 0..found.len() / width {
        found.read_f32(row * width, &mut given);
        base.row(row, &mut halves, &mut wanted)?;
        for (found, &base) in given.iter().zip(&wanted) {
            error += f64::from(found - base).powi(2);
            energy += f64::from(base).powi(2);
        }
    }
    Ok((error, energy))
}
