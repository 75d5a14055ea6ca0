//! Quantized weights whose scales are trained while their codes stay.
//!
//! The scale of a row's group is s = fp16(s₀ · eᵐ), where s₀ is what it started with and m, its log factor, is kept in
//! f32; the weight is s · (code − zero), which is what a loader makes of the file. Training takes the rounding of s for
//! the identity, so that the gradient by m is the sum of the weights' gradients times the weights over the group.

use half::f16;

use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};

/// A quantized weight as a file holds it: value `[row, column]` is (code − zero) · scale of the column's group.
#[derive(Clone, Copy, Debug)]
pub struct PackedCodes<'a> {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Output features, a multiple of 32.
    pub rows: usize,
    /// Input features, a multiple of 32.
    pub cols: usize,
    /// The codes, a bit stream down each column, as `qweight`: `[cols / 32 · bits, rows]`.
    pub words: &'a [u32],
    /// The code that means 0.0.
    pub zero: u8,
    /// `[groups, rows]`.
    pub scales: &'a [f16],
    /// Group of each column.
    pub g_idx: &'a [u32],
}

impl PackedCodes<'_> {
    /// Groups of a row.
    pub(crate) fn groups(&self) -> usize {
        self.scales.len() / self.rows.max(1)
    }

    fn check(&self) -> Result<()> {
        const OP: &str = "scaled_codes";
        let &PackedCodes { bits, rows, cols, words, zero, scales, g_idx } = self;
        let whole = rows > 0 && cols > 0 && rows.is_multiple_of(32) && cols.is_multiple_of(32);
        if !whole || !matches!(bits, 2 | 3 | 4 | 8) || u32::from(zero) >> bits > 0 {
            let reason = format!("{rows} × {cols} codes of {bits} bits, {zero} being 0.0");
            return Err(Error::Unsupported { op: OP, reason });
        }
        let count = cols / 32 * usize::from(bits) * rows;
        ensure_shape(words.len() == count, OP, (words.len(), 1), (count, 1))?;
        ensure_shape(g_idx.len() == cols, OP, (g_idx.len(), 1), (cols, 1))?;
        let groups = self.groups();
        ensure_shape(scales.len() == groups * rows, OP, (scales.len(), 1), (groups, rows))?;
        match g_idx.iter().find(|&&group| group as usize >= groups) {
            Some(&group) => Err(Error::RowOutOfRange { row: group as usize, rows: groups }),
            None => Ok(()),
        }
    }

    /// Columns by group, those of one group in their order, and where each group's begin; the end last.
    pub(crate) fn columns_by_group(&self) -> (Vec<u32>, Vec<u32>) {
        let mut starts = vec![0_u32; self.groups() + 1];
        self.g_idx.iter().for_each(|&group| starts[group as usize + 1] += 1);
        for group in 0..self.groups() {
            starts[group + 1] += starts[group];
        }
        let mut next = starts.clone();
        let mut columns = vec![0_u32; self.cols];
        for (column, &group) in self.g_idx.iter().enumerate() {
            columns[next[group as usize] as usize] = column as u32;
            next[group as usize] += 1;
        }
        (columns, starts)
    }
}

/// A quantized weight on a device with the scales that it started with.
#[derive(Debug)]
pub struct ScaledCodes(Kept);

#[derive(Debug)]
enum Kept {
    Cpu(cpu::scaled_codes::ScaledCodes),
    Cuda(cuda::scaled_codes::ScaledCodes),
}

impl ScaledCodes {
    /// Output and input features.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Kept::Cpu(kept) => kept.shape(),
            Kept::Cuda(kept) => kept.shape(),
        }
    }

    /// Groups of a row.
    #[must_use]
    pub fn groups(&self) -> usize {
        match &self.0 {
            Kept::Cpu(kept) => kept.groups(),
            Kept::Cuda(kept) => kept.groups(),
        }
    }

    /// That a matrix has a value for every scale.
    fn ensure_factors(&self, op: &'static str, factors: &Tensor) -> Result<()> {
        let wanted = (self.shape().0, self.groups());
        ensure_shape(factors.shape() == wanted, op, factors.shape(), wanted)
    }
}

