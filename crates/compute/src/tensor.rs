//! A row-major matrix on one device.

use ndarray::Array2;

/// A row-major matrix: activations `[tokens, features]` or weights `[out_features, in_features]`.
///
/// On the CPU the values are f32.
#[derive(Clone, Debug)]
pub struct Tensor(pub(crate) Storage);

/// Where the values are.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// Host memory.
    Cpu(Array2<f32>),
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
        }
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        let (rows, cols) = self.shape();
        match &self.0 {
            Storage::Cpu(_) => rows * cols * size_of::<f32>(),
        }
    }

    /// The values in host memory, without a copy where they are there already.
    pub fn as_host(&self) -> &Array2<f32> {
        match &self.0 {
            Storage::Cpu(a) => a,
        }
    }

    /// The values in host memory, for writing.
    pub fn as_host_mut(&mut self) -> &mut Array2<f32> {
        match &mut self.0 {
            Storage::Cpu(a) => a,
        }
    }
}
