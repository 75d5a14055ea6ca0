//! Columns of o and down brought to one norm, which costs the file nothing.
//!
//! Codes of a group share a scale, so the error that they leave in a column does not depend on how
//! large the column's weights are, and the scale follows from the largest: a column of small weights
//! is given steps as wide as its neighbors need. What o and down read is linear in the rows of v and
//! up, so W diag(d) on diag(1/d) V is the same function, and rows of v and up have scales of their own,
//! which take 1/d over. With d = 1 / ‖column‖ all columns of a group want the same scale. That v is
//! shared by the heads of a group under grouped-query attention leaves one d for the columns that read
//! a channel of it.
//!
//! AWQ (Lin et al., arXiv 2306.00978) folds factors in the same places, but takes them from the inputs'
//! sizes. After a solve that passes errors on, those of the weights themselves are the better ones
//! (tests/bench/2026-11-29-forward-only.md); they need no text, so whoever has the base can work them
//! out from it.

use gptq_checkpoint::ModelConfig;
use gptq_compute::Device;
use gptq_model::{Block, BlockParts, Linear, LinearId};
use ndarray::{Array2, Axis};
use rayon::prelude::*;

use crate::error::Result;

/// The most that a column is multiplied or divided by: one next to zero is not to make rows of v or up
/// that fp16 cannot hold.
const MOST: f64 = 8.0;
/// Rows whose columns' sums are made by one task: sums of any number of tasks are the same.
const TASK_ROWS: usize = 256;

/// Which columns of o read which rows of v.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnFactors {
    head_dim: usize,
    /// Query heads that read one head of v.
    sharing: usize,
    /// Where values begin among the outputs of a linear that makes queries and keys as well.
    fused_values: usize,
}

/// Factors that the columns of o or down are multiplied by, one a row of what they read.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    of: LinearId,
    values: Vec<f32>,
}

