//! Gradients of row-wise and element-wise operations, and steps along gradients.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::elementwise::ROWS_PER_TASK;
use super::rows::{slice, slice_mut};
use super::simd;
use crate::activation::Activation;
use crate::adam::Adam;

/// dx += the gradient of x · r · gain with r = 1 / sqrt(mean(x²) + eps), over every run of gain.len() values of a row:
/// r · (gain · dy − x · r² · mean(x · gain · dy)). Sums are f64, and r is that of the forward.
pub(crate) fn rms_norm_add(
    x: &Array2<f32>,
    gain: &[f32],
    eps: f32,
    dy: &Array2<f32>,
    dx: &mut Array2<f32>,
) {
    let count = gain.len() as f64;
    let mut rows: Vec<_> = dx.axis_iter_mut(Axis(0)).collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, dx)| {
        let runs = slice(x.row(i)).chunks(gain.len()).zip(slice(dy.row(i)).chunks(gain.len()));
        for (dx, (x, dy)) in slice_mut(dx).chunks_mut(gain.len()).zip(runs) {
            let square = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
            let inverse = 1.0 / ((square / count) as f32 + eps).sqrt();
            let products = x.iter().zip(dy).zip(gain);
            let along = products
                .map(|((&x, &dy), &g)| f64::from(x) * f64::from(dy) * f64::from(g))
                .sum::<f64>();
            let back = (along / count) as f32 * inverse * inverse;
            for (((to, &x), &dy), &g) in dx.iter_mut().zip(x).zip(dy).zip(gain) {
                *to += inverse * (g * dy - x * back);
            }
        }
    });
}

/// The gradients of activation(gate) · up, in place of gate and up.
pub(crate) fn gated(
    mut gate: Array2<f32>,
    mut up: Array2<f32>,
    dy: &Array2<f32>,
    activation: Activation,
) -> (Array2<f32>, Array2<f32>) {
    let back = match activation {
        Activation::Silu => simd::silu_mul_backward,
        Activation::GeluTanh => simd::gelu_mul_backward,
    };
    let rows = gate.axis_iter_mut(Axis(0)).zip(up.axis_iter_mut(Axis(0)));
    let mut rows: Vec<_> = rows.collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, (gate, up))| {
        back(slice_mut(gate), slice_mut(up), slice(dy.row(i)));
    });
    (gate, up)
}

/// A step of Adam in place.
pub(crate) fn adam_step(
    gradient: &Array2<f32>,
    (mean, square): (&mut Array2<f32>, &mut Array2<f32>),
    values: &mut Array2<f32>,
    adam: &Adam,
) {
    let (mean_factor, root_factor) = adam.corrections();
    let moments = mean.axis_iter_mut(Axis(0)).zip(square.axis_iter_mut(Axis(0)));
    let mut rows: Vec<_> = moments.zip(values.axis_iter_mut(Axis(0))).collect();
    let rows = rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate();
    rows.for_each(|(i, ((mean, square), values))| {
        let moments = slice_mut(mean).iter_mut().zip(slice_mut(square));
        let places = moments.zip(slice_mut(values)).zip(slice(gradient.row(i)));
        for (((m, v), x), g) in places {
            let g = g * adam.gradient_factor;
            *m += (1.0 - adam.beta1) * (g - *m);
            *v += (1.0 - adam.beta2) * (g * g - *v);
            *x -= adam.learning_rate * *m * mean_factor / (v.sqrt() * root_factor + adam.epsilon);
        }
    });
}
