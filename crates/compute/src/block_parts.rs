//! What blocks of other families than Llama need besides: parts of fused products, scaled residuals, sums over
//! experts, capped logits.

use std::ops::Range;

use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};

/// That values can be capped by it.
pub(crate) fn ensure_cap(op: &'static str, cap: Option<f32>) -> Result<()> {
    match cap {
        Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
            Err(Error::Unsupported { op, reason: format!("{cap} is no cap on values") })
        }
        _ => Ok(()),
    }
}

/// What all tensors hold, where all are of the same kind.
fn each<'a, T>(
    tensors: &[&'a Tensor],
    of_kind: impl Fn(&'a Storage) -> Option<&'a T>,
) -> Option<Vec<&'a T>> {
    tensors.iter().map(|tensor| of_kind(&tensor.0)).collect()
}

impl Device {
    /// A copy of `x` in the type that linears read: fp16 on a GPU, where values beyond become infinite. For
    /// hidden states that no norm comes before.
    pub fn activations(&self, x: &Tensor) -> Result<Tensor> {
        Ok(Tensor(match &x.0 {
            Storage::Cpu(x) => Storage::Cpu(x.clone()),
            Storage::Cuda(x) => Storage::Cuda(cuda::elementwise::to_f16(x)?),
        }))
    }

    /// A copy of some columns of `x`, in its type: one of the products that a fused weight has made.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for columns that there are not.
    pub fn columns(&self, x: &Tensor, columns: Range<usize>) -> Result<Tensor> {
        let fits = columns.start <= columns.end && columns.end <= x.cols();
        ensure_shape(fits, "columns", x.shape(), (columns.start, columns.end))?;
        Ok(Tensor(match &x.0 {
            Storage::Cpu(x) => Storage::Cpu(cpu::block_parts::columns(x, columns)),
            Storage::Cuda(x) => Storage::Cuda(cuda::block_parts::columns(x, columns)?),
        }))
    }

    /// x · wᵀ: `[tokens, in] · [out, in]ᵀ → [tokens, out]`, in f32 on every device: products that are compared
    /// with each other, for a router.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`], and on a GPU [`Error::WrongType`] for operands
    /// that are not fp16.
    pub fn logits(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        match &x.0 {
            Storage::Cpu(_) => self.linear(x, w),
            Storage::Cuda(x) => {
                const OP: &str = "logits";
                ensure_shape(x.cols() == w.cols(), OP, x.shape(), w.shape())?;
                let Storage::Cuda(w) = &w.0 else {
                    return Err(Error::DeviceMismatch { op: OP });
                };
                Ok(Tensor(Storage::Cuda(cuda::gemm::logits(x, w, 0..x.rows())?)))
            }
        }
    }

    /// Matrices of one type and as many rows side by side: what [`Self::columns`] takes apart.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for other rows and for no matrix, [`Error::DeviceMismatch`], and
    /// [`Error::WrongType`] for matrices of two types.
    pub fn joined(&self, parts: &[&Tensor]) -> Result<Tensor> {
        const OP: &str = "joined";
        let shape = parts.first().map_or((0, 0), |part| part.shape());
        let alike = !parts.is_empty() && parts.iter().all(|part| part.rows() == shape.0);
        ensure_shape(alike, OP, shape, (shape.0, parts.len()))?;
        let cols = parts.iter().map(|part| part.cols()).sum();
        if let Some(parts) = each(parts, |storage| match storage {
            Storage::Cpu(part) => Some(part),
            Storage::Cuda(_) => None,
        }) {
            return Ok(Tensor(Storage::Cpu(cpu::block_parts::joined(&parts, cols))));
        }
        let parts = each(parts, |storage| match storage {
            Storage::Cuda(part) => Some(part),
            Storage::Cpu(_) => None,
        });
        let parts = parts.ok_or(Error::DeviceMismatch { op: OP })?;
        Ok(Tensor(Storage::Cuda(cuda::block_parts::joined(&parts, cols)?)))
    }

    /// x ·= factor, in the type of `x`.
    pub fn scale(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        match &mut x.0 {
            Storage::Cpu(x) => cpu::block_parts::scale(x, factor),
            Storage::Cuda(x) => cuda::block_parts::scale(x, factor)?,
        }
        Ok(())
    }

