//! Row loops that need the exponential, compiled for AVX2 where the processor has it.
//!
//! The binary targets plain x86-64, where these loops would run four lanes wide; each function here
//! is one generic body, instantiated twice and chosen at run time.

/// Defines `pub(crate) fn $name` that runs `$body` with AVX2 and FMA enabled where present.
macro_rules! dispatch {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)?, $body:path) => {
        $(#[$doc])*
        #[expect(unsafe_code, reason = "calls a function with run-time checked target features")]
        pub(crate) fn $name($($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn wide($($arg: $type),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: both target features were detected on this processor just above.
                    return unsafe { wide($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

dispatch!(
    /// Replaces each value v by exp(v − shift) and returns the sum.
    exp_sum(values: &mut [f32], shift: f32) -> f32, exp_sum_body);
dispatch!(
    /// The largest value, −∞ for none.
    max(values: &[f32]) -> f32, max_body);
dispatch!(
    /// gate = silu(gate) · up.
    silu_mul(gate: &mut [f32], up: &[f32]), silu_mul_body);
dispatch!(
    /// gate = gelu(gate) · up, by the approximation with a hyperbolic tangent.
    gelu_mul(gate: &mut [f32], up: &[f32]), gelu_mul_body);
dispatch!(
    /// The gradients of silu(gate) · up, in place of gate and up.
    silu_mul_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]), silu_mul_backward_body);
dispatch!(
    /// The same of gelu(gate) · up.
    gelu_mul_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]), gelu_mul_backward_body);
dispatch!(
    /// Each value v becomes cap · tanh(v / cap).
    softcap(values: &mut [f32], cap: f32), softcap_body);
dispatch!(
    /// Σ wᵢ · rowᵢ, of rows as long as `out`.
    weighted_sum(weights: &[f32], rows: &[f32], out: &mut [f32]), weighted_sum_body);
dispatch!(
    /// Σ exp(p − p_norm) · ((p − p_norm) − (q − q_norm)): KL of one row of logits.
    kl(p: &[f32], p_norm: f32, q: &[f32], q_norm: f32) -> f64, kl_body);
dispatch!(
    /// log Σ exp(values).
    log_sum_exp(values: &[f32]) -> f32, log_sum_exp_body);

/// Lanes of the running sums: wide enough for two AVX2 registers, fixed for every processor so
/// that the order of additions is.
const LANES: usize = 16;

/// e^x, relative error under 2.4e-7; 0 below −87.3, and saturating at e^88.3.
///
/// Cody–Waite reduction by ln 2 in two parts and a degree-6 polynomial on ±ln 2 / 2.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.3);
    // Adding and subtracting 1.5·2^23 rounds to the nearest integer without a libm call.
    const ROUND: f32 = 12_582_912.0;
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { e * scale }
}

#[inline(always)]
fn exp_sum_body(values: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let mut chunks = values.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *v = exp(*v - shift);
            *lane += *v;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for v in chunks.into_remainder() {
        *v = exp(*v - shift);
        sum += *v;
    }
    sum
}

#[inline(always)]
fn max_body(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |a, &v| a.max(v))
}

#[inline(always)]
fn weighted_sum_body(weights: &[f32], rows: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (row, w) in rows.chunks_exact(out.len()).zip(weights) {
        for (o, v) in out.iter_mut().zip(row) {
            *o += w * v;
        }
    }
}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// x · Φ(x) with Φ(x) ≈ (1 + tanh u) / 2 = 1 / (1 + e^(−2u)), u = √(2/π) (x + 0.044715 x³) (Hendrycks and
/// Gimpel, arXiv 1606.08415).
#[inline(always)]
fn gelu_mul_body(gate: &mut [f32], up: &[f32]) {
    const TWICE: f32 = 2.0 * 0.797_884_6;
    for (g, u) in gate.iter_mut().zip(up) {
        let x = *g;
        *g = x / (1.0 + exp(-(TWICE * (x + 0.044_715 * x * x * x)))) * u;
    }
}

/// With s = 1 / (1 + e^(−x)), the slope of x · s is s + x · s (1 − s).
#[inline(always)]
fn silu_mul_backward_body(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
        let x = *g;
        let s = 1.0 / (1.0 + exp(-x));
        *g = dy * *u * (s + x * s * (1.0 - s));
        *u = dy * x * s;
    }
}

