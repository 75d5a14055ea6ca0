//! How far a step goes.

use gptq_compute::Adam;

/// Of the first step, on log scales: as much as half a unit in the last place of an fp16 scale.
const LEARNING_RATE: f64 = 5e-4;
const BETAS: (f32, f32) = (0.9, 0.999);
/// Beside the root of a mean squared gradient of the sum of a batch's KL.
const EPSILON: f32 = 1e-8;

/// Step `step` of `steps`, from 0: the cosine falls to 0 behind the last (Loshchilov and Hutter, arXiv
/// 1608.03983, without restarts).
pub(super) fn step(step: u32, steps: u32) -> Adam {
    let part = f64::from(step) / f64::from(steps.max(1));
    let decay = 0.5 * (1.0 + (std::f64::consts::PI * part).cos());
    Adam {
        learning_rate: (LEARNING_RATE * decay) as f32,
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
        let rates: Vec<f32> = (0..64).map(|at| step(at, 64).learning_rate).collect();
        assert_eq!(rates[0], LEARNING_RATE as f32);
        assert!((rates[32] - rates[0] / 2.0).abs() < 1e-9);
        assert!(rates.windows(2).all(|pair| pair[1] < pair[0]) && rates[63] > 0.0);
        assert_eq!((step(0, 64).step, step(63, 64).step), (1, 64));
    }
}
