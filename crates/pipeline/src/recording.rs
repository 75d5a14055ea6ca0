//! What a run writes down of itself: the records of its linears, and with them the branch's report.

use gptq_compute::Precision;
use gptq_quant::Factored;
use gptq_records::branch_report::{
    BlockRecord, BranchReport, CalibrationRecord, LinearRecord, REPORT_FORMAT, RotationRecord,
    TOOL, TuningRecord,
};
use gptq_text::calibration::Calibration;

use crate::error::{Error, Result};
use crate::job::QuantizeJob;
use crate::progress::BlockReport;

/// Of a linear that was solved with this Hessian.
pub(crate) fn solved(
    name: String,
    relative_error: Option<f64>,
    factored: &Factored,
) -> LinearRecord {
    LinearRecord {
        name,
        relative_error,
        damp: Some(factored.damp),
        damp_retries: factored.damp_retries,
        f64_retries: u32::from(factored.precision == Precision::RetriedInF64),
        ..LinearRecord::default()
    }
}

/// Of a linear that was rounded without calibration.
pub(crate) fn rounded(name: String) -> LinearRecord {
    LinearRecord { name, ..LinearRecord::default() }
}

/// What its Hessian needed beside what was asked for, damping `asked`, one line each.
pub(crate) fn retries(linear: &LinearRecord, asked: f64) -> Vec<String> {
    let (name, damp) = (&linear.name, linear.damp.unwrap_or(asked));
    let mut warnings = Vec::new();
    if linear.damp_retries > 0 {
        warnings.push(format!(
            "the Hessian of `{name}` is not positive definite at damping {asked:?}; used {damp:?}"
        ));
    }
    if linear.f64_retries > 0 {
        warnings.push(format!(
            "the Hessian of `{name}` is not positive definite in f32 at damping {damp:?}; \
             factored it in f64"
        ));
    }
    warnings
}

/// Of the linears that saw too few tokens the one that saw fewest.
fn fewest<'a>(linears: impl IntoIterator<Item = &'a LinearRecord>) -> Option<&'a LinearRecord> {
    let few = linears.into_iter().filter(|linear| linear.few_tokens);
    few.min_by_key(|linear| linear.tokens.unwrap_or(0))
}

/// The linears of a block that saw too few tokens, in one line: experts may be hundreds.
pub(crate) fn few_tokens(linears: &[LinearRecord]) -> Option<String> {
    let LinearRecord { name, tokens, .. } = fewest(linears)?;
    let count = linears.iter().filter(|linear| linear.few_tokens).count();
    let tokens = tokens.unwrap_or(0);
    let (linears, were) = if count == 1 { ("linear", "was") } else { ("linears", "were") };
    Some(format!(
        "{count} {linears} of experts saw fewer tokens than they have inputs and {were} calibrated on all \
         tokens of the block; fewest, {tokens}: `{name}`"
    ))
}

/// Refuses what [`retries`] and [`few_tokens`] say, for `--strict`.
pub(crate) fn refuse_fallbacks<'a>(
    linears: impl IntoIterator<Item = &'a LinearRecord> + Clone,
    asked: f64,
) -> Result<()> {
    linears.clone().into_iter().try_for_each(|linear| refuse_retries(linear, asked))?;
    match fewest(linears) {
        None => Ok(()),
        Some(LinearRecord { name, tokens, .. }) => {
            Err(Error::StrictTokens { linear: name.clone(), tokens: tokens.unwrap_or(0) })
        }
    }
}

fn refuse_retries(linear: &LinearRecord, asked: f64) -> Result<()> {
    let (name, damp) = (linear.name.clone(), linear.damp.unwrap_or(asked));
    match (linear.damp_retries, linear.f64_retries) {
        (0, 0) => Ok(()),
        (0, _) => Err(Error::StrictPrecision { linear: name, damp }),
        _ => Err(Error::Strict { linear: name, damp, asked }),
    }
}

/// How many linears needed any, the head among them.
fn count(linears: &[&LinearRecord], needed: fn(&LinearRecord) -> u32) -> u32 {
    linears.iter().filter(|linear| needed(linear) > 0).count() as u32
}

fn calibration_record(calibration: &Calibration) -> CalibrationRecord {
    CalibrationRecord {
        dataset: calibration.dataset.portable(),
        windows: calibration.windows.len(),
        source_windows: match calibration.sources.as_slice() {
            [_] => Vec::new(),
            sources => sources.iter().map(|source| source.windows).collect(),
        },
        seq_len: calibration.seq_len,
        tokens: (!calibration.is_even()).then(|| calibration.tokens()),
        seed: calibration.seed,
        sha256: calibration.sha256.clone(),
    }
}

