//! Gram accumulation over the upper triangle, and damped Hessians.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

use super::tiles::tiles_mut;
use crate::error::{Result, ensure_shape};
use crate::hessian_prep::HessianPrep;

/// Side of a tile: tiles below the diagonal are skipped, which saves nearly half of the work.
const TILE: usize = 256;

/// sum += xᵀx on tiles that touch the upper triangle; x is `[tokens, n]`.
pub(crate) fn accumulate(sum: &mut Array2<f32>, x: ArrayView2<'_, f32>) -> Result<()> {
    ensure_shape(sum.ncols() == x.ncols(), "gram_add", sum.dim(), x.dim())?;
    let upper = |tile: &super::tiles::Tile<'_, f32>| tile.row <= tile.col;
    let tiles: Vec<_> = tiles_mut(sum.view_mut(), TILE, TILE).into_iter().filter(upper).collect();
    tiles.into_par_iter().for_each(|mut tile| {
        let (m, n) = tile.view.dim();
        let left = x.slice(s![.., tile.row..tile.row + m]);
        let right = x.slice(s![.., tile.col..tile.col + n]);
        general_mat_mul(1.0, &left.t(), &right, 1.0, &mut tile.view);
    });
    Ok(())
}

/// The symmetric Hessian in the order asked for; see [`HessianPrep`].
pub(crate) fn hessian(sum: &Array2<f32>, prep: &HessianPrep<'_>) -> Array2<f32> {
    Array2::from_shape_fn(sum.dim(), |(i, j)| {
        let (a, b) = (prep.order[i] as usize, prep.order[j] as usize);
        let value = sum[[a.min(b), a.max(b)]] * prep.scale;
        if i != j {
            value
        } else if prep.dead[a] {
            1.0 + prep.damp
        } else {
            value + prep.damp
        }
    })
}

/// Σ over rows r of w of r G rᵀ, from the upper triangle of G.
pub(crate) fn quadratic_form(sum: &Array2<f32>, w: &Array2<f32>) -> f64 {
    // r G rᵀ = 2 Σ_{i<j} + Σ_i, so halving the diagonal of the upper triangle gives half of it.
    let half = Array2::from_shape_fn(sum.dim(), |(i, j)| match i.cmp(&j) {
        std::cmp::Ordering::Less => sum[[i, j]],
        std::cmp::Ordering::Equal => sum[[i, j]] / 2.0,
        std::cmp::Ordering::Greater => 0.0,
    });
    let bands: Vec<_> = w.axis_chunks_iter(ndarray::Axis(0), TILE).collect();
    let energies: Vec<f64> = bands
        .into_par_iter()
        .map(|band| {
            let product = band.dot(&half);
            product.iter().zip(band.iter()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        })
        .collect();
    2.0 * energies.iter().sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quadratic_form_is_the_energy_of_the_outputs() {
        let x = Array2::from_shape_fn((40, 30), |(i, j)| ((i * 31 + j * 17) % 13) as f32 - 6.0);
        let w = Array2::from_shape_fn((7, 30), |(i, j)| ((i * 5 + j * 3) % 11) as f32 - 5.0);
        let mut sum = Array2::zeros((30, 30));
        accumulate(&mut sum, x.view()).unwrap();
        let exact = x.dot(&w.t()).iter().map(|&y| f64::from(y) * f64::from(y)).sum::<f64>();
        assert!((quadratic_form(&sum, &w) / exact - 1.0).abs() < 1e-6);
    }

    #[test]
    fn chunks_add_up_and_the_hessian_is_permuted_and_damped() {
        let x = Array2::from_shape_fn((50, 300), |(i, j)| ((i * 31 + j * 17) % 13) as f32 - 6.0);
        let mut sum = Array2::zeros((300, 300));
        accumulate(&mut sum, x.slice(s![..20, ..])).unwrap();
        accumulate(&mut sum, x.slice(s![20.., ..])).unwrap();
        let exact = x.t().dot(&x);
        let order: Vec<u32> = (0..300).rev().collect();
        let mut dead = vec![false; 300];
        dead[3] = true;
        let h = hessian(&sum, &HessianPrep { scale: 0.5, order: &order, dead: &dead, damp: 0.25 });
        for i in 0..300 {
            for j in 0..300 {
                let mut want = exact[[299 - i, 299 - j]] * 0.5;
                if i == j {
                    want = if 299 - i == 3 { 1.25 } else { want + 0.25 };
                }
                assert!((h[[i, j]] - want).abs() < 1e-2, "{i},{j}: {} {want}", h[[i, j]]);
            }
        }
    }
}
