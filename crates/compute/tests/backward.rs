//! Gradients on the CPU against central differences of the operations' definitions in f64.
//!
//! With a fixed dy, the loss Σ f(x) · dy has the gradient that the backward operation of f gives. Differences are of
//! step 10⁻⁴ and so wrong by some 10⁻⁸; what is left of a tolerance is f32's.

#![expect(clippy::print_stdout, reason = "helpers of tests")]

mod support;

use gptq_compute::{
    Activation, Adam, AttentionRule, AttentionShape, Device, Error, PackedCodes, RopeLayout,
    RopeTable, Tensor,
};
use half::f16;
use ndarray::{Array2, Axis, s};
use support::{CodedWeight, Random};

const CPU: Device = Device::Cpu;
const STEP: f64 = 1e-4;

fn host(x: &Array2<f32>) -> Tensor {
    Tensor::from_host(x.clone())
}

fn wide(x: &Array2<f32>) -> Array2<f64> {
    x.mapv(f64::from)
}

/// The gradient of `loss` at `x`, value by value.
fn differences(x: &Array2<f32>, loss: impl Fn(&Array2<f64>) -> f64) -> Array2<f64> {
    let mut at = wide(x);
    Array2::from_shape_fn(x.dim(), |place| {
        let middle = at[place];
        let mut side = |step: f64| {
            at[place] = middle + step;
            loss(&at)
        };
        let slope = (side(STEP) - side(-STEP)) / (2.0 * STEP);
        at[place] = middle;
        slope
    })
}

/// The largest error may be this part of the largest value, or of a tenth where all are small: the query of one key
/// has no gradient at all.
#[track_caller]
fn close(what: &str, got: &Tensor, want: &Array2<f64>, tolerance: f64) {
    let got = wide(got.as_host());
    assert_eq!(got.dim(), want.dim(), "{what}");
    assert!(got.iter().chain(want).all(|v| v.is_finite()), "{what}");
    let largest = |x: &Array2<f64>| x.iter().fold(0.0_f64, |a, v| a.max(v.abs()));
    let (error, size) = (largest(&(&got - want)), largest(want).max(0.1));
    println!("{what}: {:.3} of its tolerance", error / size / tolerance);
    assert!(error < tolerance * size, "{what}: {error:e} of {size:e}");
}

#[test]
fn linear_gradients_are_slopes() {
    let mut random = Random::new();
    let (x, w, dy) =
        (random.halves(7, 13, 1.0), random.halves(9, 13, 1.0), random.halves(7, 9, 1.0));
    let want = differences(&x, |x| (x.dot(&wide(&w).t()) * wide(&dy)).sum());
    let dx = CPU.linear_backward(&host(&dy), &host(&w)).unwrap();
    close("linear", &dx, &want, 1e-5);
    let before = random.halves(7, 13, 1.0);
    let mut sum = host(&before);
    CPU.linear_backward_add(&host(&dy), &host(&w), &mut sum).unwrap();
    close("linear, added", &sum, &(want + wide(&before)), 1e-5);
    assert!(CPU.linear_backward(&host(&dy), &host(&x)).is_err());
    assert!(CPU.linear_backward_add(&host(&dy), &host(&w), &mut host(&dy)).is_err());
}

#[test]
fn norm_gradients_are_slopes() {
    let mut random = Random::new();
    // A row as one run, heads, and more rows than a task takes.
    for (rows, cols, run) in [(3, 17, 17), (5, 24, 8), (70, 6, 3)] {
        let (x, dy) = (random.halves(rows, cols, 1.0), random.halves(rows, cols, 1.0));
        let gain: Vec<f32> = random.halves(1, run, 1.0).into_raw_vec_and_offset().0;
        let eps = 0.01_f32;
        let want = differences(&x, |x| {
            let mut loss = 0.0;
            for (i, row) in x.rows().into_iter().enumerate() {
                for (r, run_of) in row.to_vec().chunks(run).enumerate() {
                    let mean = run_of.iter().map(|v| v * v).sum::<f64>() / run as f64;
                    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
                    for (j, v) in run_of.iter().enumerate() {
                        let dy = f64::from(dy[[i, r * run + j]]);
                        loss += v * inverse * f64::from(gain[j]) * dy;
                    }
                }
            }
            loss
        });
        let what = format!("rms_norm {rows}×{cols}, runs of {run}");
        let dx = CPU.rms_norm_backward(&host(&x), &gain, eps, &host(&dy)).unwrap();
        close(&what, &dx, &want, 1e-5);
        let before = random.halves(rows, cols, 1.0);
        let mut sum = host(&before);
        CPU.rms_norm_backward_add(&host(&x), &gain, eps, &host(&dy), &mut sum).unwrap();
        close(&what, &sum, &(want + wide(&before)), 1e-5);
    }
    let x = host(&random.halves(2, 6, 1.0));
    assert!(CPU.rms_norm_backward(&x, &[1.0; 4], 1e-5, &x).is_err());
    assert!(CPU.rms_norm_backward(&x, &[], 1e-5, &x).is_err());
}

