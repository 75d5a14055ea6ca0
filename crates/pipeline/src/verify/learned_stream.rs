//! The learned rotation that a checkpoint has over its base, found from the two.
//!
//! A rotation R of the residual stream leaves the file with E R in the place of the base's embedding E, in fp16, so
//! that R is the solution of a least-squares problem with some eight equations for each unknown of a
//! column: known to some 10⁻⁴ of itself, whatever computed it, and without a word of the report. Descents on two devices
//! round differently, and a step that is taken on one may be taken back on the other; worked out again, R
//! could be another one altogether. That it is orthogonal is all that a rotation has to be: if one R makes the
//! base's embedding, norms, linears and head those of the file, the file is the base in other coordinates.

use gptq_checkpoint::{Checkpoint, EMBEDDING};
use gptq_compute::{Device, NormalEquations};
use gptq_quant::Rotation;
use half::f16;
use ndarray::Array2;

use crate::error::{Error, Result};
use crate::rotate::{FusedRotations, random_stream};

/// Rows of the embedding for each feature of a row: more would make nothing better that is compared.
const ROWS_PER_FEATURE: usize = 8;
/// Rows of one product.
const CHUNK: usize = 2048;
/// How far the squared length of a turned row may be off its own: fp16 moves it by 10⁻⁴, a word that was changed
/// in the file by anything. Such rows say nothing of R, and are found when all are compared.
const SAME_LENGTH: f64 = 0.01;
/// Directions that the embedding hardly uses say little of R, and would say it louder than the others: they are damped by
/// a tenth of the mean. That leads near to the rotation under which the embeddings are nearest to each other.
const DAMP: f64 = 0.1;
/// The distance from another rotation below which it is that one.
const SAME: f64 = 1e-4;

/// The rotation that takes the base's embedding to the checkpoint's; `None` where none does, or where it is the one
/// that all models of this width have in common.
///
/// # Errors
/// [`Error::RotationNotFound`] where the base's embedding does not span the residual stream.
pub(super) fn learned_stream(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
) -> Result<Option<Rotation>> {
    let config = base.config();
    let (vocabulary, width) = (config.vocab_size, config.hidden_size);
    let not_found = || Error::RotationNotFound { checkpoint: checkpoint.dir().to_owned() };
    let tables = [base, checkpoint]
        .map(|of| of.tensor_shaped(EMBEDDING, &[vocabulary, width]).map_err(Error::from));
    let [from, to] = tables;
    let (from, to) = (from?, to?);
    let step = (vocabulary / (ROWS_PER_FEATURE * width)).max(1);
    let mut equations = NormalEquations::new(width);
    let (mut halves, mut wide) = (vec![f16::ZERO; width], vec![0.0_f32; width]);
    let rows: Vec<usize> = (0..vocabulary).step_by(step).collect();
    for rows in rows.chunks(CHUNK) {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for row in rows {
            // As they were before they were turned.
            from.read_f16(row * width, &mut halves)?;
            to.read_f32(row * width, &mut wide);
            let before_of: Vec<f64> = halves.iter().map(|v| f64::from(v.to_f32())).collect();
            let after_of: Vec<f64> = wide.iter().map(|&v| f64::from(v)).collect();
            let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
            let (own, turned) = (square(&before_of), square(&after_of));
            if own > 0.0 && (turned / own - 1.0).abs() < SAME_LENGTH {
                before.extend(before_of);
                after.extend(after_of);
            }
        }
        let shape = (before.len() / width, width);
        let matrix = |values| Array2::from_shape_vec(shape, values).map_err(|_| not_found());
        equations.add(matrix(before)?.view(), matrix(after)?.view());
    }
    [base, checkpoint].iter().for_each(|of| of.release(EMBEDDING));
    let Some(solution) = equations.solve(DAMP) else { return Err(not_found()) };
    let Some(matrix) = orthogonal(&solution)? else { return Ok(None) };
    let common = random_stream(config).matrix().mapv(f64::from);
    let is_common = distance(&matrix, &common) < SAME;
    Ok((!is_common).then(|| Rotation::of_matrix(matrix.mapv(|value| value as f32))))
}

/// The orthogonal matrix nearest to one whose singular values are from DAMP's to 1; `None` where that is not reached.
fn orthogonal(solution: &Array2<f64>) -> Result<Option<Array2<f64>>> {
    /// Each is nine iterations, which make a small singular value thirty times as large.
    const ROUNDS: usize = 6;
    let mut matrix = Device::Cpu.nearest_orthogonal(solution)?;
    for _ in 0..ROUNDS {
        let next = Device::Cpu.nearest_orthogonal(&matrix)?;
        let moved = distance(&matrix, &next);
        matrix = next;
        if moved < 1e-24 {
            return Ok(Some(matrix));
        }
    }
    Ok(None)
}

/// The squared distance of two matrices over their order: 2 of unrelated rotations.
fn distance(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.nrows() as f64
}

/// Whether the checkpoint's embedding is the base's under these rotations, as far as some rows show it.
///
/// # Errors
/// Tensors that cannot be read.
pub(super) fn is_embedding_of(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    rotations: Option<&FusedRotations>,
) -> Result<bool> {
    const ROWS: usize = 64;
    /// Of a row's energy; fp16 takes 10⁻⁷ of it, and what is found of a rotation 10⁻⁶ or so.
    const SAME: f64 = 1e-3;
    let (vocabulary, width) = (base.config().vocab_size, base.config().hidden_size);
    let from = base.tensor_shaped(EMBEDDING, &[vocabulary, width])?;
    let to = checkpoint.tensor_shaped(EMBEDDING, &[vocabulary, width])?;
    let (mut halves, mut wide) = (vec![f16::ZERO; width], vec![0.0_f32; width]);
    let rows: Vec<usize> = (0..vocabulary).step_by((vocabulary / ROWS).max(1)).collect();
    let mut agreeing = 0;
    for row in &rows {
        from.read_f16(row * width, &mut halves)?;
        to.read_f32(row * width, &mut wide);
        let mut turned: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
        if let Some(rotations) = rotations {
            rotations.stream_rows(&mut turned);
        }
        let square = |values: &mut dyn Iterator<Item = f32>| -> f64 {
            values.map(|v| f64::from(v).powi(2)).sum()
        };
        let off = square(&mut turned.iter().zip(&wide).map(|(a, b)| a - b));
        agreeing += usize::from(off <= SAME * square(&mut turned.iter().copied()));
    }
    // Some may have been changed.
    Ok(2 * agreeing > rows.len())
}