impl ColumnFactors {
    /// Of a model of this shape.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let (queries, values) = (config.num_attention_heads, config.num_key_value_heads);
        Self {
            head_dim: config.head_dim,
            sharing: queries / values,
            fused_values: (queries + values) * config.head_dim,
        }
    }

    /// The o or down that `id` is, or whose inputs it makes, and the linear that makes them; `None` where
    /// columns keep their norms. So they do where what makes them has a bias, which would have to be
    /// divided as well, and is written before the block that says by what is read.
    pub(crate) fn pair_of<W>(
        id: LinearId,
        block: &BlockParts<W>,
    ) -> Option<(&Linear<W>, &Linear<W>)> {
        let of = |id| block.linears.iter().find(|linear| linear.id == id);
        let (reader, writer) = match id {
            LinearId::O | LinearId::V | LinearId::Qkv => {
                (LinearId::O, of(LinearId::V).or_else(|| of(LinearId::Qkv)))
            }
            LinearId::Down | LinearId::Up | LinearId::GateUp => {
                (LinearId::Down, of(LinearId::Up).or_else(|| of(LinearId::GateUp)))
            }
            LinearId::ExpertDown(e) | LinearId::ExpertUp(e) => {
                (LinearId::ExpertDown(e), of(LinearId::ExpertUp(e)))
            }
            LinearId::SharedDown | LinearId::SharedUp => {
                (LinearId::SharedDown, of(LinearId::SharedUp))
            }
            LinearId::Q | LinearId::K | LinearId::Gate => return None,
            LinearId::ExpertGate(_) | LinearId::SharedGate => return None,
        };
        of(reader).zip(writer.filter(|writer| writer.bias.is_none()))
    }

    /// Brings the columns of a block's o and downs to one norm, on the CPU, and divides what they read.
    pub(crate) fn fold(&self, block: &mut Block) -> Result<()> {
        for id in block.ids() {
            let pair = Self::pair_of(id, block.parts()).map(|(one, other)| (one.id, other.id));
            let Some((reader, writer)) = pair.filter(|&(reader, _)| reader == id) else { continue };
            let mut weight = block.linear(reader).weight.to_host()?;
            let factors = self.factors(reader, &weight);
            self.multiply(&factors, &mut weight);
            block.set_weight(reader, Device::Cpu.upload_f32(weight)?);
            let mut rows = block.linear(writer).weight.to_host()?;
            self.divide(&factors, writer, &mut rows);
            block.set_weight(writer, Device::Cpu.upload_f32(rows)?);
        }
        Ok(())
    }

    /// The factors of `reader` with these weights, their geometric mean 1 but for limits and columns of
    /// zeros, which stay.
    pub(crate) fn factors(&self, reader: LinearId, weight: &Array2<f32>) -> Factors {
        let columns = energies(weight);
        let channels =
            if reader == LinearId::O { columns.len() / self.sharing } else { columns.len() };
        let mut energy = vec![0.0; channels];
        for (column, sum) in columns.into_iter().enumerate() {
            energy[self.channel(reader, column)] += sum;
        }
        // Twice the logarithm of a norm.
        let logs = energy.into_iter().map(|sum| Some(sum.ln()).filter(|log| log.is_finite()));
        let logs: Vec<Option<f64>> = logs.collect();
        let known = logs.iter().flatten();
        let mean = known.clone().sum::<f64>() / known.count().max(1) as f64;
        let factor = |log: &Option<f64>| {
            log.map_or(1.0, |log| ((mean - log) / 2.0).exp().clamp(1.0 / MOST, MOST)) as f32
        };
        Factors { of: reader, values: logs.iter().map(factor).collect() }
    }

    /// W ← W diag(d), for the linear that the factors are of.
    pub(crate) fn multiply(&self, factors: &Factors, weight: &mut Array2<f32>) {
        let columns = 0..weight.ncols();
        let factor = |column| factors.values[self.channel(factors.of, column)];
        let each: Vec<f32> = columns.map(factor).collect();
        rows_of(weight).for_each(|row| row.iter_mut().zip(&each).for_each(|(v, d)| *v *= d));
    }

    /// V ← diag(1/d) V, for the linear that those read the products of.
    pub(crate) fn divide(&self, factors: &Factors, writer: LinearId, weight: &mut Array2<f32>) {
        let first = match writer {
            LinearId::Qkv => self.fused_values,
            LinearId::GateUp => weight.nrows() / 2,
            _ => 0,
        };
        let rows = rows_of(weight).skip(first);
        rows.zip(&factors.values).for_each(|(row, d)| row.iter_mut().for_each(|v| *v /= d));
    }

    /// Which of the written rows' products a column reads.
    fn channel(&self, reader: LinearId, column: usize) -> usize {
        let (head, feature) = (column / self.head_dim, column % self.head_dim);
        if reader == LinearId::O { head / self.sharing * self.head_dim + feature } else { column }
    }
}

/// The rows, side by side.
fn rows_of(weight: &mut Array2<f32>) -> impl IndexedParallelIterator<Item = &mut [f32]> {
    // Tensors in host memory are in standard layout; a copy makes it true of any.
    if !weight.is_standard_layout() {
        *weight = weight.as_standard_layout().into_owned();
    }
    let width = weight.ncols().max(1);
    weight.as_slice_mut().unwrap_or_default().par_chunks_mut(width)
}

/// Σ w² of each column.
fn energies(weight: &Array2<f32>) -> Vec<f64> {
    let tasks: Vec<_> = weight.axis_chunks_iter(Axis(0), TASK_ROWS).collect();
    let parts: Vec<Vec<f64>> = tasks
        .into_par_iter()
        .map(|rows| {
            let mut sums = vec![0.0; rows.ncols()];
            for row in rows.outer_iter() {
                sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
            }
            sums
        })
        .collect();
    parts.into_iter().fold(vec![0.0; weight.ncols()], |mut all, part| {
        all.iter_mut().zip(part).for_each(|(sum, of)| *sum += of);
        all
    })
}

#[cfg(test)]
mod tests {
    use ndarray::Array1;

    use super::*;

    /// Four query heads of two features share two heads of v.
    const SHAPE: ColumnFactors = ColumnFactors { head_dim: 2, sharing: 2, fused_values: 12 };

