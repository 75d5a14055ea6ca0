//! The report as Markdown, for terminals, issues and CI summaries.

use crate::collect::Report;
use crate::compare::{Change, Comparison, Row, comparisons};
use crate::summary;
use crate::task_table::TaskTable;
use crate::units::{self, Unit};

/// The whole report; with the changes since `previous`.
pub fn markdown(report: &Report, previous: Option<&Report>) -> String {
    let sections: Vec<String> = comparisons(report, previous).iter().map(section).collect();
    sections.join("\n")
}

fn section(comparison: &Comparison<'_>) -> String {
    let count = comparison.rows.len();
    let branches = if count == 1 { "branch" } else { "branches" };
    let mut text = format!("# {}: {count} {branches}\n\n", code(comparison.model));
    for warning in summary::warnings(comparison) {
        text.push_str(&format!("> **Warning:** {}\n\n", escape(&warning)));
    }
    for line in summary::headline(comparison) {
        text.push_str(&format!("- {}\n", escape(&line)));
    }
    text.push_str(&format!("\n{}\n", table(comparison)));
    if !comparison.gone.is_empty() {
        let names: Vec<String> = comparison.gone.iter().map(|name| code(name)).collect();
        text.push_str(&format!("No longer there: {}.\n\n", names.join(", ")));
    }
    match summary::measured_on(comparison) {
        Some(measured) => text.push_str(&format!(
            "Measured from the files, {}. KL is to the {} model, in nats a token; ± is the standard \
             error over tokens; *rounded* is the same grid without calibration.\n\n",
            escape(&measured),
            comparison.base_name()
        )),
        None => text.push_str("Not measured: the sweep's configuration asks for no evaluation.\n\n"),
    }
    if let Some(tasks) = tasks(comparison) {
        text.push_str(&format!("{tasks}\n"));
    }
    for fact in summary::provenance(comparison) {
        let values: Vec<String> = fact
            .values
            .iter()
            .map(|v| {
                let names: Vec<String> = v.branches.iter().map(|name| code(name)).collect();
                let whose = if names.is_empty() {
                    String::new()
                } else {
                    format!(" ({})", names.join(", "))
                };
                format!("{}{whose}", escape(&v.value))
            })
            .collect();
        text.push_str(&format!("- {}: {}\n", fact.what, values.join("; ")));
    }
    text
}

fn table(comparison: &Comparison<'_>) -> String {
    let to_base = format!("to {}", comparison.base_name());
    let mut header = vec![
        "branch",
        "bits",
        "group",
        "act-order",
        "size",
        "perplexity",
        "±",
        &to_base,
        "KL",
        "rounded",
        "rounded KL",
    ];
    if comparison.has_previous {
        header.extend(["perplexity since", "KL since", "size since"]);
    }
    let mut text = row(header.iter().map(|&h| h.to_owned()));
    text.push_str(&row(header
        .iter()
        .enumerate()
        .map(|(i, _)| if i == 0 { "---" } else { "---:" }.to_owned())));
    if let Some(base) = comparison.base_perplexity() {
        let mut cells = vec![String::new(); header.len()];
        cells[0] = comparison.base_name().to_owned();
        cells[1] = comparison.base_bits().to_owned();
        cells[5] = units::perplexity(base);
        text.push_str(&row(cells));
    }
    let unit = Unit::of(comparison.rows.iter().map(|row| row.branch.file_bytes));
    for branch in &comparison.rows {
        text.push_str(&row(cells(branch, unit)));
    }
    text
}

/// Results on tasks, a column each; `None` where no branch has any.
fn tasks(comparison: &Comparison<'_>) -> Option<String> {
    let table = TaskTable::of(comparison)?;
    let mut header = vec!["branch".to_owned()];
    header.extend(table.columns.iter().map(|name| escape(name)));
    let mut text = row(header);
    text.push_str(&row(
        (0..=table.columns.len()).map(|i| if i == 0 { "---" } else { "---:" }.to_owned())
    ));
    for (name, cells) in &table.rows {
        let name = cell_code(name);
        text.push_str(&row([name].into_iter().chain(cells.iter().cloned())));
    }
    text.push_str(&format!("\n{}\n", escape(&table.harnesses)));
    Some(text)
}

