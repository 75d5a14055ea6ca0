//! Moving a linear's target: the least-squares step that makes up for errors upstream.
//!
//! A quantized model gives a linear inputs X that differ from the unquantized model's. What its
//! outputs lack, L `[tokens, out]`, is regained best by the weights W + LᵀX H⁻¹ with H = XᵀX. (Arai
//! and Ichikawa's QEP, arXiv 2504.09629, and Li et al.'s GPTAQ, arXiv 2504.02692, take the drift of
//! the linear's own inputs, L = (X_fp − X) Wᵀ.) The pieces: differences, products summed over
//! tokens, H⁻¹ from the solver's factor, and the shifted weights.

use ndarray::Array2;

use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};
use crate::{Device, cpu, cuda};

impl Device {
    /// a − b as activations: f32 on the CPU, fp16 on a GPU.
    pub fn difference(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        const OP: &str = "difference";
        ensure_shape(a.shape() == b.shape(), OP, a.shape(), b.shape())?;
        match (&a.0, &b.0) {
            (Storage::Cpu(a), Storage::Cpu(b)) => Ok(Tensor(Storage::Cpu(a - b))),
            (Storage::Cuda(a), Storage::Cuda(b)) => {
                Ok(Tensor(Storage::Cuda(cuda::residual_shift::difference(a, b)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// A matrix of f32 zeros.
    pub fn zeros(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Ok(Tensor(match self {
            Self::Cpu => Storage::Cpu(Array2::zeros((rows, cols))),
            Self::Cuda(cuda) => Storage::Cuda(cuda::residual_shift::zeros(cuda, (rows, cols))?),
        }))
    }

    /// sum += aᵀb for activations a `[tokens, m]` and b `[tokens, n]`; the sum `[m, n]` is f32.
    pub fn cross_add(&self, sum: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        const OP: &str = "cross_add";
        ensure_shape(a.rows() == b.rows(), OP, a.shape(), b.shape())?;
        ensure_shape(sum.shape() == (a.cols(), b.cols()), OP, sum.shape(), (a.cols(), b.cols()))?;
        match (&mut sum.0, &a.0, &b.0) {
            (Storage::Cpu(sum), Storage::Cpu(a), Storage::Cpu(b)) => {
                cpu::matmul::matmul_nt(a.t(), b.t(), 1.0, sum.view_mut());
                Ok(())
            }
            (Storage::Cuda(sum), Storage::Cuda(a), Storage::Cuda(b)) => {
                cuda::residual_shift::cross_add(sum, a, b)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// B H⁻¹ `[m, n]` in f32 for B `[m, n]`, where UᵀU = H⁻¹ and column j of U `[n, n]` belongs to
    /// column `order[j]` of B; U is zero below its diagonal.
    ///
    /// # Errors
    /// Shapes that do not fit, or an `order` that is no permutation.
    pub fn over_hessian(&self, b: &Tensor, upper: &Tensor, order: &[u32]) -> Result<Tensor> {
        const OP: &str = "over_hessian";
        let n = b.cols();
        ensure_shape(upper.shape() == (n, n), OP, b.shape(), upper.shape())?;
        ensure_shape(order.len() == n, OP, b.shape(), (order.len(), 1))?;
        match (&b.0, &upper.0) {
            (Storage::Cpu(b), Storage::Cpu(upper)) => {
                let place = cuda::inverse_of(order)?;
                let shape = b.dim();
                let ordered = Array2::from_shape_fn(shape, |(i, j)| b[[i, order[j] as usize]]);
                let (mut half, mut whole) = (Array2::zeros(shape), ordered.clone());
                cpu::matmul::matmul_nt(ordered.view(), upper.view(), 0.0, half.view_mut());
                cpu::matmul::matmul_nt(half.view(), upper.t(), 0.0, whole.view_mut());
                let natural = Array2::from_shape_fn(shape, |(i, c)| whole[[i, place[c] as usize]]);
                Ok(Tensor(Storage::Cpu(natural)))
            }
            (Storage::Cuda(b), Storage::Cuda(upper)) => {
                Ok(Tensor(Storage::Cuda(cuda::residual_shift::over_hessian(b, upper, order)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// w + factor · shift `[out, in]` in f32.
    pub fn shifted(&self, w: &Tensor, shift: &Tensor, factor: f32) -> Result<Tensor> {
        const OP: &str = "shifted";
        ensure_shape(w.shape() == shift.shape(), OP, w.shape(), shift.shape())?;
        match (&w.0, &shift.0) {
            (Storage::Cpu(w), Storage::Cpu(shift)) => {
                let mut out = w.clone();
                out.scaled_add(factor, shift);
                Ok(Tensor(Storage::Cpu(out)))
            }
            (Storage::Cuda(w), Storage::Cuda(shift)) => {
                Ok(Tensor(Storage::Cuda(cuda::residual_shift::shifted(w, shift, factor)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// w + factor · w · m in f32, for w `[out, in]` and m `[in, in]` in f32.
    pub fn shifted_by(&self, w: &Tensor, m: &Tensor, factor: f32) -> Result<Tensor> {
        const OP: &str = "shifted_by";
        ensure_shape(m.shape() == (w.cols(), w.cols()), OP, w.shape(), m.shape())?;
        match (&w.0, &m.0) {
            (Storage::Cpu(w), Storage::Cpu(m)) => {
                let mut out = w.clone();
                let scaled = m * factor;
                cpu::matmul::matmul_nt(w.view(), scaled.t(), 1.0, out.view_mut());
                Ok(Tensor(Storage::Cpu(out)))
            }
            (Storage::Cuda(w), Storage::Cuda(m)) => {
                Ok(Tensor(Storage::Cuda(cuda::residual_shift::shifted_by(w, m, factor)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gram;
    use crate::hessian_prep::HessianPrep;
    use ndarray::s;

    fn noise(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        let value = |i: usize| ((i * 2_654_435_761 + seed * 977) % 997) as f32 / 500.0 - 1.0;
        Array2::from_shape_fn((rows, cols), |(i, j)| value(i * cols + j + 7 * seed))
    }

    /// Drawn from the definition: the weights that regain the most of what outputs lack leave a
    /// residual that is orthogonal to the inputs.
    #[test]
    fn a_shift_solves_the_least_squares_problem() {
        let (tokens, n, rows) = (60, 13, 5);
        let device = Device::Cpu;
        let host = |a: &Array2<f32>| Tensor::from_host(a.clone());
        let (x, lacking, w) = (noise(tokens, n, 1), noise(tokens, rows, 2), noise(rows, n, 3));
        let order: Vec<u32> = [3, 1, 12, 0, 8, 2, 7, 6, 5, 4, 9, 11, 10].to_vec();

        let mut gram = device.gram(n).unwrap();
        let mut cross = device.zeros(rows, n).unwrap();
        for part in [0..23, 23..tokens] {
            let part = |a: &Array2<f32>| host(&a.slice(s![part.clone(), ..]).to_owned());
            device.gram_add(&mut gram, &part(&x)).unwrap();
            device.cross_add(&mut cross, &part(&lacking), &part(&x)).unwrap();
        }
        let dead = vec![false; n];
        let prep = HessianPrep { scale: 1.0, order: &order, dead: &dead, damp: 0.0 };
        let gram: Gram = gram;
        let (upper, _) = gram.upper_factor(&prep).unwrap();
        let shift = device.over_hessian(&cross, &upper, &order).unwrap();
        let moved = device.shifted(&host(&w), &shift, 1.0).unwrap();

        let gained = x.dot(&(moved.as_host() - &w).t());
        let left = (&lacking - &gained).t().dot(&x);
        let scale = cross.as_host().iter().fold(0.0_f32, |a, v| a.max(v.abs()));
        assert!(left.iter().all(|v| v.abs() < 1e-4 * scale), "{left}");

        // The same through a map of the inputs: what lacks is the drift's image.
        let drift = noise(tokens, n, 4);
        let mut cross = device.zeros(n, n).unwrap();
        device.cross_add(&mut cross, &host(&drift), &host(&x)).unwrap();
        let map = device.over_hessian(&cross, &upper, &order).unwrap();
        let moved = device.shifted_by(&host(&w), &map, 1.0).unwrap();
        let gained = x.dot(&(moved.as_host() - &w).t());
        let lacking = drift.dot(&w.t());
        let left = (&lacking - &gained).t().dot(&x);
        assert!(left.iter().all(|v| v.abs() < 1e-4 * scale), "{left}");
        assert!(device.over_hessian(&cross, &upper, &[0; 13]).is_err());
    }

    /// What calibration computes instead of L: with D = L + X Wᵀ and H = s XᵀX + λ,
    /// s LᵀX H⁻¹ = (s DᵀX + λ W) H⁻¹ − W.
    #[test]
    fn a_shift_follows_from_states_without_the_products() {
        let (tokens, n, rows, scale, damp) = (60, 13, 5, 0.25, 0.7);
        let device = Device::Cpu;
        let host = |a: &Array2<f32>| Tensor::from_host(a.clone());
        let (x, lacking, w) = (noise(tokens, n, 1), noise(tokens, rows, 2), noise(rows, n, 3));
        let order: Vec<u32> = (0..n as u32).rev().collect();
        let mut gram = device.gram(n).unwrap();
        device.gram_add(&mut gram, &host(&x)).unwrap();
        let prep = HessianPrep { scale, order: &order, dead: &[false; 13], damp };
        let (upper, _) = gram.upper_factor(&prep).unwrap();
        let over = |b: &Tensor| device.over_hessian(b, &upper, &order).unwrap();
        let product = |outputs: &Array2<f32>| {
            let mut sum = device.zeros(rows, n).unwrap();
            device.cross_add(&mut sum, &host(outputs), &host(&x)).unwrap();
            sum
        };
        let expected = over(&product(&lacking));
        let drift = product(&(&lacking + &x.dot(&w.t())));
        let wanted = device.shifted(&drift, &host(&w), damp / scale).unwrap();
        let shift = device.shifted(&over(&wanted), &host(&w), -1.0 / scale).unwrap();
        let error = shift.as_host() - expected.as_host();
        let size = expected.as_host().iter().fold(0.0_f32, |a, v| a.max(v.abs()));
        assert!(error.iter().all(|v| v.abs() < 1e-4 * size), "{error}");
    }

    #[test]
    fn differences_are_of_equal_shapes() {
        let (a, b) = (noise(3, 4, 1), noise(3, 4, 2));
        let difference = Device::Cpu
            .difference(&Tensor::from_host(a.clone()), &Tensor::from_host(b.clone()))
            .unwrap();
        assert_eq!(*difference.as_host(), a.clone() - b);
        let other = Tensor::from_host(noise(4, 3, 1));
        assert!(Device::Cpu.difference(&Tensor::from_host(a), &other).is_err());
    }
}
