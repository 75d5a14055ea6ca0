//! The host's solver with every choice, against a replay of its own codes in f64.
//!
//! At each column the weight, corrected for the earlier choices, must round to the code that was
//! chosen, each scale must follow from the weights at the time, and the values must be what the
//! file means. `golden.rs` compares the `autogptq` choices with AutoGPTQ itself.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports its errors")]

mod support;

use gptq_compute::cuda::{ClipSearch, SolveOptions};
use gptq_compute::{Device, Gram, Tensor};
use gptq_quant::{
    Choices, Clip, Codes, GroupWeights, QuantSpec, Recipe, ScalePrecision, Signs, factor,
    round_to_nearest, solve,
};
use ndarray::Array2;

use support::{Case, Plan, Replay, gram, weights, weights_at_the_ends_of_fp16, within};

/// Solves on the host and replays every row.
fn check(name: &str, spec: &QuantSpec, (rows, n): (usize, usize)) {
    let (w, gram) = (weights(rows, n), gram(n));
    let plan = Plan::new(&gram, spec.act_order);
    let (upper, precision) = Gram::from_host(gram.clone()).upper_factor(&plan.prep()).unwrap();
    let upper = upper.as_host().clone();
    let identity = upper.t().dot(&upper).dot(&plan.hessian(&gram)) - Array2::<f32>::eye(n);
    let worst = identity.iter().map(|v| v.abs()).max_by(f32::total_cmp).unwrap();
    within(&format!("{name}: UᵀU H = 1"), f64::from(worst), 1e-2);
    let factored = plan.factored(&upper, precision);
    let solved = solve(&Tensor::from_host(w.clone()), &factored, spec).unwrap();

    let ratios = support::ratios(spec.signs());
    let by_solving = spec.choices.clip == Clip::Solve;
    let search = ClipSearch { ratios: &ratios, importance: &plan.importance, by_solving };
    let half = spec.choices.scales == ScalePrecision::Half;
    let options = SolveOptions {
        bits: spec.bits,
        group_size: spec.group_size,
        fresh: spec.choices.group_weights == GroupWeights::Fresh,
        half_scales: half,
        search: (spec.choices.clip != Clip::None).then_some(search),
    };
    let case = Case { w: &w, upper: &upper, plan: &plan, options, half_values: false };
    let Codes::Plain(codes) = &solved.stored.codes else { panic!("packed codes from the CPU") };
    let groups = n.div_ceil(case.group());
    let mut replay = Replay::default();
    let zero = f32::from(spec.zero());
    for row in 0..rows {
        let code: Vec<u8> = plan.order.iter().map(|&c| codes[row * n + c as usize]).collect();
        let scale: Vec<f32> =
            (0..groups).map(|g| solved.stored.scales[g * rows + row].to_f32()).collect();
        case.replay(row, &code, &scale, &mut replay);
        for c in 0..n {
            let scale = scale[solved.stored.g_idx[c] as usize];
            let value = scale * (f32::from(codes[row * n + c]) - zero);
            assert_eq!(solved.weight.as_host()[[row, c]], value, "{name}: the file's value");
        }
    }
    within(&format!("{name}: codes, steps beyond half"), replay.code, 2e-3);
    // At 8 bits a step is so small that f32's rounding of the weights shows in a scale's loss.
    let tolerance = if spec.bits == 8 { 5e-3 } else { 1e-4 };
    within(&format!("{name}: scales"), replay.scale, tolerance);
    within(&format!("{name}: loss"), (solved.loss.unwrap() / replay.loss - 1.0).abs(), 1e-4);
}

/// A NaN anywhere must show in what `within` sees.
#[test]
fn a_replay_does_not_drop_nan() {
    let n = 64;
    let (w, gram) = (weights(4, n), gram(n));
    let plan = Plan::new(&gram, false);
    let (upper, _) = Gram::from_host(gram.clone()).upper_factor(&plan.prep()).unwrap();
    let ratios = [1.0];
    let search = ClipSearch { ratios: &ratios, importance: &plan.importance, by_solving: false };
    let tried = ClipSearch { by_solving: true, ..search };
    for search in [None, Some(search), Some(tried)] {
        let options =
            SolveOptions { bits: 4, group_size: Some(32), fresh: true, half_scales: false, search };
        let upper = upper.as_host();
        let case = Case { w: &w, upper, plan: &plan, options, half_values: false };
        let mut replay = Replay::default();
        case.replay(0, &[8; 64], &[f32::NAN, 1.0], &mut replay);
        assert!(replay.code.is_nan() && replay.scale.is_nan() && replay.loss.is_nan());
    }
}

