//! Tables for people, and the few number formats that they use.

use std::collections::BTreeSet;

use comfy_table::{CellAlignment, Table};
use gptq_pipeline::perplexity::Perplexity;
use gptq_pipeline::rates::Prediction;
use gptq_text::evaluation::EvalText;

use crate::plain::plain_word;
use crate::terminal::width;

pub(crate) use gptq_report::units::{gigabytes, group, number, plural};

/// A table as wide as its cells; on a terminal that is narrower, each row as a paragraph. `left` names
/// the number of leading columns that hold text.
pub(crate) fn table(header: &[&str], left: usize, rows: &[Vec<String>]) -> String {
    let table = lines(header, left, rows);
    match width(&std::io::stdout()) {
        Some(columns) if table.lines().any(|line| line.chars().count() > columns) => {
            paragraphs(header, rows, columns)
        }
        _ => table,
    }
}

/// Each row's first cell, and below it the others with their names, in lines of at most `columns`
/// letters where no single word is longer.
fn paragraphs(header: &[&str], rows: &[Vec<String>], columns: usize) -> String {
    let mut text = String::new();
    for row in rows {
        let mut named = header.iter().zip(row).filter(|(_, cell)| !cell.is_empty());
        if let Some((_, first)) = named.next() {
            text.push_str(&format!("{}\n", plain_word(first)));
        }
        let cell = |(name, cell): (&&str, &String)| match *name {
            "" => plain_word(cell).into_owned(),
            name => format!("{name}: {}", plain_word(cell)),
        };
        let mut cells: Vec<String> = named.map(cell).collect();
        let last = cells.len().saturating_sub(1);
        cells.iter_mut().take(last).for_each(|cell| cell.push(';'));
        let mut line = " ".to_owned();
        let fits =
            |line: &str, more: &str| line.chars().count() + 1 + more.chars().count() <= columns;
        // Between cells where that is possible, else between words.
        let parts = cells.iter().flat_map(|cell| match fits(" ", cell) {
            true => vec![cell.as_str()],
            false => cell.split(' ').collect(),
        });
        for part in parts {
            if line.len() > 1 && !fits(&line, part) {
                text.push_str(&format!("{line}\n"));
                line = " ".to_owned();
            }
            line.push_str(&format!(" {part}"));
        }
        if line.len() > 1 {
            text.push_str(&format!("{line}\n"));
        }
    }
    text
}

fn lines(header: &[&str], left: usize, rows: &[Vec<String>]) -> String {
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
        "perplexity {:.4} ± {:.4}  ({}, {}, {} × {}, {} tokens scored, {dtype})\n",
        result.perplexity,
        result.perplexity * result.standard_error,
        text.protocol(),
        text.dataset,
        plural(result.windows, "window"),
        text.seq_len,
        result.tokens,
    )
}

/// `yes` or `no`.
pub(crate) fn yes_no(value: bool) -> String {
    gptq_report::units::yes_no(value).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_paragraphs_where_lines_are_short() {
        let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
        let rows =
            [row(["4bit-32g", "4", "", "a few words that go on"]), row(["b", "3", "6.73 kB", ""])];
        assert_eq!(
            paragraphs(&["branch", "bits", "x", ""], &rows, 20),
            "4bit-32g\n  bits: 4; a few\n  words that go on\nb\n  bits: 3;\n  x: 6.73 kB\n"
        );
    }
}
