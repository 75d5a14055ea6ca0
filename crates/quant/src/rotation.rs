//! Orthogonal matrices with a fast product, to be folded into weights.
//!
//! R = diag(signs) · (O ⊗ H): H a Walsh–Hadamard matrix of the largest power of two that divides n,
//! O a Hartley matrix of the odd rest, random signs from a fixed seed. All entries have about the
//! size 1/√n, so that no input feature dominates after it: what random orthogonal matrices do, in
//! n log n operations a row where they need n² (QuaRot, Ashkboos et al., arXiv 2404.00456).

use std::f64::consts::TAU;

use ndarray::{ArrayViewMut2, Axis};
use rayon::prelude::*;

/// An orthogonal matrix R of order n.
#[derive(Clone, Debug)]
pub struct Rotation {
    signs: Vec<f32>,
    /// The Hartley matrix `[m, m]`, row-major; n = m · 2^k.
    odd: Vec<f32>,
    m: usize,
}

impl Rotation {
    /// The rotation of order `n` for this seed.
    pub fn new(n: usize, seed: u64) -> Self {
        let mut state = seed;
        let signs = (0..n).map(|_| if split_mix(&mut state) >> 63 == 0 { 1.0 } else { -1.0 });
        let m = n >> n.trailing_zeros();
        let hartley = |i: usize| {
            let angle = TAU * ((i / m) * (i % m) % m) as f64 / m as f64;
            ((angle.cos() + angle.sin()) / (m as f64).sqrt()) as f32
        };
        Self { signs: signs.collect(), odd: (0..m * m).map(hartley).collect(), m }
    }

    /// Order of the matrix.
    pub fn order(&self) -> usize {
        self.signs.len()
    }

    /// x ← x R for every run of n values: the inputs of a weight `[out, in]` after X ← X R, with
    /// one R for every n columns.
    pub fn apply_rows(&self, rows: &mut [f32]) {
        rows.par_chunks_mut(self.order()).for_each(|row| self.apply(row));
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
            for column in columns.chunks_exact_mut(self.order()) {
                self.apply(column);
            }
            for (value, turned) in panel.reversed_axes().iter_mut().zip(&*columns) {
                *value = *turned;
            }
        });
    }

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
