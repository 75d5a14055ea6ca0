//! A row-major matrix in device memory.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, LaunchArgs, PushKernelArg};
use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;
use rayon::prelude::*;

use super::buffer::{Buffer, Values};
use super::context::Cuda;
use crate::error::{Error, Result};

/// Values that one task widens.
const PIECE: usize = 1 << 16;

/// A row-major matrix on one card. Cloning shares the memory until one of the clones is written.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    cuda: Arc<Cuda>,
    rows: usize,
    cols: usize,
    values: Values,
}

impl Matrix {
    /// A matrix whose values the caller queues the writing of at once; see [`Cuda::uninit`].
    pub(crate) fn uninit_f16(
        cuda: &Arc<Cuda>,
        op: &'static str,
        (rows, cols): (usize, usize),
    ) -> Result<Self> {
        Ok(Self::from_f16(cuda, (rows, cols), cuda.uninit(op, rows * cols)?))
    }

    /// As [`Self::uninit_f16`], in f32.
    pub(crate) fn uninit_f32(
        cuda: &Arc<Cuda>,
        op: &'static str,
        (rows, cols): (usize, usize),
    ) -> Result<Self> {
        Ok(Self::from_f32(cuda, (rows, cols), cuda.uninit(op, rows * cols)?))
    }

    /// Wraps `rows × cols` values.
    pub(crate) fn from_f16(cuda: &Arc<Cuda>, shape: (usize, usize), values: Buffer<f16>) -> Self {
        Self { cuda: Arc::clone(cuda), rows: shape.0, cols: shape.1, values: Values::F16(values) }
    }

    /// Wraps `rows × cols` values.
    pub(crate) fn from_f32(cuda: &Arc<Cuda>, shape: (usize, usize), values: Buffer<f32>) -> Self {
        Self { cuda: Arc::clone(cuda), rows: shape.0, cols: shape.1, values: Values::F32(values) }
    }

    /// Copies a host matrix, as f32.
    pub(crate) fn upload_f32(cuda: &Arc<Cuda>, values: &Array2<f32>) -> Result<Self> {
        let standard = values.as_standard_layout();
        // A matrix in standard layout always is a slice.
        let values = standard.as_slice().unwrap_or_default();
        Ok(Self::from_f32(cuda, standard.dim(), cuda.copied("upload", values)?))
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    pub(crate) fn into_values(self) -> Values {
        self.values
    }

    pub(crate) fn bytes(&self) -> usize {
        let size = match self.values {
            Values::F16(_) => size_of::<f16>(),
            Values::F32(_) => size_of::<f32>(),
        };
        self.rows * self.cols * size
    }

    /// The fp16 values; an error naming `op` for f32.
    pub(crate) fn f16(&self, op: &'static str) -> Result<&CudaSlice<f16>> {
        match &self.values {
            Values::F16(buffer) => Ok(buffer.slice()),
            Values::F32(_) => Err(Error::WrongType { op, needs: "f16" }),
        }
    }

    /// The f32 values; an error naming `op` for fp16.
    pub(crate) fn f32(&self, op: &'static str) -> Result<&CudaSlice<f32>> {
        match &self.values {
            Values::F32(buffer) => Ok(buffer.slice()),
            Values::F16(_) => Err(Error::WrongType { op, needs: "f32" }),
        }
    }

    /// The fp16 values for writing; shared memory is copied first.
    pub(crate) fn f16_mut(&mut self, op: &'static str) -> Result<&mut CudaSlice<f16>> {
        match &mut self.values {
            Values::F16(buffer) => buffer.make_mut(),
            Values::F32(_) => Err(Error::WrongType { op, needs: "f16" }),
        }
    }

    /// The f32 values for writing; shared memory is copied first.
    pub(crate) fn f32_mut(&mut self, op: &'static str) -> Result<&mut CudaSlice<f32>> {
        match &mut self.values {
            Values::F32(buffer) => buffer.make_mut(),
            Values::F16(_) => Err(Error::WrongType { op, needs: "f32" }),
        }
    }

    /// Hands the values to a kernel to read, of whichever type they are.
    pub(super) fn pass<'a>(&'a self, launch: &mut LaunchArgs<'a>) {
        match &self.values {
            Values::F16(buffer) => launch.arg(buffer.slice()),
            Values::F32(buffer) => launch.arg(buffer.slice()),
        };
    }

    /// Device address of the first value, for reads queued on the stream of all work.
    pub(super) fn address(&self) -> u64 {
        match &self.values {
            Values::F16(buffer) => buffer.slice().device_ptr(self.cuda.stream()).0,
            Values::F32(buffer) => buffer.slice().device_ptr(self.cuda.stream()).0,
        }
    }

    /// As [`Self::address`], for writes; shared memory is copied first.
    pub(super) fn address_mut(&mut self) -> Result<u64> {
        let stream = self.cuda.stream();
        Ok(match &mut self.values {
            Values::F16(buffer) => buffer.make_mut()?.device_ptr_mut(stream).0,
            Values::F32(buffer) => buffer.make_mut()?.device_ptr_mut(stream).0,
        })
    }

    /// The values in host memory; waits for all queued work.
    pub(crate) fn to_host(&self) -> Result<Array2<f32>> {
        const STAGE: &str = "copying to the host";
        let count = self.rows * self.cols;
        let values = match &self.values {
            Values::F32(buffer) => self.cuda.read(STAGE, buffer.slice(), count)?,
            Values::F16(buffer) => {
                let halves = self.cuda.read(STAGE, buffer.slice(), count)?;
                let mut wide = vec![0.0; count];
                wide.par_chunks_mut(PIECE)
                    .zip(halves.par_chunks(PIECE))
                    .for_each(|(wide, halves)| halves.convert_to_f32_slice(wide));
                wide
            }
        };
        Array2::from_shape_vec(self.shape(), values).map_err(|_| Error::ShapeMismatch {
            op: STAGE,
            left: self.shape(),
            right: (count, 1),
        })
    }
}

/// Checks that all operands are on one card: a kernel cannot reach another's memory.
pub(crate) fn ensure_same_card(op: &'static str, operands: &[&Matrix]) -> Result<()> {
    let same = operands.windows(2).all(|pair| Arc::ptr_eq(&pair[0].cuda, &pair[1].cuda));
    if same { Ok(()) } else { Err(Error::DeviceMismatch { op }) }
}