fn row(cells: impl IntoIterator<Item = String>) -> String {
    let cells: Vec<String> = cells.into_iter().collect();
    format!("| {} |\n", cells.join(" | "))
}

fn cells(row: &Row<'_>, unit: Unit) -> Vec<String> {
    let branch = row.branch;
    let number = |value: Option<f64>, text: fn(f64) -> String| value.map_or_else(String::new, text);
    let evaluation = row.evaluation;
    let mut cells = vec![
        cell_code(&branch.branch) + if row.contaminated() { " ⚠" } else { "" },
        branch.bits.to_string(),
        units::group(branch.group_size),
        units::yes_no(branch.act_order).to_owned(),
        unit.text(branch.file_bytes),
        number(evaluation.map(|e| e.perplexity), units::perplexity),
        number(evaluation.map(|e| e.perplexity * e.standard_error), |v| units::number(v, 2)),
        number(summary::loss(row), units::percent),
        number(row.kl(), units::kl),
        number(evaluation.and_then(|e| e.rtn).map(|m| m.perplexity), units::perplexity),
        number(evaluation.and_then(|e| e.rtn).map(|m| m.kl), units::kl),
    ];
    cells.extend(row.change.iter().flat_map(|change| changes(*change)));
    cells
}

/// Perplexity, KL and size since the previous report.
pub(crate) fn changes(change: Change) -> [String; 3] {
    match change {
        Change::New => ["new".to_owned(), String::new(), String::new()],
        Change::NotComparable => ["other text".to_owned(), String::new(), String::new()],
        Change::Compared { perplexity, relative_perplexity, kl, relative_kl, bytes } => [
            format!("{} ({})", units::signed(perplexity, 3), units::percent(relative_perplexity)),
            kl.zip(relative_kl).map_or_else(String::new, |(difference, relative)| {
                format!("{} ({})", units::signed(difference, 4), units::percent(relative))
            }),
            match bytes {
                0 => "same".to_owned(),
                _ => format!("{} B", units::signed(bytes as f64, 0)),
            },
        ],
    }
}

/// Text as it is: characters that Markdown gives a meaning are escaped.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    let mut before = ' ';
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let special = match c {
            '\\' | '`' | '*' | '<' | '>' | '[' | ']' | '|' | '&' | '~' | '$' => true,
            // Inside a word, as in `wikitext_2`, an underscore has no meaning.
            '_' => !(before.is_alphanumeric() && rest.peek().is_some_and(|n| n.is_alphanumeric())),
            '#' => before.is_whitespace(),
            _ => false,
        };
        if special {
            escaped.push('\\');
        }
        escaped.push(if c.is_control() { ' ' } else { c });
        before = c;
    }
    escaped
}

/// Text as code, whatever it holds.
pub(crate) fn code(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest + 1);
    let edge = text.starts_with('`') || text.ends_with('`');
    let pad = if edge || text.trim().is_empty() { " " } else { "" };
    format!("{fence}{pad}{text}{pad}{fence}")
}

/// Text as a block of code, whatever it holds.
pub(crate) fn fenced(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    let end = if text.ends_with('\n') { "" } else { "\n" };
    format!("{fence}\n{text}{end}{fence}")
}

