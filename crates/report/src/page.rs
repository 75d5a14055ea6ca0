//! The report as one HTML page that needs nothing else: styles, charts and script are inside.
//!
//! Geometry is computed here and in the chart modules; the templates turn it into markup and escape
//! every text on the way.

use gptq_records::branch_report::TOOL;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, context};
use serde::Serialize;

use crate::blocks::{Lines, Maps, Source};
use crate::collect::Report;
use crate::compare::{Change, Comparison, Row, comparisons};
use crate::error::{Error, Result};
use crate::scatter::{Canvas, Dot, Scatter};
use crate::task_table::TaskTable;
use crate::units::{self, Unit};
use crate::{markdown, summary};

const PAGE: &str = include_str!("../templates/report.html");
const CHARTS: &str = include_str!("../templates/charts.html");
const STYLE: &str = include_str!("../templates/report.css");
const SCRIPT: &str = include_str!("../templates/report.js");

/// The two charts side by side, one below the other on tablets and paper, and on a phone.
const HALF: [Canvas; 3] = [
    Canvas {
        class: "wide",
        width: 540.0,
        height: 380.0,
        left: 54.0,
        right: 18.0,
        top: 32.0,
        bottom: 46.0,
    },
    Canvas {
        class: "medium",
        width: 720.0,
        height: 400.0,
        left: 58.0,
        right: 24.0,
        top: 32.0,
        bottom: 46.0,
    },
    Canvas {
        class: "narrow",
        width: 350.0,
        height: 340.0,
        left: 46.0,
        right: 10.0,
        top: 32.0,
        bottom: 46.0,
    },
];
/// A chart over the whole width, with labels at its right.
const FULL: [Canvas; 3] = [
    Canvas {
        class: "wide",
        width: 1100.0,
        height: 340.0,
        left: 54.0,
        right: 90.0,
        top: 32.0,
        bottom: 46.0,
    },
    Canvas {
        class: "medium",
        width: 720.0,
        height: 340.0,
        left: 58.0,
        right: 90.0,
        top: 32.0,
        bottom: 46.0,
    },
    Canvas {
        class: "narrow",
        width: 350.0,
        height: 320.0,
        left: 46.0,
        right: 66.0,
        top: 32.0,
        bottom: 46.0,
    },
];

/// A model on a text.
#[derive(Serialize)]
struct Section<'a> {
    model: &'a str,
    measured: Option<String>,
    warnings: Vec<String>,
    tasks: Option<TaskTable>,
    tiles: Vec<Tile>,
    charts: Vec<Chart>,
    legend: Vec<u8>,
    any_in_order: bool,
    any_rounded: bool,
    lines: Vec<Lines>,
    maps: Option<Maps>,
    shades: Vec<f64>,
    base_name: &'static str,
    base_bits: &'static str,
    base: Option<String>,
    rows: Vec<RowView<'a>>,
    has_previous: bool,
    gone: &'a [&'a str],
    facts: Vec<summary::Fact>,
}

/// A number that stands out.
#[derive(Serialize)]
struct Tile {
    label: String,
    value: String,
    note: String,
}

/// One measure against size, for each width of screen.
#[derive(Serialize)]
struct Chart {
    title: String,
    measure: &'static str,
    unit: &'static str,
    base_name: &'static str,
    base: Option<String>,
    drawn: Vec<Scatter>,
}

/// A branch's measure, and that of the same grid rounded to nearest.
type Measure = (f64, Option<f64>);

/// A branch in the page's table.
#[derive(Serialize)]
struct RowView<'a> {
    index: usize,
    name: &'a str,
    bits: u8,
    group: String,
    act_order: bool,
    size: String,
    perplexity: String,
    error: String,
    loss: String,
    kl: String,
    rounded_perplexity: String,
    rounded_kl: String,
    /// Lengths of the bars of KL and of the rounded grid's, in percent of the cell.
    bar: Option<f64>,
    rounded_bar: Option<f64>,
    contaminated: bool,
    title: String,
    changes: Vec<ChangeView>,
}

/// A cell that compares with the previous report.
#[derive(Serialize)]
struct ChangeView {
    text: String,
    title: String,
    /// `better`, `worse`, or nothing.
    tone: &'static str,
}

/// Renders the page; with the changes since `previous`.
///
/// # Errors
/// [`Error::Template`], which is a fault of this program.
pub fn page(report: &Report, previous: Option<&Report>) -> Result<String> {
    let comparisons = comparisons(report, previous);
    let sections: Vec<Section<'_>> = comparisons.iter().map(section).collect();
    render(&sections).map_err(|source| Error::Template { name: "report.html", source })
}

