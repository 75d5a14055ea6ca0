//! How far the inputs of a quantised model have drifted from the unquantised one's: GPTAQ's term.
//!
//! Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration"
//! (arXiv 2504.02692): a linear should map the inputs X that it will get to the outputs that the
//! unquantised model has at X_fp. With D = (X_fp − X)ᵀX and U the solver's factor, the correction of
//! columns is P = triu(D Uᵀ, 1) U. Entry (i, j) of D Uᵀ above the diagonal reads D from column j
//! on, so only D's upper triangle in solve order is ever needed: half the work of the product, once
//! the order is known.

use ndarray::{Array2, s};

use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};
use crate::{Device, cpu, cuda};

/// The upper triangle of D = (X_fp − X)ᵀX `[n, n]` in solve order, accumulated in f32 over chunks of
/// tokens.
#[derive(Debug)]
pub struct Drift(Sum);

#[derive(Debug)]
enum Sum {
    Cpu { order: Vec<u32>, sum: Array2<f32> },
    Cuda(cuda::drift::Drift),
}

impl Device {
    /// An empty drift whose column j is column `order[j]` of the inputs.
    ///
    /// # Errors
    /// [`Error::RowOutOfRange`] when `order` is no permutation of its indices.
    pub fn drift(&self, order: &[u32]) -> Result<Drift> {
        let n = order.len();
        let mut seen = vec![false; n];
        for &column in order {
            match seen.get_mut(column as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::RowOutOfRange { row: column as usize, rows: n }),
            }
        }
        Ok(Drift(match self {
            Self::Cpu => Sum::Cpu { order: order.to_vec(), sum: Array2::zeros((n, n)) },
            Self::Cuda(cuda) => Sum::Cuda(cuda::drift::Drift::zeros(cuda, order)?),
        }))
    }

    /// Adds (reference − x)ᵀx of activations `[tokens, n]`. A GPU rounds the difference to fp16,
    /// which is exact where the two values are within a factor of two of each other.
    pub fn drift_add(&self, drift: &mut Drift, reference: &Tensor, x: &Tensor) -> Result<()> {
        const OP: &str = "drift_add";
        ensure_shape(reference.shape() == x.shape(), OP, reference.shape(), x.shape())?;
        let n = drift.order();
        ensure_shape(n == x.cols(), OP, (n, n), x.shape())?;
        match (&mut drift.0, &reference.0, &x.0) {
            (Sum::Cpu { order, sum }, Storage::Cpu(reference), Storage::Cpu(x)) => {
                let gathered = Array2::from_shape_fn(x.dim(), |(t, j)| x[[t, order[j] as usize]]);
                let moved = Array2::from_shape_fn(x.dim(), |(t, j)| {
                    let column = order[j] as usize;
                    reference[[t, column]] - x[[t, column]]
                });
                cpu::gram::accumulate_product(sum, moved.view(), gathered.view());
                Ok(())
            }
            (Sum::Cuda(drift), Storage::Cuda(reference), Storage::Cuda(x)) => {
                drift.add(reference, x)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

impl Drift {
    /// Order of the matrix: in_features.
    pub fn order(&self) -> usize {
        match &self.0 {
            Sum::Cpu { sum, .. } => sum.nrows(),
            Sum::Cuda(drift) => drift.order(),
        }
    }

    /// P = triu(D Uᵀ, 1) · U `[n, n]` in solve order, D being `scale` times the accumulated one;
    /// `upper` is zero below its diagonal.
    ///
    /// # Errors
    /// Shapes that do not fit, or a factor on another device.
    pub fn correction(self, upper: &Tensor, scale: f32) -> Result<Tensor> {
        const OP: &str = "the drift's correction";
        let n = self.order();
        ensure_shape(upper.shape() == (n, n), OP, upper.shape(), (n, n))?;
        match (self.0, &upper.0) {
            (Sum::Cpu { sum, .. }, Storage::Cpu(upper)) => {
                let mut masked = Array2::zeros((n, n));
                cpu::matmul::matmul_nt(sum.view(), upper.view(), 0.0, masked.view_mut());
                for (i, mut row) in masked.rows_mut().into_iter().enumerate() {
                    row.slice_mut(s![..=i]).fill(0.0);
                    row *= scale;
                }
                let mut out = sum;
                cpu::matmul::matmul_nt(masked.view(), upper.t(), 0.0, out.view_mut());
                Ok(Tensor(Storage::Cpu(out)))
            }
            (Sum::Cuda(drift), Storage::Cuda(upper)) => {
                Ok(Tensor(Storage::Cuda(drift.correction(upper, scale)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_correction_follows_its_definition() {
        let (tokens, n) = (23, 9);
        let value = |i: usize| ((i * 2_654_435_761) % 997) as f32 / 500.0 - 1.0;
        let x = Array2::from_shape_fn((tokens, n), |(t, j)| value(t * n + j));
        let reference = Array2::from_shape_fn((tokens, n), |(t, j)| value(31 * t + 7 * j + 5));
        let upper =
            Array2::from_shape_fn((n, n), |(i, j)| if i <= j { value(i * j + 3) } else { 0.0 });
        let order = [3, 1, 4, 0, 8, 2, 7, 6, 5];

        let mut drift = Device::Cpu.drift(&order).unwrap();
        for half in [0..11, 11..tokens] {
            let part =
                |a: &Array2<f32>| Tensor::from_host(a.slice(s![half.clone(), ..]).to_owned());
            Device::Cpu.drift_add(&mut drift, &part(&reference), &part(&x)).unwrap();
        }
        let p = drift.correction(&Tensor::from_host(upper.clone()), 0.5).unwrap();

        let d = (&reference - &x).mapv(f64::from).t().dot(&x.mapv(f64::from));
        let u = upper.mapv(f64::from);
        let d =
            Array2::from_shape_fn((n, n), |(i, j)| d[[order[i] as usize, order[j] as usize]] * 0.5);
        let masked = d.dot(&u.t());
        let masked =
            Array2::from_shape_fn((n, n), |(i, j)| if j > i { masked[[i, j]] } else { 0.0 });
        let want = masked.dot(&u);
        let scale = want.iter().fold(0.0_f64, |a, v| a.max(v.abs()));
        for (p, want) in p.as_host().iter().zip(&want) {
            assert!((f64::from(*p) - want).abs() < 1e-5 * scale, "{p} {want}");
        }
        // Strictly above the diagonal: a column corrects later ones only.
        assert!(p.as_host().indexed_iter().all(|((i, j), &v)| j > i || v == 0.0));
    }

    #[test]
    fn an_order_is_a_permutation() {
        for order in [&[0, 0][..], &[0, 2]] {
            assert!(matches!(Device::Cpu.drift(order), Err(Error::RowOutOfRange { .. })));
        }
    }
}
