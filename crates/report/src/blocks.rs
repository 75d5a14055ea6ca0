//! Where in the model the error is: a line for each branch over the blocks, and a map of every
//! linear for each branch.

use gptq_records::branch_report::{BlockRecord, BranchReport, LinearRecord, kind_of};
use serde::Serialize;

use crate::axis::{Axis, Tick, pixel};
use crate::scatter::Canvas;
use crate::units;

/// Distance of labels at the ends of lines.
const LABEL_GAP: f64 = 14.0;
/// Shades of a map; more could not be told apart.
const SHADES: usize = 12;
/// Pixels of a map: its linears' names are on the left.
const MAP_WIDTH: f64 = 300.0;
const MAP_LEFT: f64 = 38.0;
/// The same where there are experts, whose names are longer.
const MAP_LEFT_OF_EXPERTS: f64 = 84.0;
const MAP_ROW: f64 = 13.0;

/// Mean relative error of each block.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Lines {
    pub(crate) canvas: Canvas,
    pub(crate) x_ticks: Vec<Tick>,
    pub(crate) y_ticks: Vec<Tick>,
    pub(crate) log: bool,
    pub(crate) lines: Vec<Line>,
}

/// A branch's line.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    pub(crate) branch: usize,
    pub(crate) title: String,
    pub(crate) bits: u8,
    pub(crate) act_order: bool,
    pub(crate) path: String,
    /// The points, drawn as dots where there are few blocks.
    pub(crate) dots: Vec<(f64, f64)>,
    pub(crate) label: String,
    pub(crate) label_y: f64,
}

/// A branch to be drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) index: usize,
    pub(crate) label: &'a str,
    pub(crate) branch: &'a BranchReport,
}

impl Lines {
    /// Lays the chart out, higher than `canvas` where its labels need the room. `None` without a branch
    /// that was calibrated.
    pub(crate) fn new(canvas: Canvas, sources: &[Source<'_>]) -> Option<Self> {
        let labels = sources.len() as f64 * LABEL_GAP;
        let canvas =
            Canvas { height: canvas.height.max(canvas.top + labels + canvas.bottom), ..canvas };
        let means: Vec<Vec<(usize, f64)>> = sources
            .iter()
            .map(|s| s.branch.blocks.iter().filter_map(|b| Some((b.block, mean(b)?))).collect())
            .collect();
        let last = means.iter().flatten().map(|&(block, _)| block).max()?;
        let floor = canvas.height - canvas.bottom;
        let y = Axis::around(means.iter().flatten().map(|&(_, error)| error), floor, canvas.top)?;
        let right = canvas.width - canvas.right;
        let x = |block: usize| {
            let share = if last == 0 { 0.5 } else { block as f64 / last as f64 };
            pixel(canvas.left + 8.0 + share * (right - canvas.left - 16.0))
        };
        let mut lines: Vec<Line> = sources
            .iter()
            .zip(&means)
            .filter(|(_, means)| !means.is_empty())
            .map(|(source, means)| {
                let dots: Vec<(f64, f64)> = means.iter().map(|&(b, e)| (x(b), y.at(e))).collect();
                let branch = source.branch;
                Line {
                    branch: source.index,
                    title: format!("{}: {}", branch.branch, span(means)),
                    bits: branch.bits,
                    act_order: branch.act_order,
                    path: path(&dots),
                    label: source.label.to_owned(),
                    label_y: dots.last().map_or(0.0, |&(_, y)| y),
                    dots: if last < 48 { dots } else { Vec::new() },
                }
            })
            .collect();
        spread_labels(&mut lines, canvas.top + 4.0, floor);
        let step = last / ((canvas.width / 50.0) as usize).max(1) + 1;
        let x_ticks = (0..=last).step_by(step).map(|b| Tick { at: x(b), label: b.to_string() });
        Some(Self {
            canvas,
            x_ticks: x_ticks.collect(),
            y_ticks: y.ticks(5),
            log: y.is_log(),
            lines,
        })
    }
}

fn path(points: &[(f64, f64)]) -> String {
    let mut path = String::new();
    for (i, (x, y)) in points.iter().enumerate() {
        let step = if i == 0 { 'M' } else { 'L' };
        path.push_str(&format!("{step}{x} {y}"));
    }
    path
}

/// The mean of a block's linears, where they have an error.
fn mean(block: &BlockRecord) -> Option<f64> {
    let errors: Vec<f64> = block.linears.iter().filter_map(|l| l.relative_error).collect();
    (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64)
}

fn span(means: &[(usize, f64)]) -> String {
    let worst = means.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let mean = means.iter().map(|m| m.1).sum::<f64>() / means.len() as f64;
    worst.map_or_else(String::new, |(block, error)| {
        format!("{} in the mean, {} in block {block}", share(mean), share(*error))
    })
}

/// An error as a share of the output's energy.
pub(crate) fn share(error: f64) -> String {
    match 100.0 * error {
        p if p >= 9.95 => format!("{} %", units::number(p, 0)),
        p if p >= 0.995 => format!("{p:.1} %"),
        p if p >= 0.0995 => format!("{p:.2} %"),
        p => format!("{p:.3} %"),
    }
}

/// Moves the labels at the right apart, keeping their order.
fn spread_labels(lines: &mut [Line], top: f64, bottom: f64) {
    let mut order: Vec<usize> = (0..lines.len()).collect();
    order.sort_by(|&a, &b| lines[a].label_y.total_cmp(&lines[b].label_y));
    let mut next = top;
    for &i in &order {
        lines[i].label_y = lines[i].label_y.max(next);
        next = lines[i].label_y + LABEL_GAP;
    }
    let mut limit = bottom;
    for &i in order.iter().rev() {
        lines[i].label_y = pixel(lines[i].label_y.min(limit));
        limit = lines[i].label_y - LABEL_GAP;
    }
}

/// Errors of a branch's linears, one map a branch on one scale of shades.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Map {
    pub(crate) branch: usize,
    pub(crate) name: String,
    pub(crate) bits: u8,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) rows: Vec<MapRow>,
    /// Cells of each shade, from the lightest, as one path each.
    pub(crate) shades: Vec<Shade>,
    pub(crate) ticks: Vec<Tick>,
    /// The worst linear, as a frame around its cell and in words.
    pub(crate) worst: Option<Worst>,
}

