//! How far a step goes.

use gptq_compute::Adam;

/// Steps of which the first go less far, while the moments are of few gradients.
const WARM_UP: u32 = 4;
const BETAS: (f32, f32) = (0.9, 0.999);
/// Beside the root of a mean squared gradient of the sum of a batch's KL.
const EPSILON: f32 = 1e-8;

/// Step `step` of `steps`, from 0, of which the longest moves log scales by `rate` or so: after the first, the cosine
/// falls to 0 behind the last (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
pub(super) fn step(rate: f32, step: u32, steps: u32) -> Adam {
    let part = f64::from(step) / f64::from(steps.max(1));
    let decay = 0.5 * (1.0 + (std::f64::consts::PI * part).cos());
    let warm = (f64::from(step + 1) / f64::from(WARM_UP)).min(1.0);
    Adam {
        learning_rate: (f64::from(rate) * decay * warm) as f32,
        beta1: BETAS.0,
        beta2: BETAS.1,
        epsilon: EPSILON,
        step: step + 1,
        gradient_factor: 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_become_shorter_and_end_before_nothing() {
        let rates: Vec<f32> = (0..64).map(|at| step(0.01, at, 64).learning_rate).collect();
        assert!((rates[0] - 0.0025).abs() < 1e-9 && (rates[32] - 0.005).abs() < 1e-9);
        assert!(rates[..4].windows(2).all(|pair| pair[1] > pair[0]));
        assert!(rates[3..].windows(2).all(|pair| pair[1] < pair[0]) && rates[63] > 0.0);
        assert_eq!((step(0.01, 0, 64).step, step(0.01, 63, 64).step), (1, 64));
    }
}
