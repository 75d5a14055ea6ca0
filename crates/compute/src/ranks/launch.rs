//! What a launcher says to the processes of a run.

use std::io;
use std::time::Duration;

use crate::error::Error;

/// What each process learns from the launcher that started it.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Number of this process.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Host of rank 0.
    pub host: String,
    /// Port on which rank 0 listens.
    pub port: u16,
    /// What the launcher calls this run; the same for all of its ranks. Without one, rank 0 draws an
    /// id that ranks of the same host and user find.
    pub run_id: Option<String>,
    /// How long to wait for the others.
    pub patience: Duration,
}

impl Launch {
    /// Largest number of processes: more than any cluster would share a model among, and few enough
    /// that rank 0 can have threads for each.
    pub const MOST_RANKS: usize = 4096;

    /// Where rank 0 listens, as people write it.
    #[must_use]
    pub fn meeting_place(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// The error of a connection that fails.
    pub(super) fn trouble(&self, peer: usize, error: &io::Error) -> Error {
        let (rank, place) = (self.rank, self.meeting_place());
        Error::ranks(format!("Rank {rank} cannot talk to rank {peer} through {place}: {error}"))
    }
}