/// A linear's row; all experts' linears of one kind have one.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MapRow {
    pub(crate) y: f64,
    pub(crate) name: String,
    pub(crate) title: String,
}

/// Cells of one shade.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Shade {
    pub(crate) opacity: f64,
    pub(crate) path: String,
}

/// The linear with the largest error.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Worst {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) width: f64,
    pub(crate) text: String,
}

/// Maps of all branches, and the errors of the lightest and the darkest shade.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Maps {
    pub(crate) maps: Vec<Map>,
    pub(crate) lightest: String,
    pub(crate) darkest: String,
    pub(crate) row: f64,
    pub(crate) left: f64,
}

impl Maps {
    /// Lays the maps out. `None` without a branch that was calibrated.
    pub(crate) fn new(sources: &[Source<'_>]) -> Option<Self> {
        let cells: Vec<Vec<Vec<Cell<'_>>>> = sources
            .iter()
            .map(|source| source.branch.blocks.iter().map(Cell::of_block).collect())
            .collect();
        let all = || cells.iter().flatten().flatten();
        let errors = all().filter_map(|cell| cell.mean).filter(|&e| e > 0.0);
        let (low, high) = errors.fold((f64::INFINITY, 0.0_f64), |(l, h), e| (l.min(e), h.max(e)));
        if low > high {
            return None;
        }
        let shade = |error: f64| {
            let span = high.ln() - low.ln();
            let share = if span > 0.0 { (error.max(low).ln() - low.ln()) / span } else { 1.0 };
            ((share * SHADES as f64) as usize).min(SHADES - 1)
        };
        let calibrated = |s: &&Source<'_>| s.branch.blocks.iter().any(|b| mean(b).is_some());
        let left = if all().any(|c| c.linears > 1) { MAP_LEFT_OF_EXPERTS } else { MAP_LEFT };
        let shown = sources.iter().zip(&cells).filter(|(source, _)| calibrated(source));
        let maps = shown.map(|(source, cells)| map(source, cells, left, &shade)).collect();
        let (lightest, darkest) = (share(low), share(high));
        Some(Self { maps, lightest, darkest, row: MAP_ROW, left })
    }
}

/// Opacities of all shades, for the legend.
pub(crate) fn shades() -> Vec<f64> {
    (0..SHADES).map(opacity).collect()
}

fn opacity(shade: usize) -> f64 {
    let share = shade as f64 / (SHADES - 1) as f64;
    ((0.07 + 0.93 * share) * 100.0).round() / 100.0
}

/// The linears of a block that share a row.
struct Cell<'a> {
    kind: String,
    linears: usize,
    /// Mean of their errors, where they have one.
    mean: Option<f64>,
    /// The largest and whose it is.
    worst: Option<(f64, &'a str)>,
}

impl<'a> Cell<'a> {
    fn of_block(block: &'a BlockRecord) -> Vec<Self> {
        let mut kinds: Vec<(String, Vec<&LinearRecord>)> = Vec::new();
        for linear in &block.linears {
            let kind = linear.kind();
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, linears)) => linears.push(linear),
                None => kinds.push((kind, vec![linear])),
            }
        }
        kinds.into_iter().map(|(kind, linears)| Self::new(kind, &linears)).collect()
    }

    fn new(kind: String, linears: &[&'a LinearRecord]) -> Self {
        let errors = || linears.iter().filter_map(|l| Some((l.relative_error?, l.name.as_str())));
        let count = errors().count();
        let mean = errors().map(|(error, _)| error).sum::<f64>() / count as f64;
        Self {
            kind,
            linears: linears.len(),
            mean: (count > 0).then_some(mean),
            worst: errors().max_by(|a, b| a.0.total_cmp(&b.0)),
        }
    }
}

