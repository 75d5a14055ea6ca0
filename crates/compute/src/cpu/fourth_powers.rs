//! Mean fourth powers of turned vectors and their gradient, in f32.

use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

use super::matmul::matmul_nt;
use crate::fourth_powers::Turned;

/// Vectors of one product. Sums follow their number, which is fixed.
const VECTORS: usize = 2048;

/// Adds Σ yᵀ y³ to `gradient`; gives the sum of the vectors' mean fourth powers.
pub(crate) fn add(
    rotation: &Array2<f32>,
    gradient: &mut Array2<f32>,
    weight: ArrayView2<'_, f32>,
    turned: Turned<'_>,
) -> f64 {
    let (vectors, gain) = match turned {
        Turned::Rows(gain) => (weight, gain),
        Turned::Columns => (weight.reversed_axes(), None),
    };
    let (mut sum, order) = (0.0, rotation.nrows());
    for first in (0..vectors.nrows()).step_by(VECTORS) {
        let rows = VECTORS.min(vectors.nrows() - first);
        let mut values =
            vectors.slice(s![first..first + rows, ..]).as_standard_layout().into_owned();
        if let Some(gain) = gain {
            values.outer_iter_mut().for_each(|mut row| {
                row.iter_mut().zip(gain).for_each(|(v, gain)| *v *= gain);
            });
        }
        let mut turned = Array2::zeros(values.dim());
        matmul_nt(values.view(), rotation.t(), 0.0, turned.view_mut());
        let mut cubes = values;
        let pairs =
            [&mut turned, &mut cubes].map(|values| values.as_slice_mut().unwrap_or_default());
        let [vectors_of, cubes_of] = pairs.map(|values| values.par_chunks_mut(order.max(1)));
        let means: Vec<f64> = vectors_of.zip(cubes_of).map(|(v, cubes)| cube(v, cubes)).collect();
        sum += means.iter().sum::<f64>();
        matmul_nt(turned.t(), cubes.t(), 1.0, gradient.view_mut());
    }
    sum
}

/// Brings a vector to the norm √n and writes its cubes; gives its mean fourth power.
fn cube(vector: &mut [f32], cubes: &mut [f32]) -> f64 {
    let square: f32 = vector.iter().map(|v| v * v).sum();
    let by = if square == 0.0 { 0.0 } else { (vector.len() as f32 / square).sqrt() };
    let mut fourth = 0.0;
    for (v, cube) in vector.iter_mut().zip(cubes) {
        *v *= by;
        *cube = *v * *v * *v;
        fourth += f64::from(*v * *cube);
    }
    fourth / vector.len() as f64
}
