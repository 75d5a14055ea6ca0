//! Ctrl-C, or any signal that asks for the end, as a wish to end what is being made, where a command
//! asks for that.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// Knows whether Ctrl-C was pressed, or another signal has come. Pressed while nothing is being made,
/// it ends the process as ever.
pub(crate) struct Interrupt {
    pressed: Arc<AtomicBool>,
    /// Set by every press, and taken back by those who wait for the next.
    again: Arc<AtomicBool>,
    /// The signal that came.
    signal: Arc<AtomicUsize>,
    /// Whether the next one ends the process.
    ends: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens from now on; until [`Self::begin`], Ctrl-C ends the process, and so it does when it is
    /// pressed once more.
    pub(crate) fn listen() -> Result<Self> {
        Self::listen_to(&[SIGINT], true)
    }

    /// The same for all signals by which a person, a service manager or a terminal that goes away asks
    /// for the end. A second one does not end the process, which has others to end: a terminal that
    /// closes sends two in a moment.
    pub(crate) fn listen_to_the_end() -> Result<Self> {
        let hangup = (!hangup_is_ignored()).then_some(SIGHUP);
        let signals: Vec<_> = [SIGINT, SIGTERM, SIGQUIT].into_iter().chain(hangup).collect();
        Self::listen_to(&signals, false)
    }

    fn listen_to(signals: &[c_int], second_ends: bool) -> Result<Self> {
        let flag = |set| Arc::new(AtomicBool::new(set));
        let interrupt = Self {
            pressed: flag(false),
            again: flag(false),
            signal: Arc::new(AtomicUsize::new(SIGINT.unsigned_abs() as usize)),
            ends: flag(true),
        };
        for &signal in signals {
            // In this order: the one that ends the process sees what was set before this press.
            flag::register_conditional_default(signal, Arc::clone(&interrupt.ends))?;
            if second_ends {
                flag::register(signal, Arc::clone(&interrupt.ends))?;
            }
            let number = signal.unsigned_abs() as usize;
            flag::register_usize(signal, Arc::clone(&interrupt.signal), number)?;
            flag::register(signal, Arc::clone(&interrupt.again))?;
            flag::register(signal, Arc::clone(&interrupt.pressed))?;
        }
        Ok(interrupt)
    }

    /// Something is being made from now on, which the first Ctrl-C ends.
    pub(crate) fn begin(&self) {
        self.pressed.store(false, Ordering::Relaxed);
        self.ends.store(false, Ordering::Relaxed);
    }

    /// Nothing is being made any more; whether it was ended by Ctrl-C.
    pub(crate) fn end(&self) -> bool {
        // In this order a signal that comes now is either seen or ends the process.
        self.ends.store(true, Ordering::SeqCst);
        self.pressed.load(Ordering::SeqCst)
    }

    /// Ends the process as the signal that came does, with all that was made in its place: a script
    /// that the command stands in ends, too.
    pub(crate) fn end_process(&self) -> Result<()> {
        let signal = c_int::try_from(self.signal.load(Ordering::Relaxed)).unwrap_or(SIGINT);
        Ok(signal_hook::low_level::emulate_default_handler(signal)?)
    }

    /// Set when Ctrl-C is pressed, for those who look for themselves.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.pressed)
    }

    /// Whether Ctrl-C was pressed since it began.
    pub(crate) fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }

    /// Whether it was, which from now on is the first time.
    pub(crate) fn was_pressed(&self) -> bool {
        self.is_pressed() && {
            self.again.store(false, Ordering::Relaxed);
            true
        }
    }

    /// Set when it is pressed once more than somebody has seen.
    pub(crate) fn again(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.again)
    }
}

/// A file that becomes longer than `ulimit -f` allows is an error of the write, as a full disk is, and
/// no end of the process, which would leave what it was writing.
pub(crate) fn outlive_limits() {
    // Without it the process ends as it would have.
    let _ = flag::register(SIGXFSZ, Arc::default());
}

/// Whether this process was started to outlive its terminal, as nohup starts one.
pub(crate) fn hangup_is_ignored() -> bool {
    // Linux says which signals are ignored, SIGHUP by the lowest bit. Elsewhere it is taken to count.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (SIGHUP - 1) & 1 == 1)
}
