//! From a Gram to the factor that the solver walks along: dead columns, order, damping.

use gptq_compute::{Gram, HessianPrep, Precision, Tensor};

use crate::error::{Error, Result};
use crate::spec::QuantSpec;

/// The least that damping is raised to: below it, rounding of the Gram outweighs what is added.
const LEAST_RAISE: f64 = 1e-4;
/// Damping above which more cannot help: with its mean diagonal added to it, a Gram that is only
/// rounded is positive definite; what is not is no Gram.
const MOST_RAISED: f64 = 1.0;

/// The factored Hessian of a linear's inputs, shared by all linears that read the same inputs
/// (q, k, v; gate, up): one order of columns for all of them, as fused loaders need.
#[derive(Clone, Debug)]
pub struct Factored {
    /// Column j of the solve is column `order[j]` of the weights.
    pub order: Vec<u32>,
    /// Columns (of the weights) that no token used.
    pub dead: Vec<bool>,
    /// U, upper triangular with UᵀU = H⁻¹, in solve order `[in, in]`.
    pub upper: Tensor,
    /// diag(H) in solve order, undamped; 1 where a column is dead.
    pub importance: Vec<f32>,
    /// Fraction of mean(diag H) that was added in the end.
    pub damp: f64,
    /// What that added to the diagonal.
    pub added: f32,
    /// How often damping had to be raised; 0 is the normal case.
    pub damp_retries: u32,
    /// How U was computed at that damping.
    pub precision: Precision,
}

/// Prepares and factors H = `scale` · Gram (scale is 2 / windows).
///
/// # Errors
/// [`Error::NotFinite`] when the diagonal holds NaN or infinities, [`Error::NotPositiveDefinite`]
/// when raising the damping did not help.
pub fn factor(gram: &Gram, scale: f32, spec: &QuantSpec) -> Result<Factored> {
    factored(gram, scale, spec, None)
}

/// As [`factor`], in the order of another Hessian: of linears that fused loaders read as one.
///
/// # Errors
/// As [`factor`].
pub fn factor_in_order(
    gram: &Gram,
    scale: f32,
    spec: &QuantSpec,
    order: &[u32],
) -> Result<Factored> {
    factored(gram, scale, spec, Some(order))
}

fn factored(gram: &Gram, scale: f32, spec: &QuantSpec, order: Option<&[u32]>) -> Result<Factored> {
    let mut diagonal: Vec<f32> = gram.diagonal()?.iter().map(|d| d * scale).collect();
    if diagonal.iter().any(|d| !d.is_finite()) {
        return Err(Error::NotFinite { what: "The Hessian" });
    }
    let dead: Vec<bool> = diagonal.iter().map(|&d| d == 0.0).collect();
    for (d, _) in diagonal.iter_mut().zip(&dead).filter(|(_, dead)| **dead) {
        *d = 1.0;
    }
    let order = order.map_or_else(|| solve_order(&diagonal, spec.act_order), <[u32]>::to_vec);
    let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / diagonal.len() as f64;
    let (mut damp, mut damp_retries) = (spec.damp, 0);
    loop {
        let added = (damp * mean) as f32;
        let prep = HessianPrep { scale, order: &order, dead: &dead, damp: added };
        match gram.upper_factor(&prep) {
            Ok((upper, precision)) => {
                let importance = order.iter().map(|&c| diagonal[c as usize]).collect();
                return Ok(Factored {
                    order,
                    dead,
                    upper,
                    importance,
                    damp,
                    added,
                    damp_retries,
                    precision,
                });
            }
            Err(source @ gptq_compute::Error::NotPositiveDefinite { .. }) => {
                damp = raised(damp).ok_or(Error::NotPositiveDefinite { damp, source })?;
                damp_retries += 1;
            }
            Err(other) => return Err(other.into()),
        }
    }
}

