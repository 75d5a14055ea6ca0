//! Whether one matrix makes all rows of a head of the base's.
//!
//! Fitting ([`crate::fit_head`]) multiplies the head by one matrix, so a fitted head H is B·M to the
//! rounding of fp16, with B the base's and M unknown. That M need not be found: for a vector v, Hv is
//! Bx with x = Mv, and x follows from all rows by least squares, so a row that was not made so is
//! left over. Rows are weighted to be alike, which makes what is left over relative to the row;
//! conjugate gradients, begun at x = v, are there after some 20 passes over B.

use gptq_quant::split_mix;
use half::f16;
use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

/// Random vectors: a wrong row may by chance agree with one.
const VECTORS: usize = 2;
/// What is left over of a row, relative to it, from which on it is another's. Rounding leaves 9e-4 at
/// most in sound heads; a row that is a twentieth larger leaves 0.05.
pub(super) const LEFT_OVER: f64 = 0.02;
/// Rows for each column that it takes to tell: with as many as columns any head is B·M.
const ROWS_A_COLUMN: usize = 2;
/// Passes after which what is left over is taken for what it is. Sound heads of the embedded model and
/// 13 variants took 4 to 12 to come below the limit, all of them 20 to come to rest.
const MOST_PASSES: usize = 48;
/// Rows that a task sums: a fixed number, so that sums do not depend on the number of threads.
const BAND: usize = 64;
/// The smallest normal number of fp16: smaller ones round as coarsely as it does.
const SMALLEST_NORMAL: f64 = 6.103_515_625e-5;

/// What one matrix leaves over of every row of `found`, relative to the row, with `base` and `found`
/// `[rows, width]`; 0 for rows of zeros. `None` where there are too few rows to tell.
pub(super) fn left_over(found: &[f32], base: &[f16], width: usize) -> Option<Vec<f64>> {
    let rows = base.len() / width;
    if found.len() != base.len() || rows < ROWS_A_COLUMN * width {
        return None;
    }
    let mut of = Rows::new(found, base, width);
    let over = |of: &Rows| of.lacking.rows().into_iter().map(|row| rms(row.iter())).collect();
    of.reduce();
    let mut left: Vec<f64> = over(&of);
    // Rows that are other ones have drawn all others after them: once more, without these.
    let usual = median(&left);
    let outliers = left.iter().map(|&left| left > LEFT_OVER.max(10.0 * usual));
    of.left_out = outliers.collect();
    if of.left_out.contains(&true) {
        of.reduce();
        left = over(&of);
    }
    Some(left)
}

/// The equations, a row for each of the head's, scaled to be alike.
struct Rows<'a> {
    base: &'a [f16],
    width: usize,
    /// Factors of rows and columns.
    of_row: Vec<f64>,
    of_column: Vec<f64>,
    /// Hv − Bx, `[rows, VECTORS]`.
    lacking: Array2<f64>,
    /// Rows that x does not have to fit.
    left_out: Vec<bool>,
}

