//! Stored matrices on their way to the card, and what they are converted to there.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg, result};
use half::f16;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::context::Cuda;
use super::error::StageContext;
use super::matrix::Matrix;
use super::transfer::address;
use crate::error::{Error, Result};
use crate::host::{FloatType, HostMatrix};

/// A stored matrix as fp16.
pub(crate) fn upload(cuda: &Arc<Cuda>, matrix: HostMatrix<'_>) -> Result<Matrix> {
    let values = converted::<f16>(
        cuda,
        matrix,
        match matrix.dtype() {
            FloatType::F32 => "f32_to_f16",
            FloatType::F16 => "f16_to_f16",
            FloatType::BF16 => "bf16_to_f16",
        },
    )?;
    Ok(Matrix::from_f16(cuda, (matrix.rows(), matrix.cols()), values))
}

/// Rows `ids` of a stored matrix as f32: the first hidden states. The caller has checked the range.
pub(crate) fn gather(cuda: &Arc<Cuda>, table: HostMatrix<'_>, ids: &[u32]) -> Result<Matrix> {
    let stride = table.cols() * table.dtype().size();
    let mut rows = vec![0_u8; ids.len() * stride];
    rows.par_chunks_mut(stride.max(1)).zip(ids).for_each(|(row, &id)| {
        row.copy_from_slice(&table.bytes()[id as usize * stride..][..stride]);
    });
    let rows = HostMatrix::new(&rows, table.dtype(), ids.len(), table.cols());
    let values = converted::<f32>(
        cuda,
        rows,
        match table.dtype() {
            FloatType::F32 => "f32_to_f32",
            FloatType::F16 => "f16_to_f32",
            FloatType::BF16 => "bf16_to_f32",
        },
    )?;
    Ok(Matrix::from_f32(cuda, (ids.len(), table.cols()), values))
}

/// The values of `matrix` on the device, converted by kernel `name` to `T`.
fn converted<T: DeviceRepr>(
    cuda: &Arc<Cuda>,
    matrix: HostMatrix<'_>,
    name: &'static str,
) -> Result<Buffer<T>> {
    const STAGE: &str = "upload";
    let count = matrix.rows() * matrix.cols();
    let values = Buffer::<T>::uninit_on(cuda.driver(), cuda.copies(), STAGE, count)?;
    if matrix.dtype().size() == size_of::<T>() {
        // In place: each thread writes what it has read.
        cuda.stage_in(STAGE, matrix.bytes(), address(values.slice(), cuda.copies()))?;
        convert(cuda, name, values.slice(), values.slice(), count)?;
    } else {
        let raw =
            Buffer::<u8>::uninit_on(cuda.driver(), cuda.copies(), STAGE, matrix.bytes().len())?;
        cuda.stage_in(STAGE, matrix.bytes(), address(raw.slice(), cuda.copies()))?;
        convert(cuda, name, raw.slice(), values.slice(), count)?;
    }
    cuda.stream().join(cuda.copies()).stage(STAGE)?;
    Ok(values)
}

/// Converts stored values on the copy stream; an error when one does not fit `name`'s target.
fn convert<A, B>(
    cuda: &Cuda,
    name: &'static str,
    from: &CudaSlice<A>,
    to: &CudaSlice<B>,
    count: usize,
) -> Result<()> {
    const STAGE: &str = "upload";
    let function = cuda.kernel("convert.cu", name)?;
    let bad = Buffer::<u32>::uninit_on(cuda.driver(), cuda.copies(), STAGE, 1)?;
    let (stream, counter) = (cuda.copies(), address(bad.slice(), cuda.copies()));
    let n = count as i64;
    // SAFETY: one word at `counter`; `from` and `to` hold `count` values of the kernel's types.
    unsafe {
        result::memset_d8_async(counter, 0, size_of::<u32>(), stream.cu_stream()).stage(STAGE)?;
        let mut launch = stream.launch_builder(&function);
        launch.arg(from).arg(to).arg(&n).arg(bad.slice());
        launch.launch(cuda.spread(count / 2)).stage(STAGE)?;
    }
    let mut found = [0_u32];
    // Waits for the copy stream alone.
    stream.memcpy_dtoh(bad.slice(), &mut found[..]).stage(STAGE)?;
    stream.synchronize().stage(STAGE)?;
    match found[0] as usize {
        0 => Ok(()),
        count => Err(Error::HalfOverflow { count }),
    }
}
