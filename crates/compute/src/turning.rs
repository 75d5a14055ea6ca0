//! Weights turned by an orthogonal matrix on a GPU.
//!
//! A dense rotation of n features takes 2 n operations a weight, which a host would need longer for than a GPU for all
//! else of a block. The host has no use for this: it turns with the matrix at hand.

use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;

use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::host::{FloatType, HostMatrix};
use crate::tensor::{Storage, Tensor};

/// A rotation `[n, n]` on a GPU.
#[derive(Debug)]
pub struct Turning {
    rotation: cuda::Matrix,
}

impl Device {
    /// Brings a rotation to the GPU; `None` on the CPU.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for a matrix that is not square, and those of the device.
    pub fn turning(&self, rotation: &Array2<f32>) -> Result<Option<Turning>> {
        let (rows, order) = rotation.dim();
        ensure_shape(rows == order, "turning weights", (rows, order), (order, order))?;
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(cuda) => {
                Ok(Some(Turning { rotation: cuda::Matrix::upload_f32(cuda, rotation)? }))
            }
        }
    }
}

impl Turning {
    /// Bytes that turning a weight of so many values by a rotation of order `n` takes beside the weight.
    #[must_use]
    pub fn bytes(n: usize, weight: usize) -> usize {
        // The rotation, its halves, sums in f32, and the turned weight.
        8 * n * n + 4 * cuda::turning::VALUES + 2 * weight
    }

    /// w · diag(gain) · R in fp16, for the rows of w `[rows, n]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`].
    pub fn inputs(&self, w: &Tensor, gain: Option<&[f32]>) -> Result<Tensor> {
        let order = self.rotation.rows();
        let sides = (w.shape(), (order, order));
        let fits = w.cols() == order && gain.is_none_or(|gain| gain.len() == order);
        self.turned(w, gain, fits, sides, cuda::turning::inputs)
    }

    /// Rᵀ · w in fp16, for the columns of w `[n, cols]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`].
    pub fn outputs(&self, w: &Tensor) -> Result<Tensor> {
        let order = self.rotation.rows();
        let sides = (w.shape(), (order, order));
        self.turned(w, None, w.rows() == order, sides, cuda::turning::outputs)
    }

    /// rows ← rows · diag(gain) · R in place, for rows of `n` values in host memory.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], and those of the device.
    pub fn rows(&self, rows: &mut [f16], gain: Option<&[f32]>) -> Result<()> {
        let order = self.rotation.rows();
        let device = Device::Cuda(Arc::clone(self.rotation.cuda()));
        // As many as a product sums at once.
        let step = (cuda::turning::VALUES / order.max(1)).max(1) * order;
        for rows in rows.chunks_mut(step) {
            let count = rows.len() / order;
            let matrix = HostMatrix::new(bytemuck::cast_slice(rows), FloatType::F16, count, order);
            let turned = self.inputs(&device.upload(matrix)?, gain)?.to_host()?;
            rows.convert_from_f32_slice(turned.as_slice().unwrap_or_default());
        }
        Ok(())
    }

    fn turned(
        &self,
        w: &Tensor,
        gain: Option<&[f32]>,
        fits: bool,
        (left, right): ((usize, usize), (usize, usize)),
        turn: fn(&cuda::Matrix, &cuda::turning::Halves) -> Result<cuda::Matrix>,
    ) -> Result<Tensor> {
        const OP: &str = "turning weights";
        ensure_shape(fits, OP, left, right)?;
        let Storage::Cuda(w) = &w.0 else { return Err(Error::DeviceMismatch { op: OP }) };
        let halves = cuda::turning::halves(&self.rotation, gain)?;
        Ok(Tensor(Storage::Cuda(turn(w, &halves)?)))
    }
}