/// With s = 1 / (1 + e^(−2u)), the slope of x · s is s + x · s (1 − s) · 2u′.
#[inline(always)]
fn gelu_mul_backward_body(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    const TWICE: f32 = 2.0 * 0.797_884_6;
    for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
        let x = *g;
        let s = 1.0 / (1.0 + exp(-(TWICE * (x + 0.044_715 * x * x * x))));
        let slope = TWICE * (1.0 + 3.0 * 0.044_715 * x * x);
        *g = dy * *u * (s + x * s * (1.0 - s) * slope);
        *u = dy * x * s;
    }
}

#[inline(always)]
fn softcap_body(values: &mut [f32], cap: f32) {
    for v in values {
        *v = cap * tanh(*v / cap);
    }
}

/// tanh x, relative error under 2.4e-7: a polynomial about 0, where 1 − 2 / (e^2x + 1) would cancel (Cephes,
/// `tanhf`).
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let (size, square) = (x.abs(), x * x);
    let mut p = -5.704_988_7e-3_f32;
    p = p * square + 2.063_909e-2;
    p = p * square - 5.373_971_6e-2;
    p = p * square + 1.333_144_2e-1;
    p = p * square - 3.333_328e-1;
    let near = p * square * x + x;
    let far = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { near } else { far }
}

#[inline(always)]
fn log_sum_exp_body(values: &[f32]) -> f32 {
    let shift = max_body(values);
    let mut lanes = [0.0_f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += exp(v - shift);
        }
    }
    let sum: f32 = lanes.iter().sum::<f32>() + tail.iter().map(|&v| exp(v - shift)).sum::<f32>();
    shift + sum.ln()
}

#[inline(always)]
fn kl_body(p: &[f32], p_norm: f32, q: &[f32], q_norm: f32) -> f64 {
    let mut lanes = [0.0_f32; LANES];
    for (p, q) in p.chunks(LANES).zip(q.chunks(LANES)) {
        for ((lane, &p), &q) in lanes.iter_mut().zip(p).zip(q) {
            let log_p = p - p_norm;
            *lane += exp(log_p) * (log_p - (q - q_norm));
        }
    }
    lanes.iter().map(|&v| f64::from(v)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        for i in -8730..=8830 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn tanh_and_gelu_are_near_f64() {
        for i in -40_000..=40_000 {
            let x = i as f32 / 997.0;
            let exact = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - exact).abs();
            assert!(error <= 2.4e-7 * exact.abs(), "tanh({x}) is off by {error:e}");
            let wide = f64::from(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let exact = 0.5 * wide * (1.0 + inner.tanh()) * 3.0;
            let mut gate = [x];
            gelu_mul(&mut gate, &[3.0]);
            let error = (f64::from(gate[0]) - exact).abs();
            assert!(error <= 1e-6 * exact.abs() + 1e-7, "gelu({x}) is off by {error:e}");
        }
        let mut values = [f32::INFINITY, f32::NEG_INFINITY, 3e38, -0.0, f32::NAN];
        softcap(&mut values, 30.0);
        assert_eq!(values[..4], [30.0, -30.0, 30.0, -0.0]);
        assert!(values[4].is_nan());
    }

    #[test]
    fn reductions_match_f64_on_ragged_lengths() {
        for n in [1, 15, 16, 17, 100] {
            let p: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
            let q: Vec<f32> = (0..n).map(|i| (i as f32 * 0.9).cos() * 5.0).collect();
            let lse = |v: &[f32]| v.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let (pn, qn) = (lse(&p), lse(&q));
            assert!((f64::from(log_sum_exp(&p)) - pn).abs() < 1e-5);
            let exact: f64 = p
                .iter()
                .zip(&q)
                .map(|(&a, &b)| {
                    let (a, b) = (f64::from(a) - pn, f64::from(b) - qn);
                    a.exp() * (a - b)
                })
                .sum();
            assert!((kl(&p, pn as f32, &q, qn as f32) - exact).abs() < 1e-4);
            assert_eq!(max(&p), p.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
