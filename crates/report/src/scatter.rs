//! A chart of one measure against size: a mark for each branch, one for its rounded grid, the dense
//! model as a line, and labels that keep clear of each other.

use serde::Serialize;

use crate::axis::{Axis, Tick, pixel};

/// Width of a character of a label, as a fraction of its height; generous for digits.
const CHARACTER: f64 = 0.58;
/// Height of a label's text in pixels: the stylesheet's.
const TEXT: f64 = 12.0;
/// Radius of a mark, with its outline.
const MARK: f64 = 6.0;
/// The rounded grids may stretch the axis by this factor of what the branches span; those beyond
/// are drawn at the edge.
const STRETCH: f64 = 1.6;

/// Pixels of a chart: drawn once for wide screens, once for narrow ones.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Canvas {
    pub(crate) class: &'static str,
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
}

/// A branch to be drawn.
#[derive(Clone, Debug)]
pub(crate) struct Dot {
    /// Number of the branch on the page, which ties its marks together.
    pub(crate) branch: usize,
    /// Short name beside the mark.
    pub(crate) label: String,
    /// All of it, for the tooltip.
    pub(crate) title: String,
    pub(crate) bits: u8,
    pub(crate) act_order: bool,
    /// Size in the unit of the axis.
    pub(crate) x: f64,
    /// The measure.
    pub(crate) y: f64,
    /// The measure of the same grid rounded to nearest.
    pub(crate) rounded: Option<f64>,
}

/// What the template draws.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Scatter {
    pub(crate) canvas: Canvas,
    pub(crate) x_ticks: Vec<Tick>,
    pub(crate) y_ticks: Vec<Tick>,
    /// True when the measure's axis is logarithmic.
    pub(crate) log: bool,
    /// Height of the dense model's line.
    pub(crate) reference: Option<f64>,
    /// Path over the branches that no other one beats in both size and measure.
    pub(crate) frontier: String,
    pub(crate) marks: Vec<Mark>,
}

/// A branch at its place.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Mark {
    pub(crate) branch: usize,
    pub(crate) title: String,
    pub(crate) bits: u8,
    pub(crate) act_order: bool,
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) rounded: Option<RoundedMark>,
    pub(crate) label: Label,
}

/// The rounded grid above its branch.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RoundedMark {
    pub(crate) y: f64,
    /// True when the value lies beyond the axis.
    pub(crate) beyond: bool,
}

/// Text at its place.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Label {
    pub(crate) text: String,
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) anchor: &'static str,
}

impl Scatter {
    /// Lays the chart out; `reference` is the dense model's measure, where it has one. `None` when
    /// there is nothing to draw.
    pub(crate) fn new(canvas: Canvas, dots: &[Dot], reference: Option<f64>) -> Option<Self> {
        let right = canvas.width - canvas.right;
        let floor = canvas.height - canvas.bottom;
        let x = Axis::around(dots.iter().map(|d| d.x), canvas.left, right)?;
        let measured = dots.iter().map(|d| d.y).chain(reference);
        let y = Axis::around(measured.clone(), floor, canvas.top)?;
        let limit = y.reach(STRETCH);
        let kept = dots.iter().filter_map(|d| d.rounded).filter(|&r| r <= limit);
        let y = Axis::around(measured.chain(kept), floor, canvas.top)?;
        let mut marks: Vec<Mark> = dots.iter().map(|dot| mark(dot, &x, &y, canvas)).collect();
        place_labels(&mut marks, canvas);
        Some(Self {
            canvas,
            x_ticks: x.ticks((canvas.width / 80.0) as usize),
            y_ticks: y.ticks(5),
            log: y.is_log(),
            reference: reference.map(|r| y.at(r)),
            frontier: frontier(&marks),
            marks,
        })
    }
}

fn mark(dot: &Dot, x: &Axis, y: &Axis, canvas: Canvas) -> Mark {
    let rounded = dot.rounded.filter(|r| r.is_finite()).map(|value| {
        let beyond = !y.holds(value);
        RoundedMark { y: if beyond { canvas.top + MARK } else { y.at(value) }, beyond }
    });
    Mark {
        branch: dot.branch,
        title: dot.title.clone(),
        bits: dot.bits,
        act_order: dot.act_order,
        x: x.at(dot.x),
        y: y.at(dot.y),
        rounded,
        label: Label { text: dot.label.clone(), x: 0.0, y: 0.0, anchor: "start" },
    }
}

/// A line over the marks that no other mark beats in both directions, from the smallest file on.
fn frontier(marks: &[Mark]) -> String {
    let mut order: Vec<&Mark> = marks.iter().collect();
    // Down the page is a lower measure.
    order.sort_by(|a, b| a.x.total_cmp(&b.x).then(b.y.total_cmp(&a.y)));
    let mut path = String::new();
    let mut lowest = f64::NEG_INFINITY;
    for mark in order {
        if mark.y > lowest {
            let step = if path.is_empty() { 'M' } else { 'L' };
            path.push_str(&format!("{step}{} {}", mark.x, mark.y));
            lowest = mark.y;
        }
    }
    path
}

/// A rectangle by its corners.
#[derive(Clone, Copy)]
struct Area {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Area {
    fn around(x: f64, y: f64, radius: f64) -> Self {
        Self { left: x - radius, top: y - radius, right: x + radius, bottom: y + radius }
    }

    fn overlap(&self, other: &Self) -> f64 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0.0) * height.max(0.0)
    }

    /// How much of it lies outside `other`.
    fn outside(&self, other: &Self) -> f64 {
        (self.right - self.left) * (self.bottom - self.top) - self.overlap(other)
    }
}