impl Device {
    /// Keeps a quantized weight on the device: `bits / 8` bytes a code on a GPU, one on the CPU.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::RowOutOfRange`] for parts that do not fit one another,
    /// [`Error::Unsupported`] for sides that are no multiples of 32.
    pub fn scaled_codes(&self, codes: PackedCodes<'_>) -> Result<ScaledCodes> {
        codes.check()?;
        Ok(ScaledCodes(match self {
            Self::Cpu => Kept::Cpu(cpu::scaled_codes::ScaledCodes::new(&codes)),
            Self::Cuda(cuda) => Kept::Cuda(cuda::scaled_codes::ScaledCodes::new(cuda, &codes)?),
        }))
    }

    /// The weight `[out, in]` under the log factors `[out, groups]` (f32) of its scales, in the weights' type: what a
    /// file with [`Self::file_scales`] of the same factors means. All factors being 0, it is the weight that was
    /// kept.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn rescaled(&self, codes: &ScaledCodes, log_factors: &Tensor) -> Result<Tensor> {
        const OP: &str = "rescaled";
        codes.ensure_factors(OP, log_factors)?;
        match (&codes.0, &log_factors.0) {
            (Kept::Cpu(codes), Storage::Cpu(m)) => Ok(Tensor(Storage::Cpu(codes.weight(m)))),
            (Kept::Cuda(codes), Storage::Cuda(m)) => Ok(Tensor(Storage::Cuda(codes.weight(m)?))),
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// The scales `[groups, out]` under these log factors, as a file holds them: none is 0, and no code means more
    /// than fp16 holds.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`], and [`Error::HalfOverflow`] for scales beyond fp16.
    pub fn file_scales(&self, codes: &ScaledCodes, log_factors: &Tensor) -> Result<Vec<f16>> {
        const OP: &str = "file_scales";
        codes.ensure_factors(OP, log_factors)?;
        let scales = match (&codes.0, &log_factors.0) {
            (Kept::Cpu(codes), Storage::Cpu(m)) => codes.scales(m),
            (Kept::Cuda(codes), Storage::Cuda(m)) => codes.scales(m)?,
            _ => return Err(Error::DeviceMismatch { op: OP }),
        };
        match scales.iter().filter(|scale| !scale.is_finite()).count() {
            0 => Ok(scales),
            count => Err(Error::HalfOverflow { count }),
        }
    }

    /// Adds to `sum` `[out, groups]`, f32, the gradient by the log factors: Σ over a group's columns of (dyᵀ x) · w,
    /// for dy `[tokens, out]`, x `[tokens, in]` and the weight w that [`Self::rescaled`] has made. Sums run in a fixed
    /// order; dyᵀx is never held whole.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn scale_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        codes: &ScaledCodes,
        w: &Tensor,
        sum: &mut Tensor,
    ) -> Result<()> {
        const OP: &str = "scale_gradient";
        codes.ensure_factors(OP, sum)?;
        ensure_shape(w.shape() == codes.shape(), OP, w.shape(), codes.shape())?;
        ensure_shape(dy.rows() == x.rows(), OP, dy.shape(), x.shape())?;
        ensure_shape((dy.cols(), x.cols()) == w.shape(), OP, (dy.cols(), x.cols()), w.shape())?;
        match (&dy.0, &x.0, &codes.0, &w.0, &mut sum.0) {
            (
                Storage::Cpu(dy),
                Storage::Cpu(x),
                Kept::Cpu(codes),
                Storage::Cpu(w),
                Storage::Cpu(sum),
            ) => {
                codes.add_gradient(dy, x, w, sum);
                Ok(())
            }
            (
                Storage::Cuda(dy),
                Storage::Cuda(x),
                Kept::Cuda(codes),
                Storage::Cuda(w),
                Storage::Cuda(sum),
            ) => codes.add_gradient(dy, x, w, sum),
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}