/// Text as code in a cell of a table, where a bar ends the cell even in code.
pub(crate) fn cell_code(text: &str) -> String {
    code(text).replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use gptq_records::source_dtype::SourceDtype;

    use super::*;
    use crate::samples::{branch, report};

    #[test]
    fn a_report_is_a_table_with_its_provenance() {
        let report = report([
            branch("3bit-128g", 3, Some(128), 19.8, 0.08),
            branch("4bit-32g", 4, Some(32), 18.9, 0.012),
        ]);
        let text = markdown(&report, None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "# `org/model`: 2 branches");
        let table: Vec<&str> = lines.iter().copied().filter(|l| l.starts_with('|')).collect();
        assert_eq!(
            table[2..],
            [
                "| fp16 | 16 |  |  |  | 18.727 |  |  |  |  |  |",
                "| `4bit-32g` | 4 | 32 | yes | 5.25 MB | 18.900 | 0.38 | +0.9 % | 0.0120 | 25.200 | 0.0160 |",
                "| `3bit-128g` | 3 | 128 | yes | 3.31 MB | 19.800 | 0.40 | +5.7 % | 0.0800 | 26.400 | 0.1067 |",
            ]
        );
        assert!(text.contains("Calibration leaves 25 % less KL"), "{text}");
        assert!(text.contains("40 windows × 512 tokens, 20,440 scored, of heldout.txt"), "{text}");
        assert!(
            text.contains("- Calibration: 32 windows × 512 tokens of calibration.txt"),
            "{text}"
        );
        assert!(!text.contains("Warning"));
    }

    #[test]
    fn the_dense_model_is_named_after_its_weights() {
        let mut branch = branch("4bit-32g", 4, Some(32), 18.9, 0.012);
        branch.source_dtype = SourceDtype::Fp32;
        let text = markdown(&report([branch]), None);
        assert!(text.contains("\n| fp32 | 32 |  |  |  | 18.727 |"), "{text}");
        assert!(text.contains("| to fp32 |") && text.contains("KL is to the fp32 model"), "{text}");
        assert!(text.contains("\n- Source dtype: fp32\n"), "{text}");
        assert!(!text.contains("fp16"), "{text}");
    }

    #[test]
    fn changes_are_columns_and_lost_branches_are_named() {
        let before =
            report([branch("a", 4, Some(32), 20.0, 0.02), branch("b", 4, None, 20.0, 0.02)]);
        let after =
            report([branch("a", 4, Some(32), 19.0, 0.03), branch("c", 4, None, 20.0, 0.02)]);
        let text = markdown(&after, Some(&before));
        assert!(text.contains("| −1.000 (−5.0 %) | +0.0100 (+50.0 %) | same |"), "{text}");
        assert!(text.contains("| new |  |  |"), "{text}");
        assert!(text.contains("No longer there: `b`."), "{text}");
    }

    #[test]
    fn contamination_is_flagged_above_the_table_and_in_it() {
        let mut report =
            report([branch("a", 4, Some(32), 20.0, 0.02), branch("b", 4, None, 20.0, 0.02)]);
        report.branches[1].evaluations[0].contaminated = true;
        let text = markdown(&report, None);
        assert!(
            text.contains("> **Warning:** b was calibrated on the text measured here"),
            "{text}"
        );
        assert!(text.contains("| `b` ⚠ |") && text.contains("| `a` |"), "{text}");
    }

    #[test]
    fn names_are_text_wherever_they_stand() {
        assert_eq!(escape("a|b <i> *x* [l](u) `c`"), r"a\|b \<i\> \*x\* \[l\](u) \`c\`");
        assert_eq!(escape("gptq_4bit _x_ # y\nz"), r"gptq_4bit \_x\_ \# y z");
        assert_eq!(code("plain"), "`plain`");
        assert_eq!(code("a`b``c"), "```a`b``c```");
        assert_eq!(code("`"), "`` ` ``");
        assert_eq!(cell_code("a|b"), r"`a\|b`");
        let mut report = report([branch("a|b`c\n", 4, Some(32), 20.0, 0.02)]);
        report.branches[0].device = "<script>".to_owned();
        let text = markdown(&report, None);
        assert!(text.contains(r"| ``a\|b`c `` | 4 |"), "{text}");
        assert!(text.contains(r"- Device: \<script\>"), "{text}");
    }
}
