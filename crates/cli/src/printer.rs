//! Everything that is not a result: progress bars, block lines, warnings. All on stderr.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gptq_pipeline::progress::{BlockReport, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::plain::plain;
use crate::terminal::{is_dumb, painted, width};

/// Prints progress as bars on a terminal and as lines elsewhere. Clones draw the same bars.
#[derive(Clone)]
pub(crate) struct Printer {
    quiet: bool,
    bars: bool,
    phase: Arc<Mutex<Option<Phase>>>,
}

struct Phase {
    name: String,
    bar: ProgressBar,
    start: Instant,
    last_line: Instant,
    done: usize,
    steps: usize,
    /// What a step is.
    unit: &'static str,
    /// Blocks done of each of several branches.
    branches: BTreeMap<String, usize>,
}

/// How a bar looks.
fn template(unit: &str) -> String {
    // What does not fit into a line is broken into several, of which only the last is drawn over.
    match width(&std::io::stderr()) {
        Some(columns) if columns < 72 => "{prefix} {pos}/{len}, {eta} left".to_owned(),
        _ => format!(
            "{{prefix:>12}} {{wide_bar}} {unit} {{pos}}/{{len}}  {{elapsed}} elapsed, {{eta}} left"
        ),
    }
}

/// Between two lines about steps that have nothing to say of themselves.
const QUIET_TIME: Duration = Duration::from_secs(5);

impl Phase {
    fn count(&mut self) {
        self.done += 1;
        self.bar.inc(1);
    }

    /// Shows how far each of several branches is, on a line of its own.
    fn show(&mut self, branch: &str, block: usize) {
        if self.branches.is_empty()
            && let Ok(style) =
                ProgressStyle::with_template(&format!("{}\n{{wide_msg}}", template(self.unit)))
        {
            self.bar.set_style(style);
        }
        self.branches.insert(branch.to_owned(), block);
        let each = self.branches.iter().map(|(branch, block)| format!("{branch} {block}"));
        self.bar.set_message(plain(&each.collect::<Vec<_>>().join("  ")).into_owned());
    }

    /// Counts a step; without bars, now and then a line says how far it is.
    fn step(&mut self, bars: bool) -> Option<String> {
        self.count();
        if bars || self.done == self.steps || self.last_line.elapsed() < QUIET_TIME {
            return None;
        }
        self.last_line = Instant::now();
        let elapsed = self.start.elapsed().as_secs_f64();
        let left = elapsed / self.done as f64 * self.steps.saturating_sub(self.done) as f64;
        let (name, unit, done, steps) = (&self.name, self.unit, self.done, self.steps);
        Some(format!("{name}: {unit} {done}/{steps}  {elapsed:.0} s, {left:.0} s left"))
    }
}

impl Printer {
    /// `quiet` leaves only warnings and errors; `no_progress` replaces bars by lines.
    pub(crate) fn new(quiet: bool, no_progress: bool) -> Self {
        // A bar is drawn over the one before.
        let bars = !quiet && !no_progress && std::io::stderr().is_terminal() && !is_dumb();
        Self { quiet, bars, phase: Arc::new(Mutex::new(None)) }
    }

    /// Whether progress is shown as bars.
    #[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "transfers alone ask"))]
    pub(crate) fn shows_bars(&self) -> bool {
        self.bars
    }

    /// A line about what is being done.
    pub(crate) fn note(&self, message: &str) {
        if !self.quiet {
            self.line(message);
        }
    }

