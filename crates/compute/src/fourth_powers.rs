//! What a rotation makes of weights: the mean fourth power of the turned values, and its gradient.
//!
//! Of the values of a vector whose norm is fixed, the mean fourth power is 3 where they look like normal ones, more where a few
//! are large, and less where they are flat. A rotation R `[n, n]` that makes weights flat is learned by it; its
//! gradient by R, in the coordinates that R leads to, is Σ yᵀ y³ over the turned vectors y = w R, each brought to the
//! norm √n: two products of all weights with matrices of order n.
//!
//! A GPU takes R, y and y³ in fp16 with f32 sums. That moves y by some 2⁻¹² of its size, value by value, which changes the
//! mean by less than 10⁻⁵ of itself and the gradient's skew part by less than 10⁻³: looks of a descent differ by
//! 10⁻², so that R in two halves or TF32, at half as much or twice the cost, would buy nothing. What is folded into
//! weights is never this R, but the f64 one that it is rounded from.

use ndarray::Array2;

use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::ranks::Ranks;
use crate::tensor::{Storage, Tensor};

/// The vectors of a weight `[out, in]` that a rotation of the residual stream turns.
#[derive(Clone, Copy, Debug)]
pub enum Turned<'a> {
    /// Rows, of a weight that reads the stream, times the gain of the norm before it.
    Rows(Option<&'a [f32]>),
    /// Columns, of a weight that writes to it.
    Columns,
}

/// Sums over the vectors of many weights, all turned by one rotation.
#[derive(Debug)]
pub struct FourthPowers {
    /// On a GPU `[n, n]` in f32, as in host memory.
    rotation: Storage,
    /// Σ yᵀ y³ `[n, n]`, of a GPU times [`cuda::fourth_powers::scale`].
    gradient: Storage,
    /// Σ of the vectors' mean fourth powers.
    sum: f64,
    vectors: u64,
}

impl Device {
    /// Sums of no vectors yet, under `rotation` `[n, n]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for a matrix that is not square, and those of the device.
    pub fn fourth_powers(&self, rotation: &Array2<f32>) -> Result<FourthPowers> {
        let (rows, order) = rotation.dim();
        ensure_shape(rows == order, "fourth_powers", (rows, order), (order, order))?;
        let (rotation, gradient) = match self {
            Self::Cpu => {
                let rotation = rotation.as_standard_layout().into_owned();
                (Storage::Cpu(rotation), Storage::Cpu(Array2::zeros((order, order))))
            }
            Self::Cuda(cuda) => {
                let rotation = cuda::Matrix::upload_f32(cuda, rotation)?;
                (Storage::Cuda(rotation), Storage::Cuda(cuda::gram::zeros(cuda, order)?))
            }
        };
        Ok(FourthPowers { rotation, gradient, sum: 0.0, vectors: 0 })
    }
}

impl FourthPowers {
    /// Values that a GPU takes at a time: it holds them in f32 and twice in fp16.
    pub const GPU_VALUES: usize = cuda::fourth_powers::VALUES;

    /// Adds the vectors of a weight; one of zeros has no say.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for vectors of another length than the rotation's, [`Error::DeviceMismatch`].
    pub fn add(&mut self, weight: &Tensor, turned: Turned<'_>) -> Result<()> {
        const OP: &str = "fourth_powers";
        let order = self.order();
        let (vectors, length) = match turned {
            Turned::Rows(_) => weight.shape(),
            Turned::Columns => (weight.cols(), weight.rows()),
        };
        ensure_shape(length == order, OP, weight.shape(), (order, order))?;
        if let Turned::Rows(Some(gain)) = turned {
            ensure_shape(gain.len() == order, OP, (1, gain.len()), (1, order))?;
        }
        let sum = match (&self.rotation, &mut self.gradient, &weight.0) {
            (Storage::Cpu(rotation), Storage::Cpu(gradient), Storage::Cpu(weight)) => {
                cpu::fourth_powers::add(rotation, gradient, weight.view(), turned)
            }
            (Storage::Cuda(rotation), Storage::Cuda(gradient), Storage::Cuda(weight)) => {
                cuda::fourth_powers::add(rotation, gradient, weight, turned)?
            }
            _ => return Err(Error::DeviceMismatch { op: OP }),
        };
        self.sum += sum;
        self.vectors += vectors as u64;
        Ok(())
    }

    /// Adds up what all `ranks` have; each gets the sums, in the order of ranks.
    pub fn sum_over(&mut self, ranks: &Ranks) -> Result<()> {
        ranks.sum_storage(&mut self.gradient)?;
        let words = |bits: u64| [bits as u32, (bits >> 32) as u32];
        let own = [words(self.sum.to_bits()), words(self.vectors)].concat();
        (self.sum, self.vectors) = (0.0, 0);
        for of_rank in ranks.exchange(own)? {
            let bits = |at: usize| {
                let word = |at: usize| u64::from(of_rank.get(at).copied().unwrap_or(0));
                word(at) | word(at + 1) << 32
            };
            self.sum += f64::from_bits(bits(0));
            self.vectors += bits(2);
        }
        Ok(())
    }

