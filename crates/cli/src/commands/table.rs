//! Tables for people, and the few number formats that they use.

use std::collections::BTreeSet;

use comfy_table::{CellAlignment, Table};
use gptq_pipeline::perplexity::Perplexity;
use gptq_pipeline::rates::Prediction;
use gptq_text::evaluation::EvalText;

use crate::plain::plain_word;

pub(crate) use gptq_report::units::{gigabytes, group};

/// A borderless table; `left` names the number of leading columns that hold text.
pub(crate) fn table(header: &[&str], left: usize, rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header);
    // Before widths are counted.
    table.add_rows(rows.iter().map(|row| row.iter().map(|cell| plain_word(cell))));
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if i >= left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Bytes in a unit that keeps three digits or so.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} B"),
        1000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => gigabytes(bytes),
    }
}

/// Floating-point operations in a unit that keeps three digits or so.
pub(crate) fn operations(count: f64) -> String {
    match count {
        0.0..1e12 => format!("{:.1} GFLOP", count / 1e9),
        1e12..1e15 => format!("{:.1} TFLOP", count / 1e12),
        _ => format!("{:.1} PFLOP", count / 1e15),
    }
}

/// A time that is known beforehand, in a unit that keeps two digits or so; `~` marks an estimate.
pub(crate) fn time(prediction: Option<Prediction>) -> String {
    let Some(Prediction { seconds, from }) = prediction else { return "–".to_owned() };
    let mark = if from.is_estimate() { "~" } else { "" };
    match seconds {
        0.0..10.0 => format!("{mark}{seconds:.1} s"),
        10.0..600.0 => format!("{mark}{seconds:.0} s"),
        600.0..7200.0 => format!("{mark}{:.0} min", seconds / 60.0),
        _ => format!("{mark}{:.1} h", seconds / 3600.0),
    }
}

/// Where times come from, each way once; what to do where nothing is known.
pub(crate) fn times_from(all: impl IntoIterator<Item = Option<Prediction>>) -> String {
    let from: BTreeSet<_> = all.into_iter().flatten().map(|predicted| predicted.from).collect();
    if from.is_empty() {
        return "not known; run gptq bench with the branches' --recipe".to_owned();
    }
    from.iter().map(|from| from.name()).collect::<Vec<_>>().join("; or ")
}

/// A perplexity with its standard error, and what was measured.
pub(crate) fn perplexity(result: &Perplexity, text: &EvalText, dtype: &str) -> String {
    format!(
        "perplexity {:.4} ± {:.4}  ({}, {}, {} windows × {}, {} tokens scored, {dtype})\n",
        result.perplexity,
        result.perplexity * result.standard_error,
        text.protocol(),
        text.dataset,
        result.windows,
        text.seq_len,
        result.tokens,
    )
}

/// `yes` or `no`.
pub(crate) fn yes_no(value: bool) -> String {
    gptq_report::units::yes_no(value).to_owned()
}