    /// A line of a terminal that is written over, for what another program says of itself; nothing is
    /// shown elsewhere.
    pub(crate) fn status(&self, name: &str) -> Status {
        let bar = match self.bars {
            true => ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{prefix:>12} {spinner} {wide_msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_owned());
        if self.bars {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Status(bar)
    }

    /// Begins a phase of so many steps, each of them a `unit`.
    fn begin_phase(&self, phase: &str, steps: usize, unit: &'static str) {
        let target =
            if self.bars { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        if let Ok(style) = ProgressStyle::with_template(&template(unit)) {
            bar.set_style(style);
        }
        bar.set_prefix(phase.to_owned());
        if self.bars {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let (name, start) = (phase.to_owned(), Instant::now());
        let branches = BTreeMap::new();
        *self.phase() =
            Some(Phase { name, bar, start, last_line: start, done: 0, steps, unit, branches });
    }

    fn line(&self, message: &str) {
        let phase = self.phase();
        match phase.as_ref() {
            Some(phase) if self.bars => phase.bar.suspend(|| write_stderr(message)),
            _ => write_stderr(message),
        }
    }

    fn phase(&self) -> std::sync::MutexGuard<'_, Option<Phase>> {
        // A panic while drawing must not hide the error that a poisoned lock would.
        self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What [`Printer::status`] shows, gone when dropped.
pub(crate) struct Status(ProgressBar);

impl Status {
    /// Shows a text until the next one, or until the status is gone.
    pub(crate) fn shows(&self) -> impl Fn(&str) + Send + use<> {
        let bar = self.0.clone();
        move |text| bar.set_message(plain(text).into_owned())
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Writes a line; a closed stderr is nobody's concern.
pub(crate) fn write_stderr(message: &str) {
    let _ = writeln!(std::io::stderr(), "{}", painted(plain(message)));
}

impl Progress for Printer {
    fn begin(&self, phase: &str, steps: usize) {
        self.begin_phase(phase, steps, "block");
    }

    fn begin_steps(&self, phase: &str, steps: usize) {
        self.begin_phase(phase, steps, "step");
    }

    fn step(&self) {
        // A statement of its own: the phase is free again before the line is printed.
        let line = self.phase().as_mut().and_then(|phase| phase.step(self.bars));
        if let Some(line) = line {
            self.note(&line);
        }
    }

    fn block(&self, report: &BlockReport) {
        if let Some(phase) = self.phase().as_mut() {
            phase.count();
        }
        if self.bars {
            return;
        }
        let steps = self.phase().as_ref().map_or(0, |p| p.steps);
        self.note(&block_line(report, steps));
    }

    fn block_of(&self, branch: &str, report: &BlockReport, blocks: usize) {
        if let Some(phase) = self.phase().as_mut() {
            phase.count();
            phase.show(branch, report.block + 1);
        }
        if !self.bars {
            self.note(&format!("{branch}: {}", block_line(report, blocks)));
        }
    }

    fn end(&self) {
        let Some(phase) = self.phase().take() else { return };
        phase.bar.finish_and_clear();
        self.note(&format!(
            "{}: {} {}s in {:.1} s",
            phase.name,
            phase.done,
            phase.unit,
            phase.start.elapsed().as_secs_f64()
        ));
    }

    fn note(&self, message: &str) {
        Self::note(self, message);
    }

    fn warn(&self, message: &str) {
        self.line(&format!("warning: {message}"));
    }
}

/// What is printed of a block of so many.
fn block_line(report: &BlockReport, blocks: usize) -> String {
    let error = match report.mean_error() {
        Some(error) => format!("  relative error {error:.3e}"),
        // Its linears were calibrated, but none has outputs to be relative to.
        None if report.linears.iter().any(|l| l.damp.is_some()) => "  relative error –".to_owned(),
        None => String::new(),
    };
    format!("block {}/{blocks}{error}  {:.2} s", report.block + 1, report.seconds)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// A step that is said must not wait for itself: evaluations of more than a few seconds hung.
    #[test]
    fn a_step_that_takes_long_is_announced() {
        let printer = Printer::new(false, true);
        printer.begin("evaluate", 3);
        if let Some(phase) = printer.phase().as_mut() {
            phase.last_line -= 2 * QUIET_TIME;
        }
        let (done, finished) = channel();
        let stepping = printer.clone();
        std::thread::spawn(move || {
            stepping.step();
            done.send(()).ok();
        });
        finished.recv_timeout(Duration::from_secs(60)).expect("the step ends");
        printer.end();
    }
}
