//! Mean fourth powers of turned vectors and their gradient: two products on tensor cores and a kernel between them.

use std::sync::Arc;

use cudarc::driver::PushKernelArg;
use half::f16;

use super::buffer::Buffer;
use super::context::Cuda;
use super::dense::int;
use super::elementwise::{block_per_row, to_f16};
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::matrix::{Matrix, ensure_same_card};
use super::turning::halves;
use crate::error::Result;
use crate::fourth_powers::Turned;

const OP: &str = "fourth_powers";
/// Values of the vectors of one product: they are held in f32, and twice in fp16.
pub(crate) const VALUES: usize = 1 << 26;

/// What cubes are multiplied by so that fp16 holds the largest, n^1.5 of a vector with all in one value.
pub(crate) fn scale(order: usize) -> f32 {
    let largest = (order as f32).powf(1.5).log2().ceil() as i32;
    0.5_f32.powi((largest - 15).max(0))
}

/// Adds Σ yᵀ y³, scaled, to `gradient`; gives the sum of the vectors' mean fourth powers. The caller has checked that
/// vectors are as long as the rotation's order. Waits for all queued work.
pub(crate) fn add(
    rotation: &Matrix,
    gradient: &mut Matrix,
    weight: &Matrix,
    turned: Turned<'_>,
) -> Result<f64> {
    ensure_same_card(OP, &[rotation, gradient, weight])?;
    let (cuda, order) = (Arc::clone(rotation.cuda()), rotation.rows());
    let weight = to_f16(weight)?;
    // Vectors are brought to one norm below, whatever gains were scaled by.
    let rotation = match turned {
        Turned::Rows(gain) => halves(rotation, gain)?.high,
        Turned::Columns => halves(rotation, None)?.high,
    };
    let vectors = match turned {
        Turned::Rows(_) => weight.rows(),
        Turned::Columns => weight.cols(),
    };
    let step = (VALUES / order.max(1)).clamp(1, vectors.max(1));
    let mut values = cuda.uninit::<f32>(OP, step * order)?;
    let mut normed = cuda.uninit::<f16>(OP, step * order)?;
    let mut cubes = cuda.uninit::<f16>(OP, step * order)?;
    let mut means = cuda.uninit::<f32>(OP, vectors)?;
    let kernel = cuda.kernel("fourth_powers.cu", "fourth_powers")?;
    let (cols, scale) = (int(order)?, scale(order));
    for first in (0..vectors).step_by(step) {
        let rows = step.min(vectors - first);
        // Column-major: the transposed result, rotationᵀ · vectorsᵀ.
        let left = Operand::new(&cuda, rotation.f16(OP)?, 0, order, PLAIN);
        let right = match turned {
            Turned::Rows(_) => Operand::new(&cuda, weight.f16(OP)?, first * order, order, PLAIN),
            Turned::Columns => Operand::new(&cuda, weight.f16(OP)?, first, vectors, TRANSPOSED),
        };
        let target = Operand::new(&cuda, values.make_mut()?, 0, order, PLAIN);
        // SAFETY: the weight holds these vectors of `order` values, the rotation is [order, order], and there is
        // room for `step` vectors in values.
        unsafe { gemm(&cuda, OP, (order, rows, order), (left, right), 0.0, target)? };
        let mut of_rows = means.make_mut()?.slice_mut(first..first + rows);
        let mut launch = cuda.stream().launch_builder(&kernel);
        launch.arg(values.slice()).arg(normed.make_mut()?).arg(cubes.make_mut()?);
        launch.arg(&mut of_rows).arg(&cols).arg(&scale);
        // SAFETY: the arguments are the kernel's; values, normed and cubes hold these rows, and so do the means.
        unsafe { launch.launch(block_per_row(rows)) }.stage(OP)?;
        add_product(&cuda, (&normed, &cubes), (rows, order), gradient)?;
    }
    let means = cuda.read(OP, means.slice(), vectors)?;
    Ok(means.into_iter().map(f64::from).sum())
}

/// gradient += normedᵀ · cubes over `rows` rows.
fn add_product(
    cuda: &Arc<Cuda>,
    (normed, cubes): (&Buffer<f16>, &Buffer<f16>),
    (rows, order): (usize, usize),
    gradient: &mut Matrix,
) -> Result<()> {
    // Column-major: the transposed sum, cubesᵀ · normed.
    let left = Operand::new(cuda, cubes.slice(), 0, order, PLAIN);
    let right = Operand::new(cuda, normed.slice(), 0, order, TRANSPOSED);
    let target = Operand::new(cuda, gradient.f32_mut(OP)?, 0, order, PLAIN);
    // SAFETY: both operands hold at least `rows` rows of `order` values; the gradient is [order, order].
    unsafe { gemm(cuda, OP, (order, order, rows), (left, right), 1.0, target) }
}