    fn noise(rows: usize, cols: usize) -> Array2<f32> {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0;
        Array2::from_shape_fn((rows, cols), |(i, j)| value(i * cols + j + 7).powi(3))
    }

    fn norms(weight: &Array2<f32>) -> Array1<f64> {
        weight.mapv(|v| f64::from(v).powi(2)).sum_axis(Axis(0)).mapv(f64::sqrt)
    }

    #[test]
    fn columns_have_one_norm_and_factors_the_mean_one() {
        // More rows than a task takes.
        let mut weight = noise(300, 8);
        let sizes = Array1::from_shape_fn(8, |column| 1.0 + column as f32);
        weight *= &sizes;
        let before = norms(&weight);
        let spread = |norms: &Array1<f64>| norms.iter().copied().fold(0.0, f64::max) / norms.sum();
        let factors = SHAPE.factors(LinearId::Down, &weight);
        SHAPE.multiply(&factors, &mut weight);
        let after = norms(&weight);
        assert!(spread(&before) > 0.2 && (spread(&after) - 0.125).abs() < 1e-6, "{after}");
        let product: f32 = factors.values.iter().product();
        assert!((product - 1.0).abs() < 1e-5, "{factors:?}");
    }

    #[test]
    fn columns_that_read_one_channel_have_one_factor() {
        let mut weight = noise(5, 8);
        let factors = SHAPE.factors(LinearId::O, &weight);
        assert_eq!(factors.values.len(), 4);
        SHAPE.multiply(&factors, &mut weight);
        let after = norms(&weight).mapv(|norm| norm * norm);
        let shared = [[0, 2], [1, 3], [4, 6], [5, 7]].map(|[one, other]| after[one] + after[other]);
        assert!(shared.iter().all(|sum| (sum / shared[0] - 1.0).abs() < 1e-5), "{shared:?}");
    }

    /// Through rows of v, and those of a linear that makes queries and keys as well.
    #[test]
    fn what_is_read_is_divided() {
        let (o, input) = (noise(5, 8), noise(3, 1));
        let shared = |values: Array2<f32>| {
            Array2::from_shape_fn((8, 1), |(i, _)| values[[i / 4 * 2 + i % 2, 0]])
        };
        for (writer, first) in [(LinearId::V, 0), (LinearId::Qkv, 12)] {
            let (mut reader, mut values) = (o.clone(), noise(first + 4, 3));
            let output = |reader: &Array2<f32>, values: &Array2<f32>| {
                let made = values.dot(&input);
                reader.dot(&shared(made.slice(ndarray::s![first.., ..]).to_owned()))
            };
            let (want, untouched) = (output(&reader, &values), values.clone());
            let factors = SHAPE.factors(LinearId::O, &reader);
            SHAPE.multiply(&factors, &mut reader);
            SHAPE.divide(&factors, writer, &mut values);
            let got = output(&reader, &values);
            assert!((&got - &want).iter().all(|e| e.abs() < 1e-5), "{writer:?}: {got} {want}");
            assert!(reader != o && values != untouched);
            let kept = ndarray::s![..first, ..];
            assert_eq!(values.slice(kept), untouched.slice(kept));
        }
    }

    #[test]
    fn columns_of_next_to_nothing_have_limits() {
        let mut weight = noise(4, 6);
        weight.column_mut(1).fill(0.0);
        weight.column_mut(4).mapv_inplace(|v| v * 1e-20);
        let factors = SHAPE.factors(LinearId::Down, &weight).values;
        assert_eq!((factors[1], factors[4]), (1.0, MOST as f32));
        let zeros = Array2::zeros((4, 6));
        assert_eq!(SHAPE.factors(LinearId::Down, &zeros).values, [1.0; 6]);
        let mut up = noise(12, 2);
        let (gate, before) = (up.slice(ndarray::s![..6, ..]).to_owned(), up.clone());
        let factors = SHAPE.factors(LinearId::Down, &weight);
        SHAPE.divide(&factors, LinearId::GateUp, &mut up);
        assert_eq!(up.slice(ndarray::s![..6, ..]), gate);
        assert!(up != before);
    }
}