#[test]
fn gated_gradients_are_slopes() {
    let mut random = Random::new();
    let gelu = |x: f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        0.5 * x * (1.0 + u.tanh())
    };
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let (rows, cols) = (67, 5);
    let mut gate = random.halves(rows, cols, 3.0);
    gate[[0, 0]] = -60.0;
    gate[[0, 1]] = 60.0;
    gate[[0, 2]] = 0.0;
    let (up, dy) = (random.halves(rows, cols, 2.0), random.halves(rows, cols, 1.0));
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let f = |x: f64| if activation == Activation::Silu { silu(x) } else { gelu(x) };
        // Elements do not know of one another.
        let slope = |x: f32, u: f32| {
            let (x, u) = (f64::from(x), f64::from(u));
            u * (f(x + STEP) - f(x - STEP)) / (2.0 * STEP)
        };
        let d_gate =
            Array2::from_shape_fn((rows, cols), |at| f64::from(dy[at]) * slope(gate[at], up[at]));
        let d_up =
            Array2::from_shape_fn((rows, cols), |at| f64::from(dy[at]) * f(f64::from(gate[at])));
        let got = CPU.gated_backward(&host(&gate), &host(&up), &host(&dy), activation).unwrap();
        close(&format!("{activation:?}, gate"), &got.0, &d_gate, 1e-5);
        close(&format!("{activation:?}, up"), &got.1, &d_up, 1e-5);
    }
}

/// The transpose of a map: ⟨f(x), y⟩ = ⟨x, fᵀ(y)⟩ for all x and y.
#[test]
fn rotations_go_back_by_their_transpose() {
    let mut random = Random::new();
    let frequencies = [1.0_f32, 0.31, 0.07];
    for (layout, head_dim, factor) in [
        (RopeLayout::Half, 6, 1.0),
        (RopeLayout::Half, 10, 1.25),
        (RopeLayout::Interleaved, 6, 1.0),
        (RopeLayout::Interleaved, 11, 0.75),
    ] {
        let table = RopeTable::with(&frequencies, 9, head_dim, layout, factor);
        for _ in 0..3 {
            let x = random.halves(14, 2 * head_dim, 1.0);
            let y = random.halves(14, 2 * head_dim, 1.0);
            let (mut turned, mut back) = (host(&x), host(&y));
            CPU.rope(&mut turned, &table, 7).unwrap();
            CPU.rope_backward(&mut back, &table, 7).unwrap();
            let left = (wide(turned.as_host()) * wide(&y)).sum();
            let right = (wide(back.as_host()) * wide(&x)).sum();
            assert!((left - right).abs() < 1e-4, "{layout:?} of {head_dim}: {left} {right}");
        }
    }
}

/// Σ attention(q, k, v) · dout by the definition, token by token.
fn attention_loss(
    [q, k, v]: [&Array2<f64>; 3],
    dout: &Array2<f64>,
    shape: AttentionShape,
    rule: &AttentionRule,
) -> f64 {
    let AttentionShape { heads, kv_heads, head_dim, seq_len } = shape;
    let mut loss = 0.0;
    for (t, head) in (0..q.nrows()).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        let (window, position) = (t / seq_len * seq_len, t % seq_len);
        let (at, kv) = (head * head_dim, head / (heads / kv_heads) * head_dim);
        let first = rule.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let (mut sum, mut gain) = (0.0, 0.0);
        for j in window + first..=window + position {
            let product: f64 = (0..head_dim).map(|d| q[[t, at + d]] * k[[j, kv + d]]).sum();
            let score = product * f64::from(rule.scale);
            let score = rule.softcap.map_or(score, |cap| {
                let cap = f64::from(cap);
                cap * (score / cap).tanh()
            });
            sum += score.exp();
            gain += score.exp()
                * (0..head_dim).map(|d| v[[j, kv + d]] * dout[[t, at + d]]).sum::<f64>();
        }
        loss += gain / sum;
    }
    loss
}

