//! Several ranks that share a run: threads with a card each, or processes on one or several hosts.
//!
//! Every rank takes the same steps over its own share of the windows. What they must agree on goes
//! through [`Ranks`]: Grams are added up, rows of solved weights gathered, and words brought to
//! rank 0, which alone writes and prints. Words travel between rank 0 and each other rank, by
//! channels between threads and by TCP between processes; cards add and gather by NCCL, and CPU
//! tensors travel as words and are added in rank order. All ranks hold the same bits afterwards, so
//! what each decides from them is the same.
//!
//! That holds if all were started alike, so the ranks compare first what their parts depend on: see
//! [`Agreement`].
//!
//! Every operation here is one of all ranks: each calls it, in the same order. A rank that fails
//! raises the [`Abort`] flag, which ends the waiting of all others.

mod abort;
mod agreement;
mod calling;
pub mod frames;
pub mod greeting;
mod launch;
mod meeting;
mod run_id;
mod sockets;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};

use ndarray::{Array2, Axis, concatenate};

use crate::Device;
use crate::cuda::nccl::{self, Communicator};
use crate::error::{Error, Result, ensure_shape};
use crate::lock::lock;
use crate::share::share;
use crate::tensor::{Storage, Tensor};

use abort::{Abort, TICK};
pub use agreement::Agreement;
use frames::{Limit, Message};
pub use launch::Launch;

/// What a rank may send at once whatever the work is: what it has alike with the others, losses of a
/// stage and the like.
const LEAST_WORDS: u64 = 1 << 13;

/// The way between two ranks, one of which is rank 0.
struct Wire {
    out: Sender<Message>,
    inward: Mutex<Receiver<Message>>,
}

/// A rank's place in a run that has not begun.
pub struct RankHandle {
    rank: usize,
    size: usize,
    /// By peer: rank 0 has a wire to each other rank, and those one to rank 0.
    wires: BTreeMap<usize, Wire>,
    abort: Arc<Abort>,
    /// Of messages from other processes; threads of one believe each other.
    limit: Option<Arc<Limit>>,
    sockets: Option<sockets::Pumps>,
    strangers: Option<String>,
}

/// Tells from outside of a run whether it still has all its ranks.
#[derive(Clone)]
pub struct LossWatch(Arc<Abort>);

impl LossWatch {
    /// True when a rank of the run is lost; looks at the cards, too.
    pub fn is_lost(&self) -> bool {
        self.0.look_at_cards();
        self.0.lost().is_some()
    }
}

/// One rank's hold on the others. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Ranks(Option<Arc<Inner>>);

struct Inner {
    rank: usize,
    size: usize,
    wires: BTreeMap<usize, Wire>,
    abort: Arc<Abort>,
    limit: Option<Arc<Limit>>,
    card: Option<Arc<Communicator>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.size)
    }
}

impl RankHandle {
    /// The only handle of a run without others.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            size: 1,
            wires: BTreeMap::new(),
            abort: Arc::default(),
            limit: None,
            sockets: None,
            strangers: None,
        }
    }

    /// Handles for `size` threads of this process, in rank order.
    pub fn threads(size: usize) -> Vec<Self> {
        let abort = Arc::<Abort>::default();
        let handle = |rank| Self {
            rank,
            size,
            wires: BTreeMap::new(),
            abort: Arc::clone(&abort),
            limit: None,
            sockets: None,
            strangers: None,
        };
        let mut handles: Vec<Self> = (0..size).map(handle).collect();
        for peer in 1..size {
            let ((down, from_first), (up, from_peer)) = (channel(), channel());
            handles[0].wires.insert(peer, Wire { out: down, inward: Mutex::new(from_peer) });
            handles[peer].wires.insert(0, Wire { out: up, inward: Mutex::new(from_first) });
        }
        handles
    }

    /// The place of this process among those that a launcher has started; waits for all of them.
    ///
    /// # Errors
    /// [`Error::Ranks`] when they do not find each other within the launch's patience.
    pub fn join(launch: &Launch) -> Result<Self> {
        Self::join_announcing(launch, &|_| {})
    }

    /// As [`Self::join`]; rank 0 says once for whom it waits, when that takes more than a few
    /// seconds.
    ///
    /// # Errors
    /// As [`Self::join`].
    pub fn join_announcing(launch: &Launch, announce: &dyn Fn(&str)) -> Result<Self> {
        sockets::join(launch, announce)
    }

    /// Number of this rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Who called rank 0 and was turned away, if anybody was.
    pub fn strangers(&self) -> Option<&str> {
        self.strangers.as_deref()
    }

    /// A look at the run from outside.
    pub fn watch(&self) -> LossWatch {
        LossWatch(Arc::clone(&self.abort))
    }

    /// Runs this rank's part on `device`, and returns when all ranks are through with theirs.
    ///
    /// # Errors
    /// The part's own, which raises the abort flag for all others; [`Error::RankLost`] when another
    /// rank's was first. A panic raises it too.
    pub fn run<R, E: From<Error>>(
        mut self,
        device: &Device,
        part: impl FnOnce(&Ranks) -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        if self.size == 1 {
            return part(&Ranks::alone());
        }
        // Closed after the abort flag, if there is one, so that the peers hear of it.
        let _sockets = self.sockets.take();
        let guard = Guard { rank: self.rank, abort: Arc::clone(&self.abort), passed: false };
        let outcome = self.joined(device, part);
        guard.end(outcome)
    }

    fn joined<R, E: From<Error>>(
        self,
        device: &Device,
        part: impl FnOnce(&Ranks) -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        let ranks = Ranks::new(self, device)?;
        let outcome = part(&ranks)?;
        device.synchronize("the end of the run")?;
        ranks.exchange(Vec::new())?;
        Ok(outcome)
    }
}

