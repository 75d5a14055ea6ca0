//! Weights that stay where they are while text is made, in as few bytes as their file has.
//!
//! Making a token reads every weight once: what a step takes is their bytes over the memory's speed.
//! A [`Resident`] keeps fp16 and bfloat16 values and codes as they are and widens them on the way.

use half::f16;
use ndarray::Array2;

use crate::cpu;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::host::HostMatrix;
use crate::tensor::{Storage, Tensor};

/// A quantized weight, unpacked: value `[row, column]` is (code − zero) · scale of the column's group.
#[derive(Clone, Copy, Debug)]
pub struct CodedMatrix<'a> {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `[rows, cols]`.
    pub codes: &'a [u8],
    /// The codes that mean 0.0, `[groups, rows]`.
    pub zeros: &'a [u8],
    /// `[groups, rows]`.
    pub scales: &'a [f16],
    /// The group of each column.
    pub group_of: &'a [u32],
}

/// A weight `[out, in]` on a device, as it is stored.
#[derive(Clone, Debug)]
pub struct Resident(cpu::resident::Resident);

impl Resident {
    /// Output and input features.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        self.0.shape()
    }

    /// Bytes that a product with one token reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl Device {
    /// Keeps a dense weight on the device.
    ///
    /// # Errors
    /// [`Error::CpuOnly`] on a GPU.
    pub fn keep(&self, matrix: HostMatrix<'_>) -> Result<Resident> {
        self.cpu_only("keep")?;
        Ok(Resident(cpu::resident::Resident::dense(matrix)))
    }

    /// Keeps a quantized weight on the device, its codes packed.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the parts do not fit one another, [`Error::RowOutOfRange`] for a
    /// group without a scale, [`Error::CpuOnly`] on a GPU.
    pub fn keep_coded(&self, matrix: CodedMatrix<'_>) -> Result<Resident> {
        self.cpu_only("keep_coded")?;
        let CodedMatrix { bits, rows, cols, codes, zeros, scales, group_of } = matrix;
        ensure_shape(matches!(bits, 2 | 3 | 4 | 8), "keep_coded", (bits.into(), 0), (4, 0))?;
        ensure_shape(codes.len() == rows * cols, "keep_coded", (codes.len(), 1), (rows, cols))?;
        ensure_shape(group_of.len() == cols, "keep_coded", (group_of.len(), 1), (cols, 1))?;
        let fits = rows > 0 && zeros.len() == scales.len() && zeros.len().is_multiple_of(rows);
        ensure_shape(fits, "keep_coded", (zeros.len(), scales.len()), (rows, 1))?;
        let groups = zeros.len() / rows;
        if let Some(&row) = group_of.iter().find(|&&group| group as usize >= groups) {
            return Err(Error::RowOutOfRange { row: row as usize, rows: groups });
        }
        Ok(Resident(cpu::resident::Resident::coded(matrix)))
    }

    /// x · wᵀ: `[tokens, in] · [out, in]ᵀ → [tokens, out]`.
    ///
    /// Up to 16 tokens, each one's outputs are the same to the bit whatever the others are.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn resident_linear(&self, x: &Tensor, w: &Resident) -> Result<Tensor> {
        let mut out = Array2::zeros((x.rows(), w.shape().0));
        multiply(x, w, 0.0, &mut out, "resident_linear")?;
        Ok(Tensor(Storage::Cpu(out)))
    }

    /// residual += x · wᵀ.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn resident_linear_add(
        &self,
        x: &Tensor,
        w: &Resident,
        residual: &mut Tensor,
    ) -> Result<()> {
        const OP: &str = "resident_linear_add";
        let out = (x.rows(), w.shape().0);
        ensure_shape(residual.shape() == out, OP, out, residual.shape())?;
        match &mut residual.0 {
            Storage::Cpu(residual) => multiply(x, w, 1.0, residual, OP),
            Storage::Cuda(_) => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// Refuses what is not there on a GPU.
    pub(crate) fn cpu_only(&self, op: &'static str) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(_) => Err(Error::CpuOnly { op }),
        }
    }
}

fn multiply(
    x: &Tensor,
    w: &Resident,
    beta: f32,
    out: &mut Array2<f32>,
    op: &'static str,
) -> Result<()> {
    ensure_shape(x.cols() == w.shape().1, op, x.shape(), w.shape())?;
    let Storage::Cpu(x) = &x.0 else { return Err(Error::DeviceMismatch { op }) };
    w.0.multiply(x, beta, out);
    Ok(())
}