fn map(
    source: &Source<'_>,
    cells: &[Vec<Cell<'_>>],
    left: f64,
    shade: &dyn Fn(f64) -> usize,
) -> Map {
    let branch = source.branch;
    let blocks = &branch.blocks;
    // Blocks with and without experts have others.
    let mut names: Vec<&str> = Vec::new();
    for cell in cells.iter().flatten() {
        if !names.contains(&cell.kind.as_str()) {
            names.push(&cell.kind);
        }
    }
    let cell = (MAP_WIDTH - left) / blocks.len().max(1) as f64;
    // A hair of overlap would show as a darker line, a gap as a lighter one: cells meet on tenths.
    let x = |column: usize| pixel(left + column as f64 * cell);
    let mut paths = vec![String::new(); SHADES];
    let mut rows: Vec<MapRow> = Vec::new();
    let mut worst: Option<(f64, Worst)> = None;
    for (row, &name) in names.iter().enumerate() {
        let y = pixel(row as f64 * MAP_ROW);
        let mut least = f64::INFINITY;
        let mut most = (0.0_f64, 0);
        for (column, (block, cells)) in blocks.iter().zip(cells).enumerate() {
            let cell = cells.iter().find(|cell| cell.kind == name);
            let Some((error, (most_of_all, whose))) = cell.and_then(|c| c.mean.zip(c.worst)) else {
                continue;
            };
            least = least.min(error);
            if error >= most.0 {
                most = (error, block.block);
            }
            let width = pixel(x(column + 1) - x(column));
            paths[shade(error)]
                .push_str(&format!("M{} {y}h{width}v{MAP_ROW}h-{width}z", x(column)));
            if worst.as_ref().is_none_or(|(known, _)| most_of_all > *known) {
                let (name, error) = (linear_name(whose), share(most_of_all));
                let text = format!("worst: {name} of block {}, {error}", block.block);
                worst = Some((most_of_all, Worst { x: x(column), y, width, text }));
            }
        }
        let title = match least.is_finite() {
            true => {
                format!("{name}: {} to {}, most in block {}", share(least), share(most.0), most.1)
            }
            false => format!("{name}: not calibrated"),
        };
        rows.push(MapRow { y, name: name.to_owned(), title });
    }
    let step = blocks.len().div_ceil(6).max(1);
    let middle = |column: usize| pixel(left + (column as f64 + 0.5) * cell);
    let ticks = blocks.iter().enumerate().step_by(step);
    let shades = paths.into_iter().enumerate().filter(|(_, path)| !path.is_empty());
    Map {
        branch: source.index,
        name: branch.branch.clone(),
        bits: branch.bits,
        width: MAP_WIDTH,
        height: pixel(names.len() as f64 * MAP_ROW),
        rows,
        shades: shades.map(|(i, path)| Shade { opacity: opacity(i), path }).collect(),
        ticks: ticks.map(|(i, b)| Tick { at: middle(i), label: b.block.to_string() }).collect(),
        worst: worst.map(|(_, worst)| worst),
    }
}

/// `q` of `model.layers.3.self_attn.q_proj`, `gate of expert 17` of `model.layers.3.mlp.experts.17.gate_proj`.
fn linear_name(prefix: &str) -> String {
    let kind = kind_of(prefix);
    match kind.strip_prefix("experts.") {
        Some(last) => {
            format!("{last} of expert {}", prefix.rsplit('.').nth(1).unwrap_or_default())
        }
        None => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::branch;

    const CANVAS: Canvas = Canvas {
        class: "wide",
        width: 600.0,
        height: 300.0,
        left: 50.0,
        right: 80.0,
        top: 10.0,
        bottom: 40.0,
    };

    #[test]
    fn labels_at_the_ends_of_lines_keep_apart_and_in_order() {
        // More than have room in the canvas make it higher.
        for (count, height) in [(9, CANVAS.height), (27, 10.0 + 27.0 * LABEL_GAP + 40.0)] {
            let branches: Vec<BranchReport> = (0..count)
                .map(|i| branch(&format!("b{i}"), 4, Some(32), 19.0, 0.02 + 1e-5 * f64::from(i)))
                .collect();
            let sources: Vec<Source<'_>> = branches
                .iter()
                .enumerate()
                .map(|(index, branch)| Source { index, label: &branch.branch, branch })
                .collect();
            let chart = Lines::new(CANVAS, &sources).unwrap();
            let ys: Vec<f64> = chart.lines.iter().map(|l| l.label_y).collect();
            // Larger errors stand higher.
            assert!(ys.windows(2).all(|pair| pair[0] - pair[1] >= LABEL_GAP - 0.2), "{ys:?}");
            assert!(
                ys.iter().all(|&y| (CANVAS.top..=height - CANVAS.bottom).contains(&y)),
                "{ys:?}"
            );
            assert_eq!((chart.canvas.height, chart.x_ticks.len()), (height, 2));
        }
    }

    #[test]
    fn a_map_has_a_cell_for_every_linear_and_frames_the_worst() {
        let one = branch("one", 4, Some(32), 19.0, 0.01);
        let source = Source { index: 0, label: "32g", branch: &one };
        let maps = Maps::new(&[source]).unwrap();
        let cells: usize = maps.maps[0].shades.iter().map(|s| s.path.matches('z').count()).sum();
        assert_eq!(cells, 4);
        let names: Vec<&str> = maps.maps[0].rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["q", "down"]);
        assert_eq!((maps.lightest.as_str(), maps.darkest.as_str()), ("1.0 %", "3.0 %"));
        assert_eq!(maps.maps[0].worst.as_ref().unwrap().text, "worst: down of block 0, 3.0 %");
        assert_eq!(maps.maps[0].shades.last().unwrap().opacity, 1.0);
    }

    #[test]
    fn experts_share_a_row_and_the_worst_is_named() {
        let mut one = branch("one", 4, Some(32), 19.0, 0.01);
        for block in &mut one.blocks {
            let of = |expert: usize, error: f64| LinearRecord {
                name: format!("model.layers.{}.mlp.experts.{expert}.up_proj", block.block),
                relative_error: Some(error),
                ..LinearRecord::default()
            };
            let experts: Vec<_> =
                (0..60).map(|e| of(e, if e == 7 { 0.08 } else { 0.02 })).collect();
            block.linears.extend(experts);
        }
        let source = Source { index: 0, label: "32g", branch: &one };
        let maps = Maps::new(&[source]).unwrap();
        let names: Vec<&str> = maps.maps[0].rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["q", "down", "experts.up"]);
        let cells: usize = maps.maps[0].shades.iter().map(|s| s.path.matches('z').count()).sum();
        assert_eq!((cells, maps.left), (6, MAP_LEFT_OF_EXPERTS));
        let worst = &maps.maps[0].worst.as_ref().unwrap().text;
        assert_eq!(worst, "worst: up of expert 7 of block 0, 8.0 %");
        // 59 of 2 % and one of 8 %.
        assert!(maps.maps[0].rows[2].title.starts_with("experts.up: 2.1 % to 2.1 %"));
    }

    #[test]
    fn a_recipe_without_calibration_has_no_errors_to_show() {
        let mut rounded = branch("rtn", 4, Some(32), 19.0, 0.01);
        for linear in rounded.blocks.iter_mut().flat_map(|b| &mut b.linears) {
            linear.relative_error = None;
        }
        let source = Source { index: 0, label: "32g", branch: &rounded };
        assert!(Lines::new(CANVAS, &[source]).is_none());
        assert!(Maps::new(&[source]).is_none());
    }
}