/// Raises the abort flag unless the run was passed through.
struct Guard {
    rank: usize,
    abort: Arc<Abort>,
    passed: bool,
}

impl Guard {
    fn end<R, E: From<Error>>(
        mut self,
        outcome: std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        if outcome.is_ok() {
            self.abort.end();
            self.passed = true;
            return outcome;
        }
        match self.abort.lost() {
            // What this rank saw is what the loss of another has led to.
            Some(rank) if rank != self.rank => Err(Error::RankLost { rank: Some(rank) }.into()),
            _ => outcome,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.passed {
            self.abort.raise(self.rank);
        }
    }
}

impl Ranks {
    /// A run of one rank: every operation leaves things as they are.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Joins the cards, where there are some.
    fn new(handle: RankHandle, device: &Device) -> Result<Self> {
        let RankHandle { rank, size, wires, abort, limit, .. } = handle;
        let mut inner = Inner { rank, size, wires, abort, limit, card: None };
        inner.abort.check()?;
        let mut same = Agreement::new(0).with("the number of ranks", size);
        if inner.limit.is_some() {
            let program = agreement::program().map_err(|error| {
                Error::ranks(format!("Rank {rank} cannot read the running program: {error}"))
            })?;
            same = same.with("the program", program);
        }
        // Devices of one kind round alike, and so agree on what is positive definite.
        inner.agree(&same.with("the device", device.kind()))?;
        if let Device::Cuda(cuda) = device {
            let id = if rank == 0 { nccl::unique_id()? } else { Vec::new() };
            let ids = inner.exchange(id)?;
            let card = Arc::new(Communicator::new(cuda, &ids[0], rank, size)?);
            inner.abort.watch(&card);
            inner.abort.check()?;
            inner.card = Some(card);
        }
        Ok(Self(Some(Arc::new(inner))))
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |inner| inner.rank)
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |inner| inner.size)
    }

    /// True for rank 0, which writes and prints.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// This rank's part of `total` rows, windows or the like, in whole units; see [`share`].
    pub fn share(&self, total: usize, unit: usize) -> Range<usize> {
        share(total, unit, self.rank(), self.size())
    }

    /// Compares what the ranks' parts depend on. To be called before the work that it is about, as
    /// it also says how much a rank may send then. Ranks of one process have all alike, so that
    /// nothing is asked of them.
    ///
    /// # Errors
    /// Those of `same`, and [`Error::Disagreement`] on all ranks alike.
    pub fn agree<E: From<Error>>(
        &self,
        same: impl FnOnce() -> std::result::Result<Agreement, E>,
    ) -> std::result::Result<(), E> {
        match &self.0 {
            Some(inner) if inner.limit.is_some() => Ok(inner.agree(&same()?)?),
            _ => Ok(()),
        }
    }

    /// Every rank's words, in rank order, on every rank.
    pub fn exchange(&self, words: Vec<u32>) -> Result<Vec<Vec<u32>>> {
        match &self.0 {
            None => Ok(vec![words]),
            Some(inner) => inner.exchange(words),
        }
    }

    /// Every rank's words, in rank order, on rank 0; `None` on the others, which do not wait.
    pub fn collect(&self, words: Vec<Vec<u32>>) -> Result<Option<Vec<Vec<Vec<u32>>>>> {
        match &self.0 {
            None => Ok(Some(vec![words])),
            Some(inner) => inner.collect(words),
        }
    }

    /// Adds the ranks' f32 tensors up; every rank gets the sum.
    pub fn sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.sum_storage(&mut tensor.0)
    }

    /// As [`Self::sum`], of a tensor's values.
    pub(crate) fn sum_storage(&self, storage: &mut Storage) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |inner| inner.sum(storage))
    }

    /// All `rows` rows of a tensor of which every rank has its [`Self::share`] in units of `unit`.
    pub fn gather_rows(&self, own: Tensor, rows: usize, unit: usize) -> Result<Tensor> {
        match &self.0 {
            None => Ok(own),
            Some(inner) => inner.gather_rows(&own, rows, unit),
        }
    }

    /// The cards' communicator, where there are several.
    pub(crate) fn card(&self) -> Option<&Communicator> {
        self.0.as_ref()?.card.as_deref()
    }
}