impl<'a> Rows<'a> {
    fn new(found: &[f32], base: &'a [f16], width: usize) -> Self {
        let rows = base.len() / width;
        let mut squares = vec![0.0; width];
        for row in found.chunks(width) {
            squares.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v).powi(2));
        }
        // Columns are alike in v, so that none hides the others.
        let size = |square: f64| if square > 0.0 { (rows as f64 / square).sqrt() } else { 1.0 };
        let mut coins = 0;
        let vectors = Array2::from_shape_fn((width, VECTORS), |(column, _)| {
            let size = size(squares[column]);
            if split_mix(&mut coins) >> 63 == 1 { size } else { -size }
        });
        let of_row: Vec<f64> = found
            .par_chunks(width)
            .map(|row| {
                let part = |(&v, &size): (&f32, &f64)| {
                    (f64::from(v).abs().max(SMALLEST_NORMAL) * size).powi(2)
                };
                let whole: f64 = row.iter().zip(vectors.column(0)).map(part).sum();
                let zeros = row.iter().all(|&v| v == 0.0);
                if zeros { 0.0 } else { whole.sqrt().recip() }
            })
            .collect();
        let mut of = Self {
            base,
            width,
            of_row,
            of_column: vec![1.0; width],
            lacking: Array2::zeros((rows, VECTORS)),
            left_out: vec![false; rows],
        };
        let squares = of.sum((1, width), |_, band| {
            let squares = band.mapv(|v| v * v);
            squares.sum_axis(Axis(0)).insert_axis(Axis(0))
        });
        of.of_column = squares.iter().map(|&square| size(square * rows as f64)).collect();
        // (H − B)v: what is lacking where M is the identity.
        let change = |row: usize| -> Vec<f64> {
            let at = row * width..(row + 1) * width;
            let change = found[at.clone()].iter().zip(&base[at]);
            let change: Vec<f64> =
                change.map(|(&a, b)| f64::from(a) - f64::from(b.to_f32())).collect();
            let product =
                |k| vectors.column(k).iter().zip(&change).map(|(v, c)| v * c).sum::<f64>();
            (0..VECTORS).map(|k| product(k) * of.of_row[row]).collect()
        };
        let lacking: Vec<Vec<f64>> = (0..rows).into_par_iter().map(change).collect();
        of.lacking = Array2::from_shape_fn((rows, VECTORS), |(row, k)| lacking[row][k]);
        of
    }

    /// Moves x until nothing is lacking, or no less can be.
    fn reduce(&mut self) {
        let start = without(&self.lacking, &self.left_out);
        let mut gradient =
            self.sum((self.width, VECTORS), |rows, band| band.t().dot(&start.slice(s![rows, ..])));
        let mut direction = gradient.clone();
        let mut steepness = squares(&gradient);
        for _ in 0..MOST_PASSES {
            let worst = self.lacking.rows().into_iter().zip(&self.left_out);
            let worst = worst.filter(|(_, out)| !**out).map(|(row, _)| rms(row.iter()));
            if worst.fold(0.0, f64::max) < LEFT_OVER / 4.0 {
                break;
            }
            let (along, curve) = self.along(&direction);
            let length: Vec<f64> = (0..VECTORS)
                .map(|k| {
                    let bend: f64 = direction.column(k).dot(&curve.column(k));
                    if bend > 0.0 { steepness[k] / bend } else { 0.0 }
                })
                .collect();
            for (k, length) in length.into_iter().enumerate() {
                self.lacking.column_mut(k).scaled_add(-length, &along.column(k));
                gradient.column_mut(k).scaled_add(-length, &curve.column(k));
            }
            let next = squares(&gradient);
            for k in 0..VECTORS {
                let turn = if steepness[k] > 0.0 { next[k] / steepness[k] } else { 0.0 };
                let mut column = direction.column_mut(k);
                column *= turn;
                column += &gradient.column(k);
            }
            steepness = next;
        }
    }

    /// A·d and Aᵀ·A·d of the kept rows, with A the scaled rows.
    fn along(&self, direction: &Array2<f64>) -> (Array2<f64>, Array2<f64>) {
        let bands = self.bands(|rows, band| {
            let along = band.dot(direction);
            let kept = without(&along, &self.left_out[rows]);
            (along, band.t().dot(&kept))
        });
        let mut all = Array2::zeros(self.lacking.raw_dim());
        let mut curve = Array2::zeros((self.width, VECTORS));
        for (i, (along, part)) in bands.into_iter().enumerate() {
            let rows = i * BAND..i * BAND + along.nrows();
            all.slice_mut(s![rows, ..]).assign(&along);
            curve += &part;
        }
        (all, curve)
    }

    /// The sum over bands of rows, in order.
    fn sum(
        &self,
        shape: (usize, usize),
        of: impl Fn(std::ops::Range<usize>, ArrayView2<'_, f64>) -> Array2<f64> + Sync,
    ) -> Array2<f64> {
        let mut sum = Array2::zeros(shape);
        self.bands(of).iter().for_each(|part| sum += part);
        sum
    }

    /// One value for each band of scaled rows, in order.
    fn bands<T: Send>(
        &self,
        of: impl Fn(std::ops::Range<usize>, ArrayView2<'_, f64>) -> T + Sync,
    ) -> Vec<T> {
        let rows = self.of_row.len();
        let band = |start: usize| {
            let rows = start..(start + BAND).min(rows);
            let band = Array2::from_shape_fn((rows.len(), self.width), |(row, column)| {
                let value = self.base[(start + row) * self.width + column].to_f32();
                f64::from(value) * self.of_row[start + row] * self.of_column[column]
            });
            of(rows, band.view())
        };
        let starts: Vec<usize> = (0..rows).step_by(BAND).collect();
        starts.into_par_iter().map(band).collect()
    }
}

fn squares(of: &Array2<f64>) -> Vec<f64> {
    of.columns().into_iter().map(|column| column.dot(&column)).collect()
}

fn rms<'a>(values: impl ExactSizeIterator<Item = &'a f64>) -> f64 {
    let count = values.len() as f64;
    (values.map(|v| v * v).sum::<f64>() / count).sqrt()
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// The same rows with zeros for those that are left out.
fn without(rows: &Array2<f64>, left_out: &[bool]) -> Array2<f64> {
    let mut kept = rows.clone();
    for (mut row, &out) in kept.rows_mut().into_iter().zip(left_out) {
        if out {
            row.fill(0.0);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: usize = 24;
    const ROWS: usize = 200;

    /// Numbers between -1 and 1.
    fn noise(seed: usize, count: usize) -> Vec<f32> {
        let mut state = seed as u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// A head with rows of very different sizes and one loud channel, and the same times one matrix.
    fn heads(share: f32) -> (Vec<f16>, Vec<f32>) {
        let mut base = noise(1, ROWS * WIDTH);
        for (row, values) in base.chunks_mut(WIDTH).enumerate() {
            values.iter_mut().for_each(|v| *v *= 0.01 * (1 + row % 50) as f32);
            values[5] *= 40.0;
        }
        let base: Vec<f16> = base.into_iter().map(f16::from_f32).collect();
        let map = noise(2, WIDTH * WIDTH);
        let made = |at: usize| {
            let (row, column) = (at / WIDTH, at % WIDTH);
            let row = &base[row * WIDTH..(row + 1) * WIDTH];
            let added: f32 =
                row.iter().enumerate().map(|(i, v)| v.to_f32() * map[i * WIDTH + column]).sum();
            f16::from_f32(row[column].to_f32() + share * added).to_f32()
        };
        let found = (0..ROWS * WIDTH).map(made).collect();
        (base, found)
    }

    fn wrong(found: &[f32], base: &[f16]) -> Vec<usize> {
        let left = left_over(found, base, WIDTH).unwrap();
        (0..ROWS).filter(|&row| left[row] > LEFT_OVER).collect()
    }

    #[test]
    fn what_one_matrix_makes_leaves_nothing_over() {
        for share in [0.0, 0.01, 0.1, 0.3] {
            let (base, found) = heads(share);
            let left = left_over(&found, &base, WIDTH).unwrap();
            let worst = left.into_iter().fold(0.0, f64::max);
            assert!(worst < LEFT_OVER / 4.0, "{share}: {worst}");
        }
    }

    #[test]
    fn rows_that_were_made_otherwise_are_told() {
        let (base, sound) = heads(0.1);
        let mut found = sound.clone();
        for (row, factor) in [(3, 1.1), (40, 0.9), (7, -1.0), (199, 0.5)] {
            found[row * WIDTH..(row + 1) * WIDTH].iter_mut().for_each(|v| *v *= factor);
        }
        found.copy_within(20 * WIDTH..21 * WIDTH, 30 * WIDTH);
        assert_eq!(wrong(&found, &base), [3, 7, 30, 40, 199]);
        // A row of zeros lacks itself, and is found by its gain.
        let all: Vec<f32> = sound.chunks(WIDTH).rev().flatten().copied().collect();
        assert!(wrong(&all, &base).len() > ROWS * 9 / 10);
    }

    #[test]
    fn few_rows_do_not_tell() {
        let (base, found) = heads(0.1);
        let few = 40 * WIDTH;
        assert_eq!(left_over(&found[..few], &base[..few], WIDTH), None);
    }
}