/// Gives each label the place around its mark that covers least of what is drawn already.
fn place_labels(marks: &mut [Mark], canvas: Canvas) {
    let frame = Area {
        left: canvas.left,
        top: 0.0,
        right: canvas.width,
        bottom: canvas.height - canvas.bottom,
    };
    let mut taken: Vec<Area> = Vec::new();
    for mark in marks.iter() {
        taken.push(Area::around(mark.x, mark.y, MARK));
        taken.extend(mark.rounded.iter().map(|r| Area::around(mark.x, r.y, MARK)));
    }
    for mark in marks.iter_mut() {
        let width = mark.label.text.chars().count() as f64 * CHARACTER * TEXT;
        let mut best: Option<(f64, Label, Area)> = None;
        for (dx, dy, anchor) in PLACES {
            let (x, y) = (mark.x + dx, mark.y + dy);
            let left = match anchor {
                "start" => x,
                "end" => x - width,
                _ => x - width / 2.0,
            };
            let area =
                Area { left, top: y - 0.8 * TEXT, right: left + width, bottom: y + 0.2 * TEXT };
            let covered: f64 = taken.iter().map(|other| area.overlap(other)).sum();
            let cost = covered + 4.0 * area.outside(&frame);
            if best.as_ref().is_none_or(|(least, ..)| cost < *least) {
                let text = mark.label.text.clone();
                best = Some((cost, Label { text, x: pixel(x), y: pixel(y), anchor }, area));
            }
        }
        if let Some((_, label, area)) = best {
            mark.label = label;
            taken.push(area);
        }
    }
}

/// Offsets of a label from its mark and the end of the text that is put there, best first.
const PLACES: [(f64, f64, &str); 8] = [
    (10.0, 4.0, "start"),
    (-10.0, 4.0, "end"),
    (0.0, 19.0, "middle"),
    (8.0, 16.0, "start"),
    (-8.0, 16.0, "end"),
    (8.0, -9.0, "start"),
    (-8.0, -9.0, "end"),
    (0.0, -11.0, "middle"),
];

#[cfg(test)]
mod tests {
    use super::*;

    const CANVAS: Canvas = Canvas {
        class: "wide",
        width: 560.0,
        height: 360.0,
        left: 50.0,
        right: 20.0,
        top: 10.0,
        bottom: 40.0,
    };

    fn dot(branch: usize, x: f64, y: f64, rounded: f64) -> Dot {
        Dot {
            branch,
            label: format!("branch {branch}"),
            title: String::new(),
            bits: 4,
            act_order: true,
            x,
            y,
            rounded: Some(rounded),
        }
    }

    #[test]
    fn the_frontier_leaves_out_branches_that_another_one_beats() {
        let dots = [
            dot(0, 1.0, 30.0, 31.0),
            dot(1, 2.0, 22.0, 25.0),
            dot(2, 2.0, 23.0, 25.0),
            dot(3, 3.0, 24.0, 25.0),
        ];
        let chart = Scatter::new(CANVAS, &dots, Some(20.0)).unwrap();
        let place = |i: usize| format!("{} {}", chart.marks[i].x, chart.marks[i].y);
        assert_eq!(chart.frontier, format!("M{}L{}", place(0), place(1)));
        // The dense model lies below all branches.
        assert!(chart.marks.iter().all(|m| m.y < chart.reference.unwrap()));
    }

    #[test]
    fn labels_of_branches_side_by_side_do_not_overlap() {
        // Two pairs of one size and nearly one value, as act-order on and off.
        let dots = [
            dot(0, 2.66, 0.0829, 0.1081),
            dot(1, 2.66, 0.0845, 0.1081),
            dot(2, 3.16, 0.0164, 0.0222),
            dot(3, 3.16, 0.0168, 0.0222),
        ];
        let chart = Scatter::new(CANVAS, &dots, None).unwrap();
        let areas: Vec<Area> = chart
            .marks
            .iter()
            .map(|m| {
                let width = m.label.text.len() as f64 * CHARACTER * TEXT;
                let left = match m.label.anchor {
                    "start" => m.label.x,
                    "end" => m.label.x - width,
                    _ => m.label.x - width / 2.0,
                };
                Area {
                    left,
                    top: m.label.y - 0.8 * TEXT,
                    right: left + width,
                    bottom: m.label.y + 0.2 * TEXT,
                }
            })
            .collect();
        for (i, area) in areas.iter().enumerate() {
            assert!(area.left >= 0.0 && area.right <= CANVAS.width);
            for other in &areas[i + 1..] {
                assert!(area.overlap(other) < 1.0, "{:?}", chart.marks);
            }
        }
    }

    #[test]
    fn a_rounded_grid_far_off_is_marked_at_the_edge() {
        let dots = [dot(0, 1.0, 22.0, 9000.0), dot(1, 2.0, 21.0, 21.5)];
        let chart = Scatter::new(CANVAS, &dots, Some(20.0)).unwrap();
        let rounded: Vec<&RoundedMark> =
            chart.marks.iter().filter_map(|m| m.rounded.as_ref()).collect();
        assert!(rounded[0].beyond && !rounded[1].beyond);
        assert!(rounded.iter().all(|r| r.y > 0.0 && r.y < CANVAS.height));
        // The branches still use most of the height.
        assert!(chart.reference.unwrap() - chart.marks[0].y > 100.0);
    }
}
