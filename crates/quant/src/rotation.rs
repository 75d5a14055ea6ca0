//! Orthogonal matrices with a fast product, to be folded into weights.
//!
//! R = diag(signs) · (O ⊗ H): H a Walsh–Hadamard matrix of the largest power of two that divides n,
//! O a Hartley matrix of the odd rest, random signs from a fixed seed. All entries have about the
//! size 1/√n, so that no input feature dominates after it: what random orthogonal matrices do, in
//! n log n operations a row where they need n² (QuaRot, Ashkboos et al., arXiv 2404.00456). One that was
//! learned ([`Learner`](crate::Learner)) has no such form, and takes them.

use std::f64::consts::TAU;

use ndarray::{Array2, ArrayViewMut2, Axis};
use rayon::prelude::*;

/// An orthogonal matrix R of order n.
#[derive(Clone, Debug)]
pub struct Rotation(Form);

#[derive(Clone, Debug)]
enum Form {
    Fast(Fast),
    Matrix(Array2<f32>),
}

/// A product of matrices with few values each.
#[derive(Clone, Debug)]
struct Fast {
    signs: Vec<f32>,
    /// The Hartley matrix `[m, m]`, row-major; n = m · 2^k.
    odd: Vec<f32>,
    m: usize,
}

impl Rotation {
    /// Rows that a task turns: a matrix is brought near to the processor once for so many.
    pub const ROWS: usize = 64;

    /// The rotation of order `n` for this seed.
    pub fn new(n: usize, seed: u64) -> Self {
        let mut state = seed;
        let signs = (0..n).map(|_| if split_mix(&mut state) >> 63 == 0 { 1.0 } else { -1.0 });
        let m = n >> n.trailing_zeros();
        let hartley = |i: usize| {
            let angle = TAU * ((i / m) * (i % m) % m) as f64 / m as f64;
            ((angle.cos() + angle.sin()) / (m as f64).sqrt()) as f32
        };
        let odd = (0..m * m).map(hartley).collect();
        Self(Form::Fast(Fast { signs: signs.collect(), odd, m }))
    }

    /// An orthogonal matrix, square as it is.
    #[must_use]
    pub fn of_matrix(matrix: Array2<f32>) -> Self {
        Self(Form::Matrix(matrix))
    }

    /// Whether it is a matrix that takes n² operations a row.
    #[must_use]
    pub fn is_matrix(&self) -> bool {
        matches!(self.0, Form::Matrix(_))
    }

    /// Its values `[n, n]`.
    #[must_use]
    pub fn matrix(&self) -> Array2<f32> {
        match &self.0 {
            Form::Matrix(matrix) => matrix.clone(),
            Form::Fast(_) => {
                let mut matrix = Array2::eye(self.order());
                self.apply_rows(matrix.as_slice_mut().unwrap_or_default());
                matrix
            }
        }
    }

    /// Order of the matrix.
    pub fn order(&self) -> usize {
        match &self.0 {
            Form::Fast(fast) => fast.signs.len(),
            Form::Matrix(matrix) => matrix.nrows(),
        }
    }

    /// x ← x R for every run of n values: the inputs of a weight `[out, in]` after X ← X R, with
    /// one R for every n columns.
    pub fn apply_rows(&self, rows: &mut [f32]) {
        rows.par_chunks_mut(Self::ROWS * self.order()).for_each(|rows| self.apply(rows));
    }

    /// W ← (I ⊗ Rᵀ) W for a weight `[out, in]`: its outputs after Y ← Y R, with one R for every n
    /// rows.
    pub fn apply_outputs(&self, mut weight: ArrayViewMut2<'_, f32>) {
        /// Columns that a task brings together: whole cache lines of every row.
        const PANEL: usize = 64;
        let panels: Vec<_> = weight.axis_chunks_iter_mut(Axis(1), PANEL).collect();
        panels.into_par_iter().for_each_init(Vec::new, |columns: &mut Vec<f32>, panel| {
            columns.clear();
            columns.extend(panel.t().iter());
            self.apply(columns);
            for (value, turned) in panel.reversed_axes().iter_mut().zip(&*columns) {
                *value = *turned;
            }
        });
    }

    /// As [`Self::apply_rows`], on this thread alone.
    fn apply(&self, rows: &mut [f32]) {
        let order = self.order();
        match &self.0 {
            Form::Fast(fast) => rows.chunks_exact_mut(order).for_each(|row| fast.apply(row)),
            Form::Matrix(matrix) => {
                let shape = (rows.len() / order, order);
                if let Ok(mut rows) = ArrayViewMut2::from_shape(shape, rows) {
                    let turned = rows.dot(matrix);
                    rows.assign(&turned);
                }
            }
        }
    }
}

impl Fast {
    fn apply(&self, x: &mut [f32]) {
        for (v, sign) in x.iter_mut().zip(&self.signs) {
            *v *= sign;
        }
        let block = x.len() / self.m;
        let scale = 1.0 / (block as f32).sqrt();
        for part in x.chunks_exact_mut(block) {
            walsh_hadamard(part);
            for v in part {
                *v *= scale;
            }
        }
        if self.m > 1 {
            self.mix(x, block);
        }
    }

