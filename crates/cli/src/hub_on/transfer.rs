//! Progress of downloads and uploads: a bar on a terminal, a line now and then elsewhere.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gptq_hub::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::commands::table::size;
use crate::plain::plain_word;
use crate::printer::Printer;

/// Between two lines where there is no bar.
const QUIET_TIME: Duration = Duration::from_secs(30);

const TEMPLATE: &str = "{prefix} {wide_bar} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}, {eta} left";

/// Shows one transfer after the other.
pub(crate) struct Transfer {
    printer: Printer,
    running: Mutex<Option<Running>>,
}

struct Running {
    name: String,
    bar: ProgressBar,
    start: Instant,
    last_line: Instant,
    at_start: u64,
    total: u64,
}

impl Transfer {
    pub(crate) fn new(printer: Printer) -> Self {
        Self { printer, running: Mutex::new(None) }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Transfer {
    fn begin(&self, action: &str, total: u64, done: u64) {
        let bars = self.printer.shows_bars();
        let target = if bars { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        bar.set_prefix(plain_word(action).into_owned());
        bar.set_position(done);
        // What was there before says nothing about the speed.
        bar.reset_eta();
        if bars {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let (start, name) = (Instant::now(), action.to_owned());
        *self.running() =
            Some(Running { name, bar, start, last_line: start, at_start: done, total });
    }

    fn position(&self, done: u64) {
        let mut running = self.running();
        let Some(running) = running.as_mut() else { return };
        running.bar.set_position(done);
        if !self.printer.shows_bars() && running.last_line.elapsed() > QUIET_TIME {
            running.last_line = Instant::now();
            self.printer.note(&running.line(done));
        }
    }

    fn file(&self, name: &str, bytes: u64) {
        if !self.printer.shows_bars() {
            self.printer.note(&format!("{name}  {}", size(bytes)));
        }
    }

    fn note(&self, message: &str) {
        match self.running().as_ref() {
            Some(running) => running.bar.suspend(|| self.printer.note(message)),
            None => self.printer.note(message),
        }
    }

    fn end(&self) {
        if let Some(running) = self.running().take() {
            running.bar.finish_and_clear();
        }
    }
}

impl Running {
    fn line(&self, done: u64) -> String {
        let speed = done.saturating_sub(self.at_start) as f64 / self.start.elapsed().as_secs_f64();
        let left = self.total.saturating_sub(done) as f64 / speed;
        let left = if left.is_finite() {
            format!("{:.0} min left", left / 60.0)
        } else {
            "stalled".to_owned()
        };
        let (name, done, total) = (&self.name, size(done), size(self.total));
        format!("{name}: {done} of {total}, {}/s, {left}", size(speed as u64))
    }
}
