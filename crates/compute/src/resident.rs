//! Weights that stay where they are while text is made, in as few bytes as their file has.
//!
//! Making a token reads every weight once: what a step takes is their bytes over the memory's speed.
//! A [`Resident`] keeps fp16 and bfloat16 values and codes as they are and widens them on the way.

use std::sync::Arc;
use std::time::Instant;

use half::f16;
use ndarray::Array2;

use crate::cpu;
use crate::cuda;
use crate::cuda::Cuda;
use crate::cuda::coded::Coded;
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

/// A weight `[out, in]` on a device, as it is stored; on a GPU dense ones are fp16. Cloning shares a GPU's
/// memory.
#[derive(Clone, Debug)]
pub struct Resident(Kept);

#[derive(Clone, Debug)]
enum Kept {
    Cpu(cpu::resident::Resident),
    Cuda(Arc<Coded>),
}

impl Resident {
    /// Output and input features.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Kept::Cpu(kept) => kept.shape(),
            Kept::Cuda(kept) => kept.shape(),
        }
    }

    /// Bytes that a product with one token reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Kept::Cpu(kept) => kept.bytes(),
            Kept::Cuda(kept) => kept.bytes(),
        }
    }

    /// Bytes that a weight `[rows, cols]` takes on a GPU: symmetric codes of 2, 3, 4 or 8 bits in groups of
    /// so many columns or of all, or with 16 bits fp16 values.
    #[must_use]
    pub fn bytes_on_gpu(bits: u8, (rows, cols): (usize, usize), group: Option<usize>) -> usize {
        cuda::coded::kept_bytes(bits, (rows, cols), group)
    }

    /// The weight on this card.
    pub(crate) fn on(&self, cuda: &Arc<Cuda>) -> Option<Arc<Coded>> {
        match &self.0 {
            Kept::Cuda(kept) if Arc::ptr_eq(kept.cuda(), cuda) => Some(Arc::clone(kept)),
            _ => None,
        }
    }
}

impl Device {
    /// Keeps a dense weight on the device.
    ///
    /// # Errors
    /// [`Error::HalfOverflow`] when a value is not finite in fp16, on a GPU.
    pub fn keep(&self, matrix: HostMatrix<'_>) -> Result<Resident> {
        Ok(Resident(match self {
            Self::Cpu => Kept::Cpu(cpu::resident::Resident::dense(matrix)),
            Self::Cuda(cuda) => {
                Kept::Cuda(Arc::new(Coded::dense(&cuda::upload::upload(cuda, matrix)?)?))
            }
        }))
    }

    /// Keeps a quantized weight on the device, its codes packed.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the parts do not fit one another, [`Error::RowOutOfRange`] for a
    /// group without a scale.
    pub fn keep_coded(&self, matrix: CodedMatrix<'_>) -> Result<Resident> {
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
        Ok(Resident(match self {
            Self::Cpu => Kept::Cpu(cpu::resident::Resident::coded(matrix)),
            Self::Cuda(cuda) => Kept::Cuda(Arc::new(Coded::quantized(cuda, &matrix)?)),
        }))
    }