    /// x ← x (O ⊗ I): every m values that lie `block` apart.
    fn mix(&self, x: &mut [f32], block: usize) {
        let before = x.to_vec();
        for (to, part) in x.chunks_exact_mut(block).enumerate() {
            part.fill(0.0);
            for (from, values) in before.chunks_exact(block).enumerate() {
                let factor = self.odd[from * self.m + to];
                for (v, b) in part.iter_mut().zip(values) {
                    *v += factor * b;
                }
            }
        }
    }
}

/// The unscaled transform, in place; the length is a power of two.
fn walsh_hadamard(x: &mut [f32]) {
    const LANES: usize = 8;
    // Within a few values the steps are done in registers; between them, on as many at a time.
    let few = x.len().min(LANES);
    for values in x.chunks_exact_mut(few) {
        match values.first_chunk_mut::<LANES>() {
            Some(values) => walsh_hadamard_of(values),
            None => walsh_hadamard_of_few(values),
        }
    }
    let mut half = LANES;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            let (low, high) = (low.as_chunks_mut::<LANES>().0, high.as_chunks_mut::<LANES>().0);
            for (a, b) in low.iter_mut().zip(high) {
                for i in 0..LANES {
                    (a[i], b[i]) = (a[i] + b[i], a[i] - b[i]);
                }
            }
        }
        half *= 2;
    }
}

#[inline(always)]
fn walsh_hadamard_of<const N: usize>(x: &mut [f32; N]) {
    let mut half = 1;
    while half < N {
        for i in 0..N {
            if i & half == 0 {
                (x[i], x[i + half]) = (x[i] + x[i + half], x[i] - x[i + half]);
            }
        }
        half *= 2;
    }
}

/// Of one, two or four values.
fn walsh_hadamard_of_few(x: &mut [f32]) {
    if let Some(x) = x.first_chunk_mut::<4>() {
        walsh_hadamard_of(x);
    } else if let Some(x) = x.first_chunk_mut::<2>() {
        walsh_hadamard_of(x);
    }
}

/// The next number of SplitMix64 (Steele et al. 2014): a fixed stream, so that a seed means the same
/// signs for ever.
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    /// The largest absolute value, or NaN where one is, which `max` would drop.
    fn largest(values: &Array2<f32>) -> f32 {
        values.iter().map(|v| v.abs()).max_by(f32::total_cmp).unwrap()
    }

    fn matrix(rotation: &Rotation) -> Array2<f32> {
        let mut eye = Array2::<f32>::eye(rotation.order());
        rotation.apply_rows(eye.as_slice_mut().unwrap());
        eye
    }

    #[test]
    fn it_is_orthogonal_and_flat_at_every_order() {
        for n in [1, 2, 3, 24, 64, 96, 576] {
            let r = matrix(&Rotation::new(n, 7));
            let worst = largest(&(r.dot(&r.t()) - Array2::<f32>::eye(n)));
            assert!(worst < 1e-5, "n = {n}: {worst}");
            let largest = largest(&r);
            // A Hartley entry is at most √2 / √m.
            assert!(largest < 1.42 / (n as f32).sqrt() + 1e-6, "n = {n}: {largest}");
        }
        assert_ne!(matrix(&Rotation::new(64, 1)), matrix(&Rotation::new(64, 2)));
    }

    /// A matrix turns as the form that it is of.
    #[test]
    fn a_matrix_is_the_rotation_that_it_is_of() {
        let fast = Rotation::new(24, 5);
        let matrix = Rotation::of_matrix(fast.matrix());
        assert_eq!((matrix.order(), matrix.matrix()), (24, fast.matrix()));
        let rows = Array2::from_shape_fn((150, 24), |(i, j)| ((i * 7 + j * 3) % 11) as f32 - 5.0);
        let turned = |rotation: &Rotation| {
            let (mut rows, mut outputs) =
                (rows.clone(), rows.t().as_standard_layout().into_owned());
            rotation.apply_rows(rows.as_slice_mut().unwrap());
            rotation.apply_outputs(outputs.view_mut());
            [rows, outputs.reversed_axes()]
        };
        for (a, b) in turned(&fast).iter().zip(turned(&matrix)) {
            assert!(largest(&(a - &b)) < 1e-4);
        }
    }

    #[test]
    fn outputs_are_rotated_like_the_product() {
        let r = Rotation::new(6, 3);
        let mut w = Array2::from_shape_fn((12, 5), |(i, j)| ((i * 7 + j * 3) % 11) as f32 - 5.0);
        let x = Array2::from_shape_fn((4, 5), |(i, j)| ((i * 5 + j) % 7) as f32 - 3.0);
        let mut want = x.dot(&w.t());
        // Two runs of six outputs, each rotated.
        r.apply_rows(want.as_slice_mut().unwrap());
        r.apply_outputs(w.view_mut());
        let worst = largest(&(x.dot(&w.t()) - want));
        assert!(worst < 1e-4, "{worst}");
    }
}