impl Inner {
    fn send(&self, to: usize, message: Message) -> Result<()> {
        let wire = self.wires.get(&to);
        match wire.and_then(|wire| wire.out.send(message).ok()) {
            Some(()) => Ok(()),
            None => self.gone(to),
        }
    }

    fn receive(&self, from: usize) -> Result<Message> {
        let Some(wire) = self.wires.get(&from) else { return self.gone(from) };
        let inward = lock(&wire.inward);
        loop {
            match inward.recv_timeout(TICK) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Timeout) => self.abort.check()?,
                Err(RecvTimeoutError::Disconnected) => return self.gone(from),
            }
        }
    }

    /// The error of a rank that has left too early, unless another was lost before.
    fn gone<T>(&self, rank: usize) -> Result<T> {
        self.abort.raise(rank);
        self.abort.check()?;
        Err(Error::RankLost { rank: Some(rank) })
    }

    fn collect(&self, words: Message) -> Result<Option<Vec<Message>>> {
        if self.rank > 0 {
            return self.send(0, words).map(|()| None);
        }
        let mut all = vec![words];
        for peer in 1..self.size {
            all.push(self.receive(peer)?);
        }
        Ok(Some(all))
    }

    fn exchange(&self, words: Vec<u32>) -> Result<Message> {
        let Some(all) = self.collect(vec![words])? else { return self.receive(0) };
        let all: Message = all.into_iter().flatten().collect();
        for peer in 1..self.size {
            self.send(peer, all.clone())?;
        }
        Ok(all)
    }

    fn agree(&self, same: &Agreement) -> Result<()> {
        // Before a word is sent: who hears from all others may send at once.
        if let Some(limit) = &self.limit {
            limit.raise(same.words().max(LEAST_WORDS).saturating_mul(self.size as u64));
        }
        let all = self.exchange(same.encode())?;
        let all: Vec<Agreement> = all.iter().map(|words| Agreement::decode(words)).collect();
        let found = agreement::differences(&all);
        if found.is_empty() {
            return Ok(());
        }
        // Nobody is lost for saying the same as the others, and nobody leaves before all can say it.
        self.abort.end();
        let _ = self.exchange(Vec::new());
        Err(Error::Disagreement(found))
    }

    fn sum(&self, storage: &mut Storage) -> Result<()> {
        const OP: &str = "sum";
        match (storage, &self.card) {
            (Storage::Cuda(matrix), Some(card)) => card.sum(matrix),
            (Storage::Cpu(values), None) => {
                let mut parts = self.exchange(words_of(values))?.into_iter();
                let first = parts.next().unwrap_or_default();
                let mut total = values_of(first, values.dim())?;
                for part in parts {
                    total += &values_of(part, values.dim())?;
                }
                *values = total;
                Ok(())
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    fn gather_rows(&self, own: &Tensor, rows: usize, unit: usize) -> Result<Tensor> {
        const OP: &str = "gather_rows";
        match (&own.0, &self.card) {
            (Storage::Cuda(own), Some(card)) => {
                Ok(Tensor(Storage::Cuda(card.gather_rows(own, rows, unit)?)))
            }
            (Storage::Cpu(own), None) => {
                let cols = own.ncols();
                let mut parts = Vec::with_capacity(self.size);
                for (rank, words) in self.exchange(words_of(own))?.into_iter().enumerate() {
                    parts.push(values_of(words, (share(rows, unit, rank, self.size).len(), cols))?);
                }
                let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
                let whole = concatenate(Axis(0), &views);
                let mismatch =
                    |_| Error::ShapeMismatch { op: OP, left: own.dim(), right: (rows, cols) };
                Ok(Tensor(Storage::Cpu(whole.map_err(mismatch)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

/// The bits of a matrix's values, row by row.
fn words_of(values: &Array2<f32>) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn values_of(words: Vec<u32>, (rows, cols): (usize, usize)) -> Result<Array2<f32>> {
    let count = words.len();
    ensure_shape(count == rows * cols, "exchange", (count, 1), (rows, cols))?;
    Ok(Array2::from_shape_fn((rows, cols), |(i, j)| f32::from_bits(words[i * cols + j])))
}

#[cfg(test)]
mod tests;