    /// x · wᵀ: `[tokens, in] · [out, in]ᵀ → [tokens, out]`, fp16 on a GPU.
    ///
    /// Up to 16 tokens, each one's outputs are the same to the bit whatever the others are; on a GPU so
    /// long as there are up to 2, up to 8 or more of them alike.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn resident_linear(&self, x: &Tensor, w: &Resident) -> Result<Tensor> {
        resident_product("resident_linear", x, w, cuda::product::linear)
    }

    /// The same in f32 on every device.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn resident_logits(&self, x: &Tensor, w: &Resident) -> Result<Tensor> {
        resident_product("resident_logits", x, w, cuda::product::logits)
    }

    /// Another copy of a weight, in memory of its own.
    ///
    /// # Errors
    /// Memory that is not to be had, on a GPU.
    pub fn copy_resident(&self, weight: &Resident) -> Result<Resident> {
        Ok(Resident(match &weight.0 {
            Kept::Cpu(kept) => Kept::Cpu(kept.clone()),
            Kept::Cuda(kept) => Kept::Cuda(Arc::new(kept.duplicate()?)),
        }))
    }

    /// Seconds of the products of tokens with each of some sets of weights that read the same tokens, which
    /// together are more than caches hold; the best of some rounds. The sets are copies of one another.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], also for no set, for sets that are no copies and for more tokens than are
    /// few, and [`Error::DeviceMismatch`].
    pub fn product_seconds(&self, x: &Tensor, sets: &[Vec<Resident>]) -> Result<f64> {
        const OP: &str = "product_seconds";
        const ROUNDS: usize = 3;
        let shapes = |set: &[Resident]| set.iter().map(Resident::shape).collect::<Vec<_>>();
        let first = sets.first().map(|set| shapes(set)).unwrap_or_default();
        let few = (1..=cuda::product::FEW_TOKENS).contains(&x.rows())
            && (1..=cuda::product::PARTS).contains(&first.len())
            && first.iter().all(|shape| shape.1 == x.cols())
            && sets.iter().all(|set| shapes(set) == first);
        ensure_shape(few, OP, x.shape(), first.first().copied().unwrap_or_default())?;
        if let Storage::Cuda(x) = &x.0 {
            let kept = |weight: &'_ Resident| match &weight.0 {
                Kept::Cuda(kept) if Arc::ptr_eq(kept.cuda(), x.cuda()) => Ok(Arc::clone(kept)),
                _ => Err(Error::DeviceMismatch { op: OP }),
            };
            let kept = sets.iter().map(|set| set.iter().map(kept).collect::<Result<Vec<_>>>());
            let kept = kept.collect::<Result<Vec<_>>>()?;
            let alike = kept.iter().flatten().all(|weight| weight.goes_with(&kept[0][0]));
            ensure_shape(alike, OP, first[0], first[0])?;
            let kept: Vec<Vec<&Coded>> =
                kept.iter().map(|set| set.iter().map(|weight| &**weight).collect()).collect();
            return cuda::product::seconds(x, &kept);
        }
        let mut least = f64::INFINITY;
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for weight in sets.iter().flatten() {
                self.resident_linear(x, weight)?;
            }
            least = least.min(start.elapsed().as_secs_f64());
        }
        Ok(least / sets.len() as f64)
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
        ensure_shape(x.cols() == w.shape().1, OP, x.shape(), w.shape())?;
        let out = (x.rows(), w.shape().0);
        ensure_shape(residual.shape() == out, OP, out, residual.shape())?;
        match (&x.0, &w.0, &mut residual.0) {
            (Storage::Cpu(x), Kept::Cpu(w), Storage::Cpu(residual)) => {
                w.multiply(x, 1.0, residual);
                Ok(())
            }
            (Storage::Cuda(x), Kept::Cuda(w), Storage::Cuda(residual))
                if Arc::ptr_eq(x.cuda(), w.cuda()) =>
            {
                cuda::product::linear_add(x, w, residual)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

/// x · wᵀ, on a card by `on_card`.
fn resident_product(
    op: &'static str,
    x: &Tensor,
    w: &Resident,
    on_card: fn(&cuda::Matrix, &Coded) -> Result<cuda::Matrix>,
) -> Result<Tensor> {
    ensure_shape(x.cols() == w.shape().1, op, x.shape(), w.shape())?;
    Ok(Tensor(match (&x.0, &w.0) {
        (Storage::Cpu(x), Kept::Cpu(w)) => {
            let mut out = Array2::zeros((x.nrows(), w.shape().0));
            w.multiply(x, 0.0, &mut out);
            Storage::Cpu(out)
        }
        (Storage::Cuda(x), Kept::Cuda(w)) if Arc::ptr_eq(x.cuda(), w.cuda()) => {
            Storage::Cuda(on_card(x, w)?)
        }
        _ => return Err(Error::DeviceMismatch { op }),
    }))
}
