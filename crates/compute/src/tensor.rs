//! A row-major matrix on one device.

use ndarray::Array2;

use crate::cuda;
use crate::error::Result;

/// A row-major matrix: activations `[tokens, features]` or weights `[out_features, in_features]`.
///
/// On the CPU the values are f32. On a GPU weights and activations are fp16, hidden states and solver
/// matrices f32.
#[derive(Clone, Debug)]
pub struct Tensor(pub(crate) Storage);

/// Where the values are.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// Host memory.
    Cpu(Array2<f32>),
    /// Memory of an NVIDIA card.
    Cuda(cuda::Matrix),
}

impl Tensor {
    /// A matrix in host memory, for [`crate::Device::Cpu`].
    pub fn from_host(values: Array2<f32>) -> Self {
        Self(Storage::Cpu(values))
    }

    /// Rows: tokens or output features.
    pub fn rows(&self) -> usize {
        self.shape().0
    }

    /// Columns: features.
    pub fn cols(&self) -> usize {
        self.shape().1
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Storage::Cpu(a) => a.dim(),
            Storage::Cuda(m) => m.shape(),
        }
    }

    /// True when the values are in host memory: the CPU's tensors.
    pub fn is_host(&self) -> bool {
        matches!(self.0, Storage::Cpu(_))
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        let (rows, cols) = self.shape();
        match &self.0 {
            Storage::Cpu(_) => rows * cols * size_of::<f32>(),
            Storage::Cuda(m) => m.bytes(),
        }
    }

    /// A copy of the values in host memory.
    pub fn to_host(&self) -> Result<Array2<f32>> {
        match &self.0 {
            Storage::Cpu(a) => Ok(a.clone()),
            Storage::Cuda(m) => m.to_host(),
        }
    }

    /// The values of a CPU tensor, without a copy.
    ///
    /// # Panics
    /// When the tensor is on another device; [`Tensor::to_host`] reads any.
    pub fn as_host(&self) -> &Array2<f32> {
        match &self.0 {
            Storage::Cpu(a) => a,
            Storage::Cuda(_) => panic!("a GPU tensor was read as a CPU tensor"),
        }
    }

    /// The values of a CPU tensor.
    ///
    /// # Panics
    /// When the tensor is on another device; [`Tensor::to_host`] reads any.
    pub fn into_host(self) -> Array2<f32> {
        match self.0 {
            Storage::Cpu(a) => a,
            Storage::Cuda(_) => panic!("a GPU tensor was taken as a CPU tensor"),
        }
    }

    /// The values of a CPU tensor, for writing.
    ///
    /// # Panics
    /// When the tensor is on another device.
    pub fn as_host_mut(&mut self) -> &mut Array2<f32> {
        match &mut self.0 {
            Storage::Cpu(a) => a,
            Storage::Cuda(_) => panic!("a GPU tensor was written as a CPU tensor"),
        }
    }
}