    /// residual += factor · x, for hidden states and `x` of any type.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`], and [`Error::WrongType`] for a residual of fp16.
    pub fn add_scaled(&self, residual: &mut Tensor, x: &Tensor, factor: f32) -> Result<()> {
        const OP: &str = "add_scaled";
        ensure_shape(residual.shape() == x.shape(), OP, residual.shape(), x.shape())?;
        match (&mut residual.0, &x.0) {
            (Storage::Cpu(residual), Storage::Cpu(x)) => {
                cpu::block_parts::add_scaled(residual, x, factor);
                Ok(())
            }
            (Storage::Cuda(residual), Storage::Cuda(x)) => {
                cuda::block_parts::add_scaled(residual, x, factor)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// Row `rows[i]` of the residual += `weights[i]` · row i of `x`, which is of any type: what an expert adds to
    /// the tokens that were sent to it. Sums have one order, for no row is named twice.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], also for a row that is named twice, [`Error::RowOutOfRange`],
    /// [`Error::DeviceMismatch`], and [`Error::WrongType`] for a residual of fp16.
    pub fn add_rows(
        &self,
        residual: &mut Tensor,
        rows: &[u32],
        weights: &[f32],
        x: &Tensor,
    ) -> Result<()> {
        const OP: &str = "add_rows";
        let fits =
            rows.len() == weights.len() && x.rows() == rows.len() && x.cols() == residual.cols();
        ensure_shape(fits, OP, (rows.len(), weights.len()), x.shape())?;
        let mut named = vec![false; residual.rows()];
        for &row in rows {
            match named.get_mut(row as usize) {
                Some(named) => ensure_shape(
                    !std::mem::replace(named, true),
                    OP,
                    residual.shape(),
                    (row as usize, row as usize),
                )?,
                None => {
                    return Err(Error::RowOutOfRange { row: row as usize, rows: residual.rows() });
                }
            }
        }
        match (&mut residual.0, &x.0) {
            (Storage::Cpu(residual), Storage::Cpu(x)) => {
                cpu::block_parts::add_rows(residual, rows, weights, x);
                Ok(())
            }
            (Storage::Cuda(residual), Storage::Cuda(x)) => {
                cuda::block_parts::add_rows(residual, rows, weights, x)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// Each value v of f32 logits becomes cap · tanh(v / cap) (Gemma 2, arXiv 2408.00118, section 2.2).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a cap that is not positive, [`Error::WrongType`] for fp16.
    pub fn softcap(&self, logits: &mut Tensor, cap: f32) -> Result<()> {
        ensure_cap("softcap", Some(cap))?;
        match &mut logits.0 {
            Storage::Cpu(x) => cpu::block_parts::softcap(x.view_mut(), cap),
            Storage::Cuda(x) => cuda::block_parts::softcap(x, cap)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    fn noise(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 7919 + j * 104_729 + seed) % 2003) as f32 / 64.0 - 15.0
        })
    }

    #[test]
    fn parts_and_scaled_sums_are_what_they_say() {
        let device = Device::Cpu;
        let (a, b) = (noise(70, 9, 1), noise(70, 9, 2));
        let x = Tensor::from_host(a.clone());
        for columns in [0..4, 4..9, 3..3, 0..9] {
            let part = device.columns(&x, columns.clone()).unwrap().into_host();
            assert_eq!(part, a.slice(s![.., columns]));
        }
        assert!(matches!(device.columns(&x, 5..10), Err(Error::ShapeMismatch { .. })));
        let parts = [0..4, 4..4, 4..9].map(|range| device.columns(&x, range).unwrap());
        let whole = device.joined(&parts.each_ref()).unwrap().into_host();
        assert_eq!(whole, a);
        let short = Tensor::from_host(b.slice(s![1.., ..]).to_owned());
        assert!(matches!(device.joined(&[&x, &short]), Err(Error::ShapeMismatch { .. })));
        assert!(matches!(device.joined(&[]), Err(Error::ShapeMismatch { .. })));

        let mut sum = x.clone();
        device.add_scaled(&mut sum, &Tensor::from_host(b.clone()), 0.25).unwrap();
        // Exact in f32: multiples of 2⁻⁸ below 2⁵.
        assert_eq!(sum.into_host(), &a + &(&b * 0.25));
        let mut half = x.clone();
        device.scale(&mut half, 0.5).unwrap();
        assert_eq!(half.into_host(), &a * 0.5);
    }

    #[test]
    fn rows_are_added_where_they_belong_and_only_once() {
        let device = Device::Cpu;
        let (a, b) = (noise(6, 5, 1), noise(3, 5, 2));
        let x = Tensor::from_host(b.clone());
        let mut sum = Tensor::from_host(a.clone());
        device.add_rows(&mut sum, &[5, 0, 2], &[0.5, 2.0, -1.0], &x).unwrap();
        let mut want = a;
        for (i, (row, weight)) in [(5, 0.5), (0, 2.0), (2, -1.0)].into_iter().enumerate() {
            for j in 0..5 {
                want[[row, j]] += weight * b[[i, j]];
            }
        }
        assert_eq!(*sum.as_host(), want);
        let twice = device.add_rows(&mut sum, &[1, 4, 1], &[1.0; 3], &x);
        assert!(matches!(twice, Err(Error::ShapeMismatch { .. })));
        let beyond = device.add_rows(&mut sum, &[1, 6, 2], &[1.0; 3], &x);
        assert!(matches!(beyond, Err(Error::RowOutOfRange { row: 6, rows: 6 })));
        assert_eq!(*sum.as_host(), want, "a refused call has written");
    }

    #[test]
    fn caps_are_checked() {
        let mut x = Tensor::from_host(noise(2, 3, 1));
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let capped = Device::Cpu.softcap(&mut x, cap);
            assert!(matches!(capped, Err(Error::Unsupported { .. })), "{cap}");
        }
    }
}