fn render(sections: &[Section<'_>]) -> std::result::Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_template("charts.html", CHARTS)?;
    environment.add_template("report.html", PAGE)?;
    let page = environment.get_template("report.html")?;
    page.render(
        context! { sections => Serde(sections), tool => TOOL, style => STYLE, script => SCRIPT },
    )
}

fn section<'a>(comparison: &'a Comparison<'a>) -> Section<'a> {
    let unit = Unit::of(comparison.rows.iter().map(|row| row.branch.file_bytes));
    let labels = labels(comparison);
    let titles: Vec<String> = comparison.rows.iter().map(|row| title(row, unit)).collect();
    let sources: Vec<Source<'_>> = comparison
        .rows
        .iter()
        .zip(&labels)
        .map(|(row, label)| Source { index: row.index, label, branch: row.branch })
        .collect();
    let mut legend: Vec<u8> = comparison.rows.iter().map(|row| row.branch.bits).collect();
    legend.dedup();
    // A rounded grid may be worse by orders of magnitude: its tick stays at the end of the bar.
    let longest = 1.4 * comparison.rows.iter().filter_map(Row::kl).fold(0.0, f64::max);
    let rows =
        comparison.rows.iter().zip(&titles).map(|(row, title)| row_view(row, title, unit, longest));
    Section {
        model: comparison.model,
        measured: summary::measured_on(comparison),
        warnings: summary::warnings(comparison),
        tasks: TaskTable::of(comparison),
        tiles: tiles(comparison, unit),
        charts: charts(comparison, &labels, &titles, unit),
        legend,
        any_in_order: comparison.rows.iter().any(|row| !row.branch.act_order),
        any_rounded: comparison
            .rows
            .iter()
            .any(|row| row.evaluation.is_some_and(|e| e.rtn.is_some())),
        lines: FULL.into_iter().filter_map(|canvas| Lines::new(canvas, &sources)).collect(),
        maps: Maps::new(&sources),
        shades: crate::blocks::shades(),
        base_name: comparison.base_name(),
        base_bits: comparison.base_bits(),
        base: comparison.base_perplexity().map(units::perplexity),
        rows: rows.collect(),
        has_previous: comparison.has_previous,
        gone: &comparison.gone,
        facts: summary::provenance(comparison),
    }
}

/// Names beside the marks: short ones, unless two marks that look the same would share one.
fn labels(comparison: &Comparison<'_>) -> Vec<String> {
    let several = comparison.several_recipes();
    let look = |row: &Row<'_>| {
        (row.branch.bits, row.branch.act_order, units::short_label(row.branch, several))
    };
    let looks: Vec<_> = comparison.rows.iter().map(look).collect();
    let unique = looks.iter().all(|one| looks.iter().filter(|other| *other == one).count() == 1);
    let name = |row: &Row<'_>| row.branch.branch.clone();
    if unique {
        looks.into_iter().map(|l| l.2).collect()
    } else {
        comparison.rows.iter().map(name).collect()
    }
}

fn title(row: &Row<'_>, unit: Unit) -> String {
    let mut parts = vec![unit.text(row.branch.file_bytes)];
    if let Some(evaluation) = row.evaluation {
        let loss =
            summary::loss(row).map_or_else(String::new, |l| format!(" ({})", units::percent(l)));
        parts.push(format!("perplexity {}{loss}", units::perplexity(evaluation.perplexity)));
        parts.extend(evaluation.kl.map(|kl| format!("KL {}", units::kl(kl))));
        if let Some(rounded) = evaluation.rtn {
            parts.push(format!(
                "rounded to nearest {} and {}",
                units::perplexity(rounded.perplexity),
                units::kl(rounded.kl)
            ));
        }
    }
    format!("{}: {}", row.branch.branch, parts.join(", "))
}

