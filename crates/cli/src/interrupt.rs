//! Ctrl-C, or any signal that asks for the end, as a wish to end what is being made, where a command
//! asks for that.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// Knows whether Ctrl-C was pressed, or another signal has come. Pressed while nothing is being made, or once more, it ends the
/// process as ever.
pub(crate) struct Interrupt {
    pressed: Arc<AtomicBool>,
    /// Whether the next one ends the process.
    ends: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens from now on; until [`Self::begin`], Ctrl-C ends the process.
    pub(crate) fn listen() -> Result<Self> {
        Self::listen_to(&[SIGINT])
    }

    /// The same for all signals by which a person, a service manager or a terminal that goes away asks
    /// for the end.
    pub(crate) fn listen_to_the_end() -> Result<Self> {
        let hangup = (!hangup_is_ignored()).then_some(SIGHUP);
        let signals: Vec<_> = [SIGINT, SIGTERM].into_iter().chain(hangup).collect();
        Self::listen_to(&signals)
    }

    fn listen_to(signals: &[c_int]) -> Result<Self> {
        let (pressed, ends) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        for &signal in signals {
            // In this order: the one that ends the process sees what was set before this press.
            flag::register_conditional_default(signal, Arc::clone(&ends))?;
            flag::register(signal, Arc::clone(&ends))?;
            flag::register(signal, Arc::clone(&pressed))?;
        }
        Ok(Self { pressed, ends })
    }

    /// Something is being made from now on, which the first Ctrl-C ends.
    pub(crate) fn begin(&self) {
        self.pressed.store(false, Ordering::Relaxed);
        self.ends.store(false, Ordering::Relaxed);
    }

    /// Nothing is being made any more; whether it was ended by Ctrl-C.
    pub(crate) fn end(&self) -> bool {
        self.ends.store(true, Ordering::Relaxed);
        self.is_pressed()
    }

    /// Ends the process as Ctrl-C does, with all that was made in its place: a script that the command
    /// stands in ends, too.
    pub(crate) fn end_process() -> Result<()> {
        Ok(signal_hook::low_level::emulate_default_handler(SIGINT)?)
    }

    /// Set when Ctrl-C is pressed, for those who look for themselves.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.pressed)
    }

    /// Whether Ctrl-C was pressed since it began.
    pub(crate) fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }
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
