//! What a reader wants to know before the table, and where the numbers come from.

use gptq_records::branch_report::{BranchReport, CalibrationRecord};

use crate::compare::{Comparison, Row};
use crate::units;

/// Share of the rounded grids' KL that calibration takes away: one minus the geometric mean of the
/// ratios, so that 3-bit branches do not outweigh the others. `None` without such pairs.
pub(crate) fn gain_over_rounding(comparison: &Comparison<'_>) -> Option<f64> {
    let logs: Vec<f64> = comparison
        .rows
        .iter()
        .filter_map(|row| Some((row.kl()?, row.evaluation?.rtn?.kl)))
        .filter(|&(kl, rounded)| kl > 0.0 && rounded > 0.0)
        .map(|(kl, rounded)| kl.ln() - rounded.ln())
        .collect();
    let mean = logs.iter().sum::<f64>() / logs.len() as f64;
    (!logs.is_empty()).then(|| 1.0 - mean.exp())
}

/// The branch nearest to the dense model: by KL, or by perplexity where KL was not measured.
pub(crate) fn closest<'r, 'a>(comparison: &'r Comparison<'a>) -> Option<&'r Row<'a>> {
    let measure = |row: &&Row<'_>| row.kl().or_else(|| row.evaluation.map(|e| e.perplexity));
    let measured = comparison.rows.iter().filter(|row| measure(row).is_some());
    measured
        .min_by(|a, b| measure(a).unwrap_or(f64::NAN).total_cmp(&measure(b).unwrap_or(f64::NAN)))
}

/// The branch with the smallest file.
pub(crate) fn smallest<'r, 'a>(comparison: &'r Comparison<'a>) -> Option<&'r Row<'a>> {
    comparison.rows.iter().min_by_key(|row| row.branch.file_bytes)
}

/// Perplexity over the dense model's, minus one.
pub(crate) fn loss(row: &Row<'_>) -> Option<f64> {
    let evaluation = row.evaluation?;
    Some(evaluation.perplexity / evaluation.base_perplexity? - 1.0)
}

/// The evaluation in a sentence.
pub(crate) fn measured_on(comparison: &Comparison<'_>) -> Option<String> {
    let measurement = comparison.measurement.as_ref()?;
    let evaluations = || comparison.rows.iter().filter_map(|row| row.evaluation);
    let mut dtypes: Vec<&str> = evaluations().map(|e| e.dtype.as_str()).collect();
    dtypes.dedup();
    let first = evaluations().next()?;
    let counted = |tokens| format!(" ({} tokens)", units::count(tokens));
    let tokens_in_text = first.tokens_in_text.map_or_else(String::new, counted);
    let bos = if first.window_bos == Some(false) { " without BOS" } else { "" };
    Some(format!(
        "protocol {}{bos}: {} × {} tokens, {} scored, of {}{tokens_in_text}; {}",
        measurement.protocol,
        units::plural(measurement.windows, "window"),
        measurement.seq_len,
        units::count(measurement.tokens),
        measurement.dataset,
        dtypes.join(" and "),
    ))
}

/// A line of the provenance: what, and its values with the branches that have them where they
/// differ.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Fact {
    pub(crate) what: &'static str,
    pub(crate) values: Vec<Valued>,
}

/// A value and who has it; nobody is named where all have it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Valued {
    pub(crate) value: String,
    pub(crate) branches: Vec<String>,
}

/// Reads a value from a report.
type ValueOf = fn(&BranchReport) -> String;