/// Damping to try after `damp` was too little: ten times as much. `None` where that cannot help.
fn raised(damp: f64) -> Option<f64> {
    (damp < MOST_RAISED).then(|| (10.0 * damp).max(LEAST_RAISE))
}

/// Columns by descending diagonal, ties in column order, so that every loader, run and device sees
/// the same `g_idx`; or the natural order.
fn solve_order(diagonal: &[f32], act_order: bool) -> Vec<u32> {
    let mut order: Vec<u32> = (0..diagonal.len() as u32).collect();
    if act_order {
        order.sort_by(|&a, &b| diagonal[b as usize].total_cmp(&diagonal[a as usize]));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Recipe;
    use ndarray::{Array2, array};

    fn spec(act_order: bool) -> QuantSpec {
        QuantSpec::new(4, None, act_order, 0.01, Recipe::AutoGptq)
    }

    #[test]
    fn ties_keep_column_order_and_dead_columns_count_as_one() {
        let gram = Gram::from_host(Array2::from_diag(&array![2.0, 0.0, 3.0, 2.0, 0.5]));
        let f = factor(&gram, 1.0, &spec(true)).unwrap();
        assert_eq!(f.order, [2, 0, 3, 1, 4]);
        assert_eq!(f.dead, [false, true, false, false, false]);
        let damp = 0.01 * (2.0 + 1.0 + 3.0 + 2.0 + 0.5) / 5.0;
        let u = f.upper.as_host();
        assert!((u[[3, 3]] - 1.0 / (1.0 + damp as f32).sqrt()).abs() < 1e-6);
        assert_eq!((f.damp_retries, f.precision), (0, Precision::Usual));
    }

    #[test]
    fn another_hessians_order_is_kept_to() {
        let gram = Gram::from_host(Array2::from_diag(&array![2.0, 0.0, 3.0]));
        let f = factor_in_order(&gram, 1.0, &spec(true), &[1, 0, 2]).unwrap();
        assert_eq!((f.order, f.dead), (vec![1, 0, 2], vec![false, true, false]));
        assert_eq!(f.importance, [1.0, 2.0, 3.0]);
        let u = f.upper.as_host();
        for (j, h) in [1.0_f32, 2.0, 3.0].into_iter().enumerate() {
            assert!((u[[j, j]] - 1.0 / (h + 0.02).sqrt()).abs() < 1e-6, "{j}");
        }
    }

    #[test]
    fn an_indefinite_hessian_gets_more_damp_and_says_so() {
        // Eigenvalues 1 ± 1.05: 1 % of damping is not enough, 10 % is.
        let gram = Gram::from_host(array![[1.0, 1.05], [1.05, 1.0]]);
        let f = factor(&gram, 1.0, &spec(false)).unwrap();
        assert_eq!(f.damp_retries, 1);
        assert!((f.damp - 0.1).abs() < 1e-12);
        let hopeless = Gram::from_host(array![[1.0, 9.0], [9.0, 1.0]]);
        assert!(matches!(
            factor(&hopeless, 1.0, &spec(false)),
            Err(Error::NotPositiveDefinite { .. })
        ));
        // Next to nothing is raised to what counts, not ten times next to nothing.
        let tiny = QuantSpec { damp: 1e-320, ..spec(false) };
        let f = factor(&gram, 1.0, &tiny).unwrap();
        assert_eq!((f.damp_retries, f.damp), (4, 0.1));
        let message = factor(&hopeless, 1.0, &tiny).unwrap_err().to_string();
        assert!(message.len() < 160 && message.contains("damping 1.0"), "{message}");
        let message = QuantSpec { damp: 1e300, ..spec(false) }.validate().unwrap_err().to_string();
        assert!(message.contains("Damping 1e300 "), "{message}");
        let nan = Gram::from_host(array![[f32::NAN, 0.0], [0.0, 1.0]]);
        assert!(matches!(factor(&nan, 1.0, &spec(false)), Err(Error::NotFinite { .. })));
    }
}