#[test]
fn attention_gradients_are_slopes() {
    let mut random = Random::new();
    let plain = AttentionRule::llama(4);
    let small = AttentionShape { heads: 4, kv_heads: 2, head_dim: 4, seq_len: 5 };
    // Two bands of queries, the second of two.
    let long = AttentionShape { heads: 2, kv_heads: 1, head_dim: 2, seq_len: 130 };
    for (shape, windows, rule) in [
        (small, 2, plain),
        (AttentionShape { kv_heads: 4, ..small }, 1, plain),
        (AttentionShape { kv_heads: 1, seq_len: 1, ..small }, 3, plain),
        (small, 2, AttentionRule { scale: 0.3, softcap: Some(1.5), ..plain }),
        (small, 1, AttentionRule { window: Some(2), softcap: Some(3.0), ..plain }),
        (long, 1, plain),
        (long, 1, AttentionRule { window: Some(7), ..plain }),
    ] {
        let tokens = windows * shape.seq_len;
        let [wide_heads, narrow] = [shape.heads, shape.kv_heads].map(|n| n * shape.head_dim);
        let (q, dout) =
            (random.halves(tokens, wide_heads, 2.0), random.halves(tokens, wide_heads, 1.0));
        let (k, v) = (random.halves(tokens, narrow, 1.0), random.halves(tokens, narrow, 1.0));
        let (a, b, c, d) = (wide(&q), wide(&k), wide(&v), wide(&dout));
        let want = [
            differences(&q, |q| attention_loss([q, &b, &c], &d, shape, &rule)),
            differences(&k, |k| attention_loss([&a, k, &c], &d, shape, &rule)),
            differences(&v, |v| attention_loss([&a, &b, v], &d, shape, &rule)),
        ];
        let [q, k, v, dout] = [&q, &k, &v, &dout].map(host);
        let out = CPU.attention(&q, &k, &v, shape, &rule).unwrap();
        let got = CPU.attention_backward([&q, &k, &v], &out, &dout, shape, &rule).unwrap();
        for ((name, got), want) in ["q", "k", "v"].into_iter().zip(&got).zip(&want) {
            close(&format!("attention by {name}, {shape:?}, {rule:?}"), got, want, 1e-5);
        }
    }
    let x = host(&random.halves(10, 16, 1.0));
    let narrow = host(&random.halves(10, 8, 1.0));
    let refused = |keys: &Tensor, dout: &Tensor, shape| {
        CPU.attention_backward([&x, keys, &narrow], &x, dout, shape, &plain).is_err()
    };
    assert!(!refused(&narrow, &x, small));
    assert!(refused(&x, &x, small) && refused(&narrow, &narrow, small));
    assert!(refused(&narrow, &x, AttentionShape { seq_len: 4, ..small }));
    assert!(refused(&narrow, &x, AttentionShape { seq_len: 0, ..small }));
}

