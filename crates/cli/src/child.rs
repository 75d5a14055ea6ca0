//! Programs that a command starts and that do not outlive it.

use std::io::{BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::interrupt::Interrupt;

/// How long a program may take to end when it is told to.
const GRACE: Duration = Duration::from_secs(3);
/// Between two looks at what may have happened.
const TICK: Duration = Duration::from_millis(50);
/// What is said once a signal has come.
pub(crate) const INTERRUPTED: &str =
    "Interrupted: the programs that were started are ended, and nothing was kept";
/// Bytes of a line that are kept.
const MOST_LINE: usize = 2000;

/// A running program with all that it starts itself, ended when dropped.
pub(crate) struct Running {
    child: Child,
    ended: bool,
    /// A second signal to this process, for which the program's time to end is over.
    hurry: Arc<AtomicBool>,
}

impl Running {
    /// Starts a program in a process group of its own: Ctrl-C reaches it through this process alone,
    /// and what ends it ends what it has started.
    pub(crate) fn start(command: &mut Command, interrupt: &Interrupt) -> std::io::Result<Self> {
        let child = command.process_group(0).spawn()?;
        Ok(Self { child, ended: false, hurry: interrupt.again() })
    }

    /// The program, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for its end, or for a signal to this process, which is an error. What it leaves behind
    /// ends with it.
    pub(crate) fn wait(&mut self, interrupt: &Interrupt) -> Result<ExitStatus> {
        while !self.has_ended()? {
            pause(interrupt)?;
        }
        Ok(self.end_group()?)
    }

    /// Whether the program has ended, which is not taken note of yet: until then its number stays the
    /// group's, and nobody else's.
    fn has_ended(&self) -> std::io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(Pid::from_child(&self.child)), options)?.is_some())
    }

    /// Ends all of the group and takes note of the program's end.
    fn end_group(&mut self) -> std::io::Result<ExitStatus> {
        self.signal_all(Signal::KILL);
        self.ended = true;
        self.child.wait()
    }

    fn signal_all(&self, signal: Signal) {
        // One that has just ended needs no signal.
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.signal_all(Signal::TERM);
        let start = Instant::now();
        while start.elapsed() < GRACE && !self.hurry.load(Ordering::Relaxed) {
            if !matches!(self.has_ended(), Ok(false)) {
                break;
            }
            std::thread::sleep(TICK);
        }
        // What it has started may be slower than it is.
        let _ = self.end_group();
    }
}

/// Waits a moment; an error once a signal has come.
pub(crate) fn pause(interrupt: &Interrupt) -> Result<()> {
    if interrupt.was_pressed() {
        bail!(INTERRUPTED);
    }
    std::thread::sleep(TICK);
    Ok(())
}

/// Reads what a program says, a line at a time, and keeps the last.
pub(crate) struct LastLine {
    last: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl LastLine {
    /// Reads on in a thread; `show` hears of each line.
    pub(crate) fn of(
        pipe: impl Read + Send + 'static,
        show: impl Fn(&str) + Send + 'static,
    ) -> Self {
        let last = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&last);
        let reader = std::thread::spawn(move || {
            each_line(pipe, |line| {
                show(line);
                line.clone_into(&mut kept.lock().unwrap_or_else(PoisonError::into_inner));
            });
        });
        Self { last, reader }
    }

    /// The last line that said something, once the program has ended. What it has left behind may still
    /// hold the pipe, which is not waited for.
    pub(crate) fn get(self) -> String {
        let start = Instant::now();
        while !self.reader.is_finished() && start.elapsed() < GRACE {
            std::thread::sleep(TICK / 10);
        }
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Hands on every line that is not blank. A progress bar ends its lines with a carriage return.
fn each_line(pipe: impl Read, mut take: impl FnMut(&str)) {
    let mut line = Vec::new();
    let mut end = |line: &mut Vec<u8>| {
        let text = String::from_utf8_lossy(line);
        if !text.trim().is_empty() {
            take(text.trim());
        }
        line.clear();
    };
    for byte in BufReader::new(pipe).bytes().map_while(Result::ok) {
        match byte {
            b'\r' | b'\n' => end(&mut line),
            _ if line.len() < MOST_LINE => line.push(byte),
            _ => {}
        }
    }
    end(&mut line);
}

#[cfg(test)]
mod tests {
    use std::process::{ChildStdout, Stdio};

    use super::*;

    #[test]
    fn lines_end_as_programs_end_them() {
        let mut lines = Vec::new();
        let said = b"10%|#\r50%|##\r\n\n  \nTraceback\nValueError: no task\xff";
        each_line(&said[..], |line| lines.push(line.to_owned()));
        assert_eq!(lines, ["10%|#", "50%|##", "Traceback", "ValueError: no task\u{fffd}"]);
        let endless = std::io::repeat(b'x').take(1 << 20);
        each_line(endless, |line| assert_eq!(line.len(), MOST_LINE));
    }

    /// A script that runs, and its stdout.
    fn shell(script: &str) -> (Running, ChildStdout, Interrupt) {
        let interrupt = Interrupt::listen_to_the_end().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped());
        let mut running = Running::start(&mut command, &interrupt).unwrap();
        let pipe = running.child().stdout.take().unwrap();
        (running, pipe, interrupt)
    }

    #[test]
    fn what_is_dropped_ends_with_all_that_it_started() {
        // Two that ignore the polite request, of which the second holds the pipe as well.
        let (running, mut pipe, _interrupt) = shell("trap '' TERM; sleep 100 & echo ready; wait");
        let mut ready = [0; 6];
        pipe.read_exact(&mut ready).unwrap();
        let start = Instant::now();
        drop(running);
        assert_eq!(pipe.read(&mut ready).unwrap(), 0);
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn what_a_program_leaves_behind_ends_when_it_does() {
        let (mut running, mut pipe, interrupt) = shell("sleep 100 & exit 7");
        assert_eq!(running.wait(&interrupt).unwrap().code(), Some(7));
        // The one that was left held the pipe.
        let start = Instant::now();
        assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_second_signal_shortens_the_time_to_end() {
        let (running, mut pipe, interrupt) =
            shell("trap '' TERM; echo ready; while :; do sleep 1; done");
        pipe.read_exact(&mut [0; 6]).unwrap();
        interrupt.again().store(true, Ordering::Relaxed);
        let start = Instant::now();
        drop(running);
        assert!(start.elapsed() < GRACE / 2);
    }
}