fn tiles(comparison: &Comparison<'_>, unit: Unit) -> Vec<Tile> {
    let mut tiles = Vec::new();
    if let Some(base) = comparison.base_perplexity() {
        let note = "perplexity of the model that the branches are made from".to_owned();
        tiles.push(Tile {
            label: comparison.base_name().to_owned(),
            value: units::perplexity(base),
            note,
        });
    }
    if let Some(row) = summary::closest(comparison) {
        let loss = summary::loss(row).map(|l| format!("perplexity {}", units::percent(l)));
        let value = match (row.kl(), &loss) {
            (Some(kl), _) => format!("KL {}", units::kl(kl)),
            (None, Some(loss)) => loss.clone(),
            (None, None) => {
                row.evaluation.map_or_else(String::new, |e| units::perplexity(e.perplexity))
            }
        };
        let mut note = vec![row.branch.branch.clone(), unit.text(row.branch.file_bytes)];
        note.extend(loss.filter(|_| row.kl().is_some()));
        let label = format!("Closest to {}", comparison.base_name());
        tiles.push(Tile { label, value, note: note.join(", ") });
    }
    if let Some(row) = summary::smallest(comparison) {
        let mut note = vec![row.branch.branch.clone()];
        note.extend(row.kl().map(|kl| format!("KL {}", units::kl(kl))));
        note.extend(summary::loss(row).map(|l| format!("perplexity {}", units::percent(l))));
        let value = unit.text(row.branch.file_bytes);
        tiles.push(Tile { label: "Smallest".to_owned(), value, note: note.join(", ") });
    }
    if let Some(gain) = summary::gain_over_rounding(comparison) {
        tiles.push(Tile {
            label: "Gain of calibration".to_owned(),
            value: format!("{} KL", units::signed(-100.0 * gain, 0) + " %"),
            note: "against rounding the same grids to nearest, in the mean of the branches"
                .to_owned(),
        });
    }
    tiles
}

fn charts(
    comparison: &Comparison<'_>,
    labels: &[String],
    titles: &[String],
    unit: Unit,
) -> Vec<Chart> {
    let dots = |measure: fn(&Row<'_>) -> Option<Measure>| -> Vec<Dot> {
        let rows = comparison.rows.iter().zip(labels).zip(titles);
        rows.filter_map(|((row, label), title)| {
            let (y, rounded) = measure(row)?;
            Some(Dot {
                branch: row.index,
                label: label.clone(),
                title: title.clone(),
                bits: row.branch.bits,
                act_order: row.branch.act_order,
                x: unit.value(row.branch.file_bytes),
                y,
                rounded,
            })
        })
        .collect()
    };
    let kl = dots(|row| Some((row.kl()?, row.evaluation?.rtn.map(|m| m.kl))));
    let perplexity =
        dots(|row| Some((row.evaluation?.perplexity, row.evaluation?.rtn.map(|m| m.perplexity))));
    let (base_name, base) = (comparison.base_name(), comparison.base_perplexity());
    let drawn = |dots: &[Dot], base| -> Vec<Scatter> {
        HALF.into_iter().filter_map(|canvas| Scatter::new(canvas, dots, base)).collect()
    };
    let charts = [
        Chart {
            title: format!("Distance from {base_name}"),
            measure: "KL, nats a token",
            unit: unit.name,
            base_name,
            base: None,
            drawn: drawn(&kl, None),
        },
        Chart {
            title: "Perplexity".to_owned(),
            measure: "perplexity",
            unit: unit.name,
            base_name,
            base: base.map(units::perplexity),
            drawn: drawn(&perplexity, base),
        },
    ];
    charts.into_iter().filter(|chart| !chart.drawn.is_empty()).collect()
}

fn row_view<'a>(row: &Row<'a>, title: &str, unit: Unit, longest: f64) -> RowView<'a> {
    let branch = row.branch;
    let text = |value: Option<f64>, text: fn(f64) -> String| value.map_or_else(String::new, text);
    let rounded = row.evaluation.and_then(|e| e.rtn);
    let share =
        |kl: f64| (longest > 0.0).then(|| crate::axis::pixel(100.0 * (kl.max(0.0) / longest)));
    RowView {
        index: row.index,
        name: &branch.branch,
        bits: branch.bits,
        group: units::group(branch.group_size),
        act_order: branch.act_order,
        size: unit.text(branch.file_bytes),
        perplexity: text(row.evaluation.map(|e| e.perplexity), units::perplexity),
        error: text(row.evaluation.map(|e| e.perplexity * e.standard_error), |v| {
            units::number(v, 2)
        }),
        loss: text(summary::loss(row), units::percent),
        kl: text(row.kl(), units::kl),
        rounded_perplexity: text(rounded.map(|m| m.perplexity), units::perplexity),
        rounded_kl: text(rounded.map(|m| m.kl), units::kl),
        bar: row.kl().and_then(share),
        rounded_bar: rounded.and_then(|m| share(m.kl)),
        contaminated: row.contaminated(),
        title: title.to_owned(),
        changes: row.change.map_or_else(Vec::new, change_views),
    }
}