/// The report of a branch that was just made; nothing is measured yet.
pub(crate) fn branch_report(
    job: &QuantizeJob<'_>,
    file_bytes: u64,
    blocks: &[BlockReport],
    head: Option<LinearRecord>,
    tuning: Option<TuningRecord>,
    rotation: Option<RotationRecord>,
) -> BranchReport {
    let spec = &job.spec;
    let calibrates = spec.recipe.calibrates();
    let linears: Vec<&LinearRecord> = blocks.iter().flat_map(|b| &b.linears).chain(&head).collect();
    let record = |b: &BlockReport| BlockRecord { block: b.block, linears: b.linears.clone() };
    BranchReport {
        format: REPORT_FORMAT,
        tool: TOOL.to_owned(),
        model: job.model.clone(),
        branch: job.branch.clone(),
        bits: spec.bits,
        group_size: spec.group_size,
        act_order: spec.act_order,
        damp: spec.damp,
        recipe: spec.recipe.name().to_owned(),
        choices: calibrates.then(|| spec.choices.to_string()),
        source_dtype: job.source_dtype,
        layout: job.layout.name().to_owned(),
        device: job.device.kind(),
        ranks: job.ranks.size(),
        file_bytes,
        calibration: job.calibration.filter(|_| calibrates).map(calibration_record),
        damp_retries: count(&linears, |l| l.damp_retries),
        f64_retries: count(&linears, |l| l.f64_retries),
        few_tokens: count(&linears, |l| u32::from(l.few_tokens)),
        blocks: blocks.iter().map(record).collect(),
        head,
        tuning,
        rotation,
        evaluations: Vec::new(),
        tasks: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_retry_is_warned_of_and_refused() {
        let linear = |damp, damp_retries, f64_retries| LinearRecord {
            name: "q_proj".to_owned(),
            relative_error: None,
            damp: Some(damp),
            damp_retries,
            f64_retries,
            ..LinearRecord::default()
        };
        let usual = linear(0.01, 0, 0);
        assert!(retries(&usual, 0.01).is_empty() && refuse_fallbacks([&usual], 0.01).is_ok());
        for (linear, words) in [
            (linear(0.1, 1, 0), &["used 0.1"][..]),
            (linear(0.01, 0, 1), &["in f32 at damping 0.01; factored it in f64"]),
            (linear(0.1, 1, 1), &["used 0.1", "in f32 at damping 0.1; factored it in f64"]),
        ] {
            let warnings = retries(&linear, 0.01);
            assert_eq!(warnings.len(), words.len(), "{warnings:?}");
            for (line, words) in warnings.iter().zip(words) {
                assert!(line.contains("`q_proj`") && line.contains(words), "{line}");
            }
            let refused = refuse_fallbacks([&linear], 0.01).unwrap_err().to_string();
            assert!(refused.contains("`q_proj`") && refused.contains("--strict"), "{refused}");
        }
    }

    #[test]
    fn a_linear_that_needed_two_raises_is_one_linear() {
        let once = LinearRecord { damp_retries: 1, ..rounded("lm_head.weight".to_owned()) };
        let twice = LinearRecord { damp_retries: 2, ..once.clone() };
        let none = rounded("q_proj".to_owned());
        assert_eq!(count(&[&once, &twice, &none], |l| l.damp_retries), 2);
        assert!(
            refuse_fallbacks([&none], 0.01).is_ok() && refuse_fallbacks([&once], 0.01).is_err()
        );
    }

    #[test]
    fn experts_that_saw_too_few_tokens_are_one_warning() {
        let linear = |expert: u32, tokens, few_tokens| LinearRecord {
            name: format!("model.layers.0.mlp.experts.{expert}.up_proj"),
            tokens: Some(tokens),
            few_tokens,
            ..LinearRecord::default()
        };
        let (one, two, enough) = (linear(1, 30, true), linear(2, 7, true), linear(3, 5000, false));
        assert_eq!(few_tokens(std::slice::from_ref(&enough)), None);
        let warning = few_tokens(&[one.clone(), two.clone(), enough.clone()]).unwrap();
        assert!(warning.starts_with("2 linears of experts saw fewer"), "{warning}");
        assert!(
            warning.ends_with("fewest, 7: `model.layers.0.mlp.experts.2.up_proj`"),
            "{warning}"
        );
        assert!(few_tokens(std::slice::from_ref(&one)).unwrap().contains("1 linear of"));
        let refused = refuse_fallbacks([&one, &two, &enough], 0.01).unwrap_err().to_string();
        assert!(refused.contains("saw 7 tokens") && refused.contains("--strict"), "{refused}");
        assert!(refuse_fallbacks([&enough], 0.01).is_ok());
        assert_eq!(count(&[&one, &two, &enough], |l| u32::from(l.few_tokens)), 2);
    }
}
