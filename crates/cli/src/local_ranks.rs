//! The devices that a command computes on: one, several of this host with a thread each, or those
//! of several processes.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use gptq_compute::{Device, Error, LossWatch, RankHandle, Ranks};

use crate::commands::gigabytes;
use crate::exit;
use crate::printer::Printer;

/// How long ranks have to end after one of them has failed. A rank that is stuck in a library by
/// then ends with the process.
const GRACE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(500);

/// This process's devices and their places among all ranks.
pub(crate) struct LocalRanks {
    devices: Vec<Device>,
    handles: Vec<RankHandle>,
}

type Outcome<R> = (usize, Result<R>);

impl LocalRanks {
    /// A device for each handle.
    pub(crate) fn new(devices: Vec<Device>, handles: Vec<RankHandle>) -> Self {
        Self { devices, handles }
    }

    /// The first device of this process.
    pub(crate) fn device(&self) -> &Device {
        &self.devices[0]
    }

    /// Number of ranks, those of other processes included.
    pub(crate) fn ranks(&self) -> usize {
        self.handles.first().map_or(1, RankHandle::size)
    }

    /// All devices' name for reports.
    pub(crate) fn name(&self) -> String {
        let name = self.device().name();
        match self.ranks() {
            1 => name,
            size => format!("{size} × {name}"),
        }
    }

    /// Says what cards of unequal memory mean for a run: each offloads what it cannot hold.
    pub(crate) fn note_unequal_memory(&self, printer: &Printer) -> Result<()> {
        let mut sizes = Vec::new();
        for device in &self.devices {
            sizes.extend(device.memory()?.map(|memory| memory.total as u64));
        }
        let (least, most) = (sizes.iter().min(), sizes.iter().max());
        if let (Some(&least), Some(&most)) = (least, most)
            && least + most / 50 < most
        {
            printer.note(&format!(
                "the GPUs have from {} to {} of memory: each keeps what fits, and the slowest sets \
                 the pace",
                gigabytes(least),
                gigabytes(most)
            ));
        }
        Ok(())
    }

    /// Runs `part` on every rank, each with its device; gives what rank 0's returns, or `None` where
    /// that is another process.
    ///
    /// # Errors
    /// That of the rank that failed first.
    pub(crate) fn run<R: Send>(
        self,
        part: impl Fn(&Device, &Ranks) -> Result<R> + Sync,
    ) -> Result<Option<R>> {
        let Self { devices, mut handles } = self;
        if let ([device], Some(handle)) =
            (devices.as_slice(), handles.pop_if(|handle| handle.size() == 1))
        {
            return handle.run(device, |ranks| part(device, ranks)).map(Some);
        }
        let Some(watch) = handles.first().map(RankHandle::watch) else { return Ok(None) };
        std::thread::scope(|scope| {
            let (done, outcomes) = channel();
            for (handle, device) in handles.into_iter().zip(&devices) {
                let (done, part) = (done.clone(), &part);
                scope.spawn(move || {
                    let rank = handle.rank();
                    // The other end waits for every rank.
                    let _ = done.send((rank, handle.run(device, |ranks| part(device, ranks))));
                });
            }
            drop(done);
            wait(&outcomes, &watch)
        })
    }
}

/// Waits for the ranks of this process, and says why the first of them failed.
fn wait<R>(outcomes: &Receiver<Outcome<R>>, watch: &LossWatch) -> Result<Option<R>> {
    let (mut first, mut failure, mut end) = (None, None::<anyhow::Error>, None);
    loop {
        match outcomes.recv_timeout(TICK) {
            Ok((0, Ok(result))) => first = Some(result),
            Ok((_, Ok(_))) => {}
            Ok((_, Err(error))) => {
                if failure.as_ref().is_none_or(is_consequence) {
                    failure = Some(error);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if watch.is_lost() => {
                if Instant::now() > *end.get_or_insert_with(|| Instant::now() + GRACE) {
                    give_up(failure);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(first),
    }
}

/// True for an error that only says that another rank has failed.
fn is_consequence(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<Error>(), Some(Error::RankLost { .. }))
}

/// Ends the process although some of its ranks do not.
fn give_up(failure: Option<anyhow::Error>) -> ! {
    let error = failure.unwrap_or_else(|| anyhow!(Error::RankLost { rank: None }));
    exit::report(&error);
    std::process::exit(1)
}