#[test]
fn every_choice_is_solved_as_its_definition_says() {
    let plain = Choices { scales: ScalePrecision::Half, ..Choices::AUTOGPTQ };
    let cases = [
        ("fp16 scales", plain),
        ("searched", Choices { clip: Clip::Search, ..plain }),
        ("fresh", Choices { group_weights: Choices::BEST.group_weights, ..plain }),
        ("fresh, searched", Choices { clip: Clip::Search, ..Choices::BEST }),
        ("best, positive scales", Choices { signs: Signs::Positive, ..Choices::BEST }),
        ("best", Choices::BEST),
    ];
    for (name, choices) in cases {
        // Ragged rows and blocks; groups below, at, beside and above a block of columns.
        for (bits, group) in
            [(4, Some(32)), (3, Some(128)), (4, None), (2, Some(96)), (3, Some(200)), (8, Some(28))]
        {
            for act_order in [false, true] {
                let recipe = Recipe::Best;
                let mut spec = QuantSpec::new(bits, group, act_order, 0.01, recipe);
                spec.choices = choices;
                let title = format!("{name}, {bits} bits, group {group:?}, act-order {act_order}");
                check(&title, &spec, (11, 331));
            }
        }
    }
}

/// Whatever finite weights there are, every recipe writes scales that are finite and not 0, and
/// codes that mean no more than fp16 holds; and what is tiny is rounded to the nearest that fp16 has.
#[test]
fn scales_fit_both_ends_of_fp16_in_every_recipe() {
    let n = 64;
    let w = weights_at_the_ends_of_fp16(n);
    // Inputs that do not correlate: no column pays for another.
    let gram = Array2::from_diag_elem(n, 3.0_f32);
    for recipe in [Recipe::Rtn, Recipe::AutoGptq, Recipe::Best] {
        for (bits, group) in [(2, Some(32)), (3, None), (4, Some(16)), (4, Some(48)), (8, None)] {
            let spec = QuantSpec::new(bits, group, true, 0.01, recipe);
            let weight = Tensor::from_host(w.clone());
            let solved = match recipe {
                Recipe::Rtn => round_to_nearest(&Device::Cpu, &weight, &spec),
                _ => solve(
                    &weight,
                    &factor(&Gram::from_host(gram.clone()), 1.0, &spec).unwrap(),
                    &spec,
                ),
            };
            let solved = solved.unwrap().stored;
            let title = format!("{recipe:?}, {bits} bits, group {group:?}");
            let Codes::Plain(codes) = &solved.codes else { panic!("packed codes from the CPU") };
            let rows = w.nrows();
            for ((row, column), &wanted) in w.indexed_iter() {
                let group = solved.g_idx[column] as usize;
                let scale = solved.scales[group * rows + row];
                let sound = match spec.signs() {
                    Signs::Positive => scale.to_f32() > 0.0,
                    Signs::Both => scale.to_f32() != 0.0,
                };
                assert!(scale.is_finite() && sound, "{title}, row {row}: {scale}");
                let steps = f32::from(codes[row * n + column]) - f32::from(spec.zero());
                let given = scale.to_f32() * steps;
                assert!(given.abs() <= 65504.0, "{title}, row {row}: {given}");
                // AutoGPTQ's codes are chosen for a scale that the file then rounds.
                let nearest = if recipe == Recipe::AutoGptq { -24 } else { -25 };
                if row < 2 {
                    assert!((given - wanted).abs() <= 2.0_f32.powi(nearest), "{title}: {given}");
                }
            }
        }
    }
    // What no scale of fp16 reaches is refused by that name, not as a weight that is no number.
    let beyond = Tensor::from_host(Array2::from_elem((1, 32), -2e6_f32));
    let infinite = Tensor::from_host(Array2::from_elem((1, 32), f32::INFINITY));
    let factored = |spec: &QuantSpec| {
        factor(&Gram::from_host(Array2::from_diag_elem(32, 3.0_f32)), 1.0, spec).unwrap()
    };
    for recipe in [Recipe::Rtn, Recipe::AutoGptq, Recipe::Best] {
        let spec = QuantSpec::new(4, None, false, 0.01, recipe);
        let refused = |weight: &Tensor| match recipe {
            Recipe::Rtn => round_to_nearest(&Device::Cpu, weight, &spec).unwrap_err().to_string(),
            _ => solve(weight, &factored(&spec), &spec).unwrap_err().to_string(),
        };
        assert!(refused(&beyond).contains("does not fit fp16"), "{}", refused(&beyond));
        assert!(refused(&infinite).contains("The weight holds NaN"), "{}", refused(&infinite));
    }
}
