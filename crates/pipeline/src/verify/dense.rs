//! What is not quantised against the base's, in the same coordinates.

use gptq_checkpoint::{Checkpoint, HEAD, Head, Layout, QuantizeConfig, tensor_specs};
use gptq_quant::Choices;
use ndarray::Array2;

use super::base::relative;
use super::contents::LEAVES;
use super::findings::{Check, Findings};
use crate::error::Result;
use crate::rotate::{FusedRotations, dense_head};

/// Embeddings, norms and the architecture's own biases: everything but the head, which a recipe may
/// have fitted.
pub(super) fn check(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    (stored, rotations): (&QuantizeConfig, Option<&FusedRotations>),
    findings: &mut Findings,
) -> Result<()> {
    let specs = tensor_specs(base.config(), stored, Layout::Modern).into_iter();
    let quantized = |name: &str| name.rsplit('.').next().is_some_and(|leaf| LEAVES.contains(&leaf));
    for name in specs.map(|spec| spec.name).filter(|name| !quantized(name) && name != HEAD) {
        findings.examine(Check::DenseWeights, 1);
        let Ok(found) = checkpoint.tensor(&name) else {
            // The checkpoint's own configuration does without it.
            findings.add(Check::DenseWeights, name, "is missing, but the base has it");
            continue;
        };
        let turned = rotations.map(|f| f.tensor(base, &name)).transpose()?.flatten();
        let exact = turned.is_none();
        let expected = match turned {
            Some(values) => values,
            None => base.tensor(&name)?.to_f16()?,
        };
        // Turned values are sums, which another processor may round the other way.
        let near = |found: f32, wanted: f32| {
            (found - wanted).abs() <= if exact { 0.0 } else { wanted.abs() / 256.0 + 1e-3 }
        };
        let found = found.to_f32();
        let pairs = found.iter().zip(&expected);
        let wrong = pairs.filter(|&(&a, b)| !near(a, b.to_f32())).count();
        if wrong > 0 || found.len() != expected.len() {
            let message = format!("has {wrong} values of {} that the base does not", found.len());
            findings.add(Check::DenseWeights, name, message);
        }
    }
    Ok(())
}

/// How much the head was changed, as energy over the base's. One that no recipe fitted is the base's,
/// and so is a head of zeros, which fitting leaves as it is.
pub(super) fn head_change(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    rotations: Option<&FusedRotations>,
    recorded: Option<Choices>,
    findings: &mut Findings,
) -> Result<Option<f64>> {
    findings.examine(Check::DenseWeights, 1);
    let expected = dense_head(base, rotations)?;
    let found = checkpoint.tensor(HEAD)?.to_f32();
    let (mut change, mut energy) = (0.0, 0.0);
    for (a, b) in found.iter().zip(&expected) {
        change += f64::from(a - b.to_f32()).powi(2);
        energy += f64::from(b.to_f32()).powi(2);
    }
    let relative = relative(change, energy);
    // Rounding of turned values to fp16; and less than the 2 by which the head of another model
    // differs. A fitted one leaves out what the blocks have lost, which may be all of it.
    let most = match recorded {
        Some(choices) if choices.head == 0.0 => 1e-5,
        _ => 1.5,
    };
    if found.len() != expected.len() || relative.map_or(change > 0.0, |change| change > most) {
        let lost =
            checkpoint.head()? == Head::Tied && matches!(base.head()?, Head::Own | Head::Untied);
        let message = match (lost, relative) {
            (true, _) => {
                "is missing: config.json ties it to the embedding, but the base's is another"
                    .to_owned()
            }
            (false, Some(by)) => format!("differs from the base's by {by:.2e} of its energy"),
            (false, None) => "differs from the base's, which is all zeros".to_owned(),
        };
        findings.add(Check::DenseWeights, HEAD, message);
    }
    Ok(relative)
}

/// How far a linear that was left dense is from the base's: energy of the difference, and the base's.
pub(super) fn energies(
    checkpoint: &Checkpoint,
    name: &str,
    base: &Array2<f32>,
) -> Result<(f64, f64)> {
    let found = checkpoint.tensor(&format!("{name}.weight"))?.to_f32();
    let (mut error, mut energy) = (0.0, 0.0);
    for (found, &base) in found.iter().zip(base) {
        error += f64::from(found - base).powi(2);
        energy += f64::from(base).powi(2);
    }
    Ok((error, energy))
}