    /// Length of the vectors.
    pub fn order(&self) -> usize {
        match &self.rotation {
            Storage::Cpu(rotation) => rotation.nrows(),
            Storage::Cuda(rotation) => rotation.rows(),
        }
    }

    /// The mean fourth power of all vectors' values; no number where weights are none.
    pub fn mean(&self) -> f64 {
        self.sum / self.vectors.max(1) as f64
    }

    /// Σ yᵀ y³ over the number of vectors, in host memory.
    pub fn gradient(&self) -> Result<Array2<f64>> {
        let (sum, scale) = match &self.gradient {
            Storage::Cpu(sum) => (sum.clone(), 1.0),
            Storage::Cuda(sum) => (sum.to_host()?, cuda::fourth_powers::scale(self.order())),
        };
        let by = 1.0 / (f64::from(scale) * self.vectors.max(1) as f64);
        Ok(sum.mapv(|value| f64::from(value) * by))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::largest;

    fn noise(rows: usize, cols: usize, salt: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            (((i * cols + j + salt) * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0
        })
    }

    /// By its definition, in f64.
    fn defined(rotation: &Array2<f32>, vectors: &Array2<f32>) -> (f64, Array2<f64>) {
        let order = rotation.nrows() as f64;
        let mut turned = vectors.mapv(f64::from).dot(&rotation.mapv(f64::from));
        for mut row in turned.outer_iter_mut() {
            let norm = row.dot(&row).sqrt();
            row.mapv_inplace(|v| if norm == 0.0 { 0.0 } else { v * order.sqrt() / norm });
        }
        let count = vectors.nrows() as f64;
        let mean = turned.mapv(|v| v.powi(4)).sum() / order / count;
        (mean, turned.t().dot(&turned.mapv(|v| v.powi(3))) / count)
    }

    #[test]
    fn rows_with_gains_and_columns_are_as_defined() {
        for (order, rows) in [(24, 40), (7, 3), (96, 5000)] {
            let device = Device::Cpu;
            let rotation = noise(order, order, 3);
            let gain: Vec<f32> = (0..order).map(|i| 0.5 + i as f32 / 10.0).collect();
            let mut reading = noise(rows, order, 5);
            reading.row_mut(1).fill(0.0);
            let writing = noise(order, rows + 2, 9);
            let mut sums = device.fourth_powers(&rotation).unwrap();
            let tensor = |values: &Array2<f32>| Tensor::from_host(values.clone());
            sums.add(&tensor(&reading), Turned::Rows(Some(&gain))).unwrap();
            sums.add(&tensor(&reading), Turned::Rows(None)).unwrap();
            sums.add(&tensor(&writing), Turned::Columns).unwrap();
            let gained = &reading * &ndarray::arr1(&gain);
            let all = [gained.view(), reading.view(), writing.t()];
            let all = ndarray::concatenate(ndarray::Axis(0), &all).unwrap();
            let (mean, gradient) = defined(&rotation, &all);
            assert!((sums.mean() - mean).abs() < 1e-5 * mean, "{} {mean}", sums.mean());
            let off = (sums.gradient().unwrap() - &gradient).mapv(f64::abs);
            assert!(off.iter().all(|v| *v < 1e-4), "{order}: {}", largest(&off));
        }
    }

    /// Others of the same length, and of another one.
    #[test]
    fn vectors_of_another_length_are_refused() {
        let mut sums = Device::Cpu.fourth_powers(&noise(8, 8, 0)).unwrap();
        let weight = Tensor::from_host(noise(6, 8, 1));
        sums.add(&weight, Turned::Rows(None)).unwrap();
        for turned in [Turned::Columns, Turned::Rows(Some(&[1.0; 6]))] {
            assert!(matches!(sums.add(&weight, turned), Err(Error::ShapeMismatch { .. })));
        }
        assert!(Device::Cpu.fourth_powers(&noise(8, 9, 0)).is_err());
    }

    /// Ranks that look at a part each see what one sees that looks at all.
    #[test]
    fn ranks_add_up() {
        let rotation = noise(16, 16, 3);
        let weights = [noise(20, 16, 1), noise(33, 16, 2)];
        let add = |sums: &mut FourthPowers, weight: &Array2<f32>| {
            sums.add(&Tensor::from_host(weight.clone()), Turned::Rows(None)).unwrap();
        };
        let mut alone = Device::Cpu.fourth_powers(&rotation).unwrap();
        weights.iter().for_each(|weight| add(&mut alone, weight));
        let means = std::thread::scope(|scope| {
            let handles: Vec<_> = crate::RankHandle::threads(2)
                .into_iter()
                .map(|handle| {
                    let (rotation, weights) = (&rotation, &weights);
                    scope.spawn(move || {
                        handle.run::<_, Error>(&Device::Cpu, |ranks| {
                            let mut sums = Device::Cpu.fourth_powers(rotation)?;
                            add(&mut sums, &weights[ranks.rank()]);
                            sums.sum_over(ranks)?;
                            Ok((sums.mean(), sums.gradient()?))
                        })
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(means[0], means[1]);
        assert!((means[0].0 - alone.mean()).abs() < 1e-9);
        let off = (&means[0].1 - &alone.gradient().unwrap()).mapv(f64::abs);
        assert!(off.iter().all(|v| *v < 1e-5));
    }
}
