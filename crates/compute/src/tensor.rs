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
    /// A matrix in host memory, for [`crate::Device::Cpu`]. One that is not row-major, such as the
    /// product of two transposed matrices, is copied into that order, which operations walk along.
    pub fn from_host(values: Array2<f32>) -> Self {
        let standard = values.is_standard_layout();
        Self(Storage::Cpu(if standard { values } else { values.as_standard_layout().into_owned() }))
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, AttentionRule, AttentionShape, Device, RopeTable};

    fn noise(rows: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| ((i * 31 + j * 17) % 23) as f32 / 7.0 - 1.5)
    }

    /// Every way in makes the values row-major: operations give the same for both orders.
    #[test]
    fn column_major_values_are_values_too() {
        let device = Device::Cpu;
        let (rows, width) = (12, 16);
        let plain = noise(rows, width);
        let turned = plain.t().as_standard_layout().into_owned().reversed_axes();
        assert!(turned == plain && !turned.is_standard_layout());
        let table = RopeTable::new(&[1.0, 0.5, 0.2, 0.1], 6);
        let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 8, seq_len: 6 };
        let rule = AttentionRule::llama(8);
        let results = |x: &Tensor| {
            let mut rotated = x.clone();
            device.rope(&mut rotated, &table, 6).unwrap();
            let normed = device.rms_norm(x, &[0.5; 16], 1e-5).unwrap();
            let gated = device.gated(x.clone(), x, Activation::Silu).unwrap();
            let attended = device.attention(x, &rotated, x, shape, &rule).unwrap();
            [rotated, normed, gated, attended].map(Tensor::into_host)
        };
        let want = results(&Tensor::from_host(plain));
        assert_eq!(results(&Tensor::from_host(turned.clone())), want);
        assert_eq!(results(&device.upload_f32(turned).unwrap()), want);
    }

    #[test]
    fn row_major_values_are_not_copied() {
        let values = noise(3, 4);
        let at = values.as_ptr();
        assert_eq!(Tensor::from_host(values).as_host().as_ptr(), at);
    }
}