/// Relative changes; the tooltip has them in full.
fn change_views(change: Change) -> Vec<ChangeView> {
    // By the text, so that what rounds to nothing has no color.
    let tone = |text: &str| match text.chars().next() {
        Some('−') => "better",
        Some('+') => "worse",
        _ => "",
    };
    let [perplexity_title, kl_title, bytes_text] = markdown::changes(change);
    let Change::Compared { relative_perplexity, relative_kl, .. } = change else {
        let empty = || ChangeView { text: String::new(), title: String::new(), tone: "" };
        return vec![ChangeView { text: perplexity_title, ..empty() }, empty(), empty()];
    };
    let kl = relative_kl.unwrap_or(0.0);
    let size = ChangeView { tone: tone(&bytes_text), text: bytes_text, title: String::new() };
    let relative = |value: f64, title: String| {
        let text = if title.is_empty() { String::new() } else { units::percent(value) };
        ChangeView { tone: tone(&text), text, title }
    };
    vec![relative(relative_perplexity, perplexity_title), relative(kl, kl_title), size]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{branch, report};

    fn nine() -> Report {
        report([
            branch("4bit-32g-act", 4, Some(32), 18.921, 0.0118),
            branch("4bit-none-act", 4, None, 19.002, 0.0206),
            branch("3bit-128g-act", 3, Some(128), 19.742, 0.0829),
        ])
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let page = page(&nine(), None).unwrap();
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("default-src 'none'"));
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    }

    #[test]
    fn names_are_text_wherever_they_stand() {
        let mut report = nine();
        let evil = "\"><script>alert('x')</script>&{{ 1 }}";
        report.branches[0].branch = evil.to_owned();
        report.branches[0].damp_retries = 1;
        for branch in &mut report.branches {
            branch.model = evil.to_owned();
            branch.device = evil.to_owned();
            branch.evaluations[0].dataset.name = evil.to_owned();
        }
        report.branches[0].blocks[0].linears[0].name = format!("model.{evil}");
        let page = page(&report, Some(&nine())).unwrap();
        assert!(!page.contains("<script>alert"));
        assert!(
            page.contains("&lt;script&gt;alert(&#x27;x&#x27;)&lt;&#x2f;script&gt;&amp;{{ 1 }}")
        );
        assert_eq!(page.matches("<script>").count(), 1);
    }

    #[test]
    fn a_contaminated_text_is_flagged() {
        let mut report = nine();
        assert!(!page(&report, None).unwrap().contains("optimistic"));
        report.branches[1].evaluations[0].contaminated = true;
        let page = page(&report, None).unwrap();
        assert!(page.contains("4bit-none-act was calibrated on the text measured here"));
        assert_eq!(page.matches("class=\"flag\"").count(), 1);
    }

    #[test]
    fn the_dense_model_is_named_after_its_weights() {
        let mut report = nine();
        for branch in &mut report.branches {
            branch.source_dtype = gptq_records::source_dtype::SourceDtype::Fp32;
        }
        let page = page(&report, None).unwrap();
        assert!(page.contains("<th scope=\"row\">fp32</th><td>32</td>"));
        assert!(page.contains("Distance from fp32") && page.contains(">to fp32</th>"));
        // The class of its line in the charts is a name of no weights.
        assert!(!page.contains("fp16"), "fp16 is named");
    }

    #[test]
    fn marks_with_one_look_are_labeled_by_name() {
        let report =
            report([branch("a", 4, Some(32), 18.9, 0.01), branch("b", 4, Some(32), 18.8, 0.02)]);
        assert_eq!(labels(&comparisons(&report, None)[0]), ["a", "b"]);
        let mut nine = nine();
        assert_eq!(labels(&comparisons(&nine, None)[0]), ["32g", "no groups", "128g"]);
        nine.branches[2].recipe = "best".to_owned();
        assert_eq!(labels(&comparisons(&nine, None)[0])[2], "128g best");
    }

    #[test]
    fn what_was_not_measured_is_shown_without_charts() {
        let mut report = nine();
        for branch in &mut report.branches {
            branch.evaluations.clear();
        }
        let page = page(&report, None).unwrap();
        assert!(page.contains("not measured") && !page.contains("Distance from fp16"));
        assert!(page.contains("4bit-32g-act"));
    }
}