/// How the branches of a comparison were made.
pub(crate) fn provenance(comparison: &Comparison<'_>) -> Vec<Fact> {
    let facts: [(&'static str, ValueOf); 8] = [
        ("Made by", |b| b.tool.clone()),
        ("Source dtype", |b| b.source_dtype.name().to_owned()),
        ("Device", device),
        ("Recipe", |b| b.recipe.clone()),
        ("Choices", |b| b.choices.clone().unwrap_or_else(|| "none".to_owned())),
        ("Damping", |b| format!("{:?}", b.damp)),
        ("Calibration", |b| b.calibration.as_ref().map_or_else(|| "none".to_owned(), calibration)),
        ("Layout", |b| b.layout.clone()),
    ];
    let branches: Vec<&BranchReport> = comparison.rows.iter().map(|row| row.branch).collect();
    facts.into_iter().map(|(what, value)| fact(what, &branches, value)).collect()
}

fn fact(what: &'static str, branches: &[&BranchReport], value: ValueOf) -> Fact {
    let mut values: Vec<Valued> = Vec::new();
    for branch in branches {
        let text = value(branch);
        match values.iter_mut().find(|known| known.value == text) {
            Some(known) => known.branches.push(branch.branch.clone()),
            None => values.push(Valued { value: text, branches: vec![branch.branch.clone()] }),
        }
    }
    if let [only] = values.as_mut_slice() {
        only.branches.clear();
    }
    Fact { what, values }
}

fn device(branch: &BranchReport) -> String {
    match branch.ranks {
        1 => branch.device.clone(),
        ranks => format!("{ranks} × {}", branch.device),
    }
}

fn calibration(record: &CalibrationRecord) -> String {
    let digest: String = record.sha256.chars().take(12).collect();
    let CalibrationRecord { windows, seq_len, seed, .. } = record;
    let windows = units::plural(*windows, "window");
    let (length, all) = match record.tokens {
        None => (format!("{windows} × {seq_len} tokens"), String::new()),
        Some(all) => (format!("{windows} of up to {seq_len} tokens"), format!(", {all} in all")),
    };
    let each = record.source_windows.iter().zip(record.dataset.each());
    let each: Vec<String> = each.map(|(n, source)| format!("{n} of {}", source.name)).collect();
    let windows = match each.as_slice() {
        [] => format!("{length} of {}{all}", record.dataset.name),
        each => format!("{length}{all}: {}", each.join(", ")),
    };
    format!("{windows}, seed {seed}, tokens' SHA-256 {digest}…")
}

/// What a reader must not overlook: calibration on the text of the evaluation, raised damping.
pub(crate) fn warnings(comparison: &Comparison<'_>) -> Vec<String> {
    let mut warnings = Vec::new();
    if comparison.contaminated() {
        let all = comparison.rows.iter().all(Row::contaminated);
        let named: Vec<&str> = comparison
            .rows
            .iter()
            .filter(|row| row.contaminated())
            .map(|row| row.branch.branch.as_str())
            .collect();
        let who = if all { "All branches".to_owned() } else { named.join(", ") };
        let verb = if !all && named.len() == 1 { "was" } else { "were" };
        warnings.push(format!(
            "{who} {verb} calibrated on the text measured here: perplexity and KL are optimistic, \
             and not comparable with those of a text that calibration has not seen."
        ));
    }
    for row in comparison.rows.iter().filter(|row| row.branch.damp_retries > 0) {
        warnings.push(format!(
            "{}: damping had to be raised above {:?} for {} linears, whose Hessians are not positive \
             definite.",
            row.branch.branch, row.branch.damp, row.branch.damp_retries
        ));
    }
    for row in comparison.rows.iter().filter(|row| row.branch.few_tokens > 0) {
        warnings.push(format!(
            "{}: {} linears of experts saw fewer tokens than they have inputs, and were calibrated on \
             all tokens of their blocks.",
            row.branch.branch, row.branch.few_tokens
        ));
    }
    warnings
}

/// The sentence that opens a report.
pub(crate) fn headline(comparison: &Comparison<'_>) -> Vec<String> {
    let unit = units::Unit::of(comparison.rows.iter().map(|row| row.branch.file_bytes));
    let describe = |row: &Row<'_>| {
        let mut parts = vec![unit.text(row.branch.file_bytes)];
        parts.extend(row.kl().map(|kl| format!("KL {}", units::kl(kl))));
        parts.extend(loss(row).map(|loss| format!("perplexity {}", units::percent(loss))));
        format!("{} ({})", row.branch.branch, parts.join(", "))
    };
    let mut lines = Vec::new();
    if let (Some(closest), Some(smallest)) = (closest(comparison), smallest(comparison))
        && comparison.rows.len() > 1
    {
        lines.push(format!("Closest to {}: {}", comparison.base_name(), describe(closest)));
        lines.push(format!("Smallest: {}", describe(smallest)));
    }
    if let Some(gain) = gain_over_rounding(comparison) {
        let sign = if gain < 0.0 { "more" } else { "less" };
        lines.push(format!(
            "Calibration leaves {} % {sign} KL than rounding to nearest, in the mean of the branches",
            units::number(100.0 * gain.abs(), 0)
        ));
    }
    lines
}