#[test]
fn divergences_have_slopes_by_hidden_states() {
    let mut random = Random::new();
    // A whole band of rows and a ragged one; heads of different widths.
    let (rows, vocab, scale) = (519, 11, 8.0);
    let (ph, pw) = (random.halves(rows, 6, 1.0), random.halves(vocab, 6, 0.7));
    let (qh, qw) = (random.halves(rows, 4, 1.0), random.halves(vocab, 4, 0.7));
    for softcap in [None, Some(1.5_f32)] {
        let log_softmax = |hidden: &[f64], head: &Array2<f32>| -> Vec<f64> {
            let logits = head.rows().into_iter().map(|w| {
                let logit: f64 = w.iter().zip(hidden).map(|(&w, h)| f64::from(w) * h).sum();
                softcap.map_or(logit, |cap| (logit / f64::from(cap)).tanh() * f64::from(cap))
            });
            let logits: Vec<f64> = logits.collect();
            let norm = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            logits.iter().map(|l| l - norm).collect()
        };
        let row = |x: &Array2<f32>, i: usize| wide(&x.slice(s![i..=i, ..]).to_owned());
        let divergence = |i: usize, q: &Array2<f64>| -> f64 {
            let p = log_softmax(row(&ph, i).as_slice().unwrap(), &pw);
            let q = log_softmax(q.as_slice().unwrap(), &qw);
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let mut want = Array2::zeros(qh.dim());
        for i in 0..rows {
            let slopes = differences(&qh.slice(s![i..=i, ..]).to_owned(), |q| divergence(i, q));
            want.row_mut(i).assign(&(slopes.row(0).mapv(|v| v * f64::from(scale))));
        }
        let (p, q) = ((host(&ph), host(&pw)), (host(&qh), host(&qw)));
        let (kl, dx) = CPU.kl_backward((&p.0, &p.1), (&q.0, &q.1), softcap, scale).unwrap();
        close(&format!("kl_backward, {softcap:?}"), &dx, &want, 2e-5);
        let want = CPU.token_kl((&p.0, &p.1), (&q.0, &q.1), softcap).unwrap();
        assert_eq!(kl, want);
        for i in [0, 511, 518] {
            assert!((f64::from(kl[i]) - divergence(i, &row(&qh, i))).abs() < 1e-5, "{softcap:?}");
        }
    }
    let [a, b] = [&ph, &qw].map(host);
    assert!(CPU.kl_backward((&a, &a), (&a, &b), None, 1.0).is_err());
}

#[test]
fn scales_have_slopes_by_their_log_factors() {
    let mut random = Random::new();
    for (bits, rows, cols, group) in
        [(4, 288, 96, 40), (3, 32, 64, 64), (2, 32, 128, 32), (8, 64, 32, 5)]
    {
        let coded = CodedWeight::random(&mut random, bits, (rows, cols), group);
        let codes = CPU.scaled_codes(coded.packed()).unwrap();
        let groups = cols.div_ceil(group);
        assert_eq!((codes.shape(), codes.groups()), ((rows, cols), groups));
        let zeros = CPU.zeros(rows, groups).unwrap();
        assert_eq!(*CPU.rescaled(&codes, &zeros).unwrap().as_host(), coded.values());
        assert_eq!(CPU.file_scales(&codes, &zeros).unwrap(), coded.scales);

        let tokens = 23;
        let (x, dy) = (random.halves(tokens, cols, 1.0), random.halves(tokens, rows, 1.0));
        let m = random.halves(rows, groups, 0.05);
        let m_here = host(&m);
        let w = CPU.rescaled(&codes, &m_here).unwrap();
        let scales = CPU.file_scales(&codes, &m_here).unwrap();
        assert_eq!(*w.as_host(), coded.values_of(&scales), "a file would mean another weight");
        for (at, scale) in scales.iter().enumerate() {
            let start = f64::from(coded.scales[at]);
            let want = start * f64::from(m[[at % rows, at / rows]]).exp();
            let error = (f64::from(*scale) - want).abs();
            assert!(error <= 5e-4 * want.abs() + 3e-8, "{scale} for {want}");
        }
        // Rows do not know of one another; the weight's rounding is no part of the slope, so the values that
        // dyᵀx is multiplied with are those before it.
        let start = wide(&coded.values());
        let mut want = Array2::zeros((rows, groups));
        for row in 0..rows {
            let dw = wide(&dy).column(row).dot(&wide(&x));
            let slopes = differences(&m.slice(s![row..=row, ..]).to_owned(), |m| {
                let terms = coded.g_idx.iter().zip(&dw).zip(start.row(row));
                terms.map(|((&g, dw), w)| dw * w * m[[0, g as usize]].exp()).sum()
            });
            want.row_mut(row).assign(&slopes.row(0));
        }
        let mut sum = CPU.zeros(rows, groups).unwrap();
        // The values before the rounding, which the slopes are of.
        let smooth = Array2::from_shape_fn((rows, cols), |(i, j)| {
            let factor = f64::from(m[[i, coded.g_idx[j] as usize]]).exp();
            (start[[i, j]] * factor) as f32
        });
        CPU.scale_gradient(&host(&dy), &host(&x), &codes, &host(&smooth), &mut sum).unwrap();
        close(&format!("scale_gradient, {bits} bits"), &sum, &want, 1e-5);
        // Twice the half of the tokens each, over the weight as it is rounded: near.
        let mut sum = CPU.zeros(rows, groups).unwrap();
        for part in [0..9, 9..tokens] {
            let part = |a: &Array2<f32>| host(&a.slice(s![part.clone(), ..]).to_owned());
            CPU.scale_gradient(&part(&dy), &part(&x), &codes, &w, &mut sum).unwrap();
        }
        close(&format!("scale_gradient in parts, {bits} bits"), &sum, &want, 1e-3);
        assert!(CPU.scale_gradient(&host(&x), &host(&dy), &codes, &w, &mut sum).is_err());
        assert!(CPU.rescaled(&codes, &host(&x)).is_err());
    }
}

#[test]
fn scales_stay_what_a_file_can_hold() {
    let mut random = Random::new();
    let mut coded = CodedWeight::random(&mut random, 4, (32, 32), 32);
    coded.scales[0] = f16::from_f32(-6e-8);
    coded.scales[1] = f16::from_f32(8000.0);
    coded.scales[2] = f16::from_f32(1.0);
    let codes = CPU.scaled_codes(coded.packed()).unwrap();
    let factors = |of: [f32; 3]| {
        let mut m = Array2::zeros((32, 1));
        (0..3).for_each(|i| m[[i, 0]] = of[i]);
        Tensor::from_host(m)
    };
    let scales = CPU.file_scales(&codes, &factors([-3.0, 2.0, 0.5])).unwrap();
    assert_eq!(scales[0], -f16::MIN_POSITIVE_SUBNORMAL);
    assert_eq!(scales[1].to_f32(), 65504.0 / 8.0);
    let beyond = CPU.file_scales(&codes, &factors([0.0, 0.0, 20.0]));
    assert!(matches!(beyond, Err(Error::HalfOverflow { count: 1 })));

    let refused = |change: fn(&mut PackedCodes<'_>)| {
        let mut packed = coded.packed();
        change(&mut packed);
        CPU.scaled_codes(packed).is_err()
    };
    assert!(!refused(|_| ()));
    assert!(refused(|p| p.bits = 5) && refused(|p| p.rows = 31) && refused(|p| p.zero = 16));
    assert!(refused(|p| p.words = &p.words[1..]) && refused(|p| p.g_idx = &[0; 31]));
    assert!(refused(|p| p.scales = &p.scales[1..]) && refused(|p| p.g_idx = &[1; 32]));
}

#[test]
fn steps_of_adam_are_the_algorithm() {
    let mut random = Random::new();
    let shape = (70, 3);
    let start = random.halves(shape.0, shape.1, 1.0);
    let (mut m, mut v, mut x) =
        (CPU.zeros(70, 3).unwrap(), CPU.zeros(70, 3).unwrap(), host(&start));
    let (mut m64, mut v64, mut x64) = (Array2::zeros(shape), Array2::zeros(shape), wide(&start));
    for step in 1..=5 {
        let g = random.halves(shape.0, shape.1, 100.0);
        let adam = Adam {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            step,
            gradient_factor: 1.0 / 1024.0,
        };
        CPU.adam_step(&host(&g), [&mut m, &mut v], &mut x, &adam).unwrap();
        let g = wide(&g) / 1024.0;
        m64 = &m64 * 0.9 + &g * 0.1;
        v64 = &v64 * 0.95 + &g * &g * 0.05;
        let (c1, c2) = (1.0 - 0.9_f64.powi(step as i32), 1.0 - 0.95_f64.powi(step as i32));
        let moved = (&m64 / c1) / ((&v64 / c2).mapv(f64::sqrt) + 1e-8);
        x64 = &x64 - &(moved * 0.01);
        close(&format!("adam, step {step}"), &x, &x64, 1e-6);
        close(&format!("adam, mean, step {step}"), &m, &m64, 1e-5);
    }
    // The first step's length is the rate's, whatever the gradient's.
    let first = start.index_axis(Axis(0), 0);
    assert!(
        x.as_host().index_axis(Axis(0), 0).iter().zip(first).all(|(a, b)| (a - b).abs() < 0.06)
    );
    let adam = Adam {
        learning_rate: 0.01,
        beta1: 1.0,
        beta2: 0.9,
        epsilon: 1e-8,
        step: 1,
        gradient_factor: 1.0,
    };
    assert!(CPU.adam_step(&host(&start), [&mut m, &mut v], &mut x, &adam).is_err());
}
