//! Cards that add and exchange device memory, through NCCL.
//!
//! All operations are queued on the stream of all work, in the order in which the ranks call them:
//! the same on each.
//!
//! An all-reduce leaves the same bits on every rank: each piece is added up along one path and then
//! passed on. Which path that is follows from the number of ranks, the links and NCCL's version.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use cudarc::driver::DevicePtrMut;
use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};

use super::buffer::Values;
use super::context::Cuda;
use super::libraries::Library;
use super::matrix::Matrix;
use super::nccl_api::{API, Api};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::share::share;

/// Pauses of an abort that finds the communicator in use, and their number.
const PAUSE: (Duration, u32) = (Duration::from_millis(100), 50);

fn api() -> Result<&'static Api> {
    Library::Nccl.require()?;
    API.get().ok_or(Error::MissingLibrary {
        library: Library::Nccl.file(),
        advice: Library::Nccl.hint(),
    })
}

/// NCCL's version, such as 2.27.3.
pub(super) fn version() -> Option<String> {
    let mut number = 0;
    // SAFETY: the pointer is valid for a write.
    let status = unsafe { (api().ok()?.get_version)(&raw mut number) };
    (status == ncclResult_t::ncclSuccess)
        .then(|| format!("{}.{}.{}", number / 10_000, number % 10_000 / 100, number % 100))
}

/// Variables that NCCL reads, and the values they need here.
///
/// NVLink multicast stays off: it speeds up nothing here, and a fault in it takes the cards of a host
/// out of service. And NCCL may not reach into the memory of another card of the same process: what
/// comes from the driver's pool is not mapped there.
const ENVIRONMENT: [(&str, &str); 2] =
    [("NCCL_NVLS_ENABLE", "0"), ("NCCL_P2P_DIRECT_DISABLE", "1")];

/// Sets the variables that NCCL reads, where the user has not. To be called before the program
/// starts a thread; later nothing is changed, and several cards are refused.
pub fn prepare_environment() {
    for (name, value) in ENVIRONMENT {
        let alone = || std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
        if std::env::var_os(name).is_none() && alone() {
            // SAFETY: the process has one thread, so nobody reads the environment meanwhile.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// A new communicator's id, for all ranks to start it with.
pub(crate) fn unique_id() -> Result<Vec<u32>> {
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: the pointer is valid for a write of the id.
    let status = unsafe { (api()?.get_unique_id)(&raw mut id) };
    checked("making a communicator", status, std::ptr::null_mut())?;
    let bytes: Vec<u8> = id.internal.iter().map(|&c| c as u8).collect();
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A rank's place among the cards of a run.
pub(crate) struct Communicator {
    cuda: Arc<Cuda>,
    rank: usize,
    size: usize,
    /// `None` once it was aborted.
    handle: Mutex<Option<Handle>>,
}

struct Handle(ncclComm_t);

// SAFETY: a communicator may be used from any thread, one at a time, which the mutex sees to.
unsafe impl Send for Handle {}

/// A piece of device memory that every rank shall have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// The rank that has it.
    pub(super) owner: usize,
    /// Where it is on the owner, and goes to on the others.
    pub(super) address: u64,
    /// Its length.
    pub(super) bytes: usize,
}

impl Communicator {
    /// Joins `size` ranks under `id`; returns when all have.
    pub(crate) fn new(cuda: &Arc<Cuda>, id: &[u32], rank: usize, size: usize) -> Result<Self> {
        const STAGE: &str = "joining the other GPUs";
        for (name, value) in ENVIRONMENT {
            if std::env::var_os(name).is_none() {
                let reason = format!("set {name}={value} in the environment first");
                return Err(Error::Unsupported { op: STAGE, reason });
            }
        }
        let api = api()?;
        let mut internal = [0; 128];
        for (to, from) in internal.iter_mut().zip(id.iter().flat_map(|w| w.to_le_bytes())) {
            *to = from as c_char;
        }
        let mut comm = std::ptr::null_mut();
        super::error::StageContext::stage(cuda.context().bind_to_thread(), STAGE)?;
        // SAFETY: the pointer is valid for a write, the card is current, and the id is rank 0's.
        let status = unsafe {
            let id = ncclUniqueId { internal };
            (api.init_rank)(&raw mut comm, size as c_int, id, rank as c_int)
        };
        checked(STAGE, status, comm)?;
        Ok(Self { cuda: Arc::clone(cuda), rank, size, handle: Mutex::new(Some(Handle(comm))) })
    }

    /// Ends all that is queued or waits for another rank; for any thread.
    pub(crate) fn abort(&self) {
        let Some(api) = API.get() else { return };
        // A call that is being queued ends soon, or waits for a rank that is lost: then the process
        // has to end instead.
        for _ in 0..PAUSE.1 {
            match self.handle.try_lock() {
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE.0),
                Err(TryLockError::Poisoned(held)) => return end(api, held.into_inner().take()),
                Ok(mut held) => return end(api, held.take()),
            }
        }
    }

    /// True when NCCL found out by itself that something has failed.
    pub(crate) fn has_failed(&self) -> bool {
        let (Some(api), Ok(held)) = (API.get(), self.handle.try_lock()) else { return false };
        let Some(Handle(comm)) = &*held else { return false };
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is alive while the lock is held; the pointer is valid.
        let status = unsafe { (api.async_error)(*comm, &raw mut state) };
        let fine = |s| matches!(s, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress);
        !(fine(status) && fine(state))
    }

    /// Runs `call` with the communicator and the stream of all work.
    fn queue(
        &self,
        stage: &'static str,
        call: impl FnOnce(&Api, ncclComm_t, cudaStream_t) -> ncclResult_t,
    ) -> Result<()> {
        let api = api()?;
        super::error::StageContext::stage(self.cuda.context().bind_to_thread(), stage)?;
        let held = lock(&self.handle);
        let Some(Handle(comm)) = &*held else {
            return Err(Error::RankLost { rank: None });
        };
        checked(stage, call(api, *comm, self.cuda.stream().cu_stream().cast()), *comm)
    }

    /// Adds the ranks' f32 matrices up, in place.
    pub(crate) fn sum(&self, matrix: &mut Matrix) -> Result<()> {
        const OP: &str = "adding up over the GPUs";
        let values = matrix.f32_mut(OP)?;
        let count = values.len();
        let (address, _record) = values.device_ptr_mut(self.cuda.stream());
        self.queue(OP, |api, comm, stream| {
            let (from, to) = (address as *const c_void, address as *mut c_void);
            let (float, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
            // SAFETY: `count` values lie at the address, in place is allowed, and the matrix is
            // freed behind this call on the same stream.
            unsafe { (api.all_reduce)(from, to, count, float, sum, comm, stream) }
        })
    }

    /// Gives every rank every piece; all ranks call it with the same owners and lengths.
    ///
    /// # Safety
    /// The addresses are live device memory of at least so many bytes, which is not freed before
    /// the queue has passed this exchange, and no two pieces overlap.
    pub(super) unsafe fn exchange(&self, stage: &'static str, pieces: &[Piece]) -> Result<()> {
        self.queue(stage, |api, comm, stream| {
            let byte = ncclDataType_t::ncclInt8;
            // SAFETY: groups may be opened at any time; this one is closed below.
            let mut status = unsafe { (api.group_start)() };
            for piece in pieces.iter().filter(|p| p.bytes > 0) {
                let peers = (0..self.size).filter(|&peer| {
                    peer != self.rank && (piece.owner == self.rank || piece.owner == peer)
                });
                for peer in peers {
                    if status != ncclResult_t::ncclSuccess {
                        break;
                    }
                    let peer = peer as c_int;
                    // SAFETY: the caller's contract.
                    status = unsafe {
                        if piece.owner == self.rank {
                            let from = piece.address as *const c_void;
                            (api.send)(from, piece.bytes, byte, peer, comm, stream)
                        } else {
                            let to = piece.address as *mut c_void;
                            (api.recv)(to, piece.bytes, byte, peer, comm, stream)
                        }
                    };
                }
            }
            // SAFETY: closes the group that was opened above.
            let closed = unsafe { (api.group_end)() };
            if status == ncclResult_t::ncclSuccess { closed } else { status }
        })
    }

    /// The `rows` rows of which every rank has its share, in rank order.
    pub(crate) fn gather_rows(&self, own: &Matrix, rows: usize, unit: usize) -> Result<Matrix> {
        const OP: &str = "gathering rows from the GPUs";
        let mut whole = match own.values() {
            Values::F16(_) => Matrix::uninit_f16(&self.cuda, OP, (rows, own.cols()))?,
            Values::F32(_) => Matrix::uninit_f32(&self.cuda, OP, (rows, own.cols()))?,
        };
        let stride = whole.bytes() / rows.max(1);
        let from = own.address();
        let to = whole.address_mut()?;
        let pieces: Vec<Piece> = (0..self.size)
            .map(|owner| {
                let range = share(rows, unit, owner, self.size);
                let address = to + (range.start * stride) as u64;
                Piece { owner, address, bytes: range.len() * stride }
            })
            .collect();
        let mine = pieces[self.rank];
        crate::error::ensure_shape(
            own.bytes() == mine.bytes,
            OP,
            own.shape(),
            (share(rows, unit, self.rank, self.size).len(), own.cols()),
        )?;
        // SAFETY: both hold the bytes of this rank's share and do not overlap; the pieces part the
        // new matrix. Both matrices are freed behind these calls on the same stream.
        unsafe {
            if mine.bytes > 0 {
                let copied = cudarc::driver::result::memcpy_dtod_async(
                    mine.address,
                    from,
                    mine.bytes,
                    self.cuda.stream().cu_stream(),
                );
                super::error::StageContext::stage(copied, OP)?;
            }
            self.exchange(OP, &pieces)?;
        }
        Ok(whole)
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // The ranks have met after their last exchange, so this only frees what NCCL holds; its own
        // way of closing down would wait for all ranks once more.
        self.abort();
    }
}

fn end(api: &Api, handle: Option<Handle>) {
    if let Some(Handle(comm)) = handle {
        // SAFETY: the communicator is alive and was taken out of its place: nobody uses it again.
        unsafe { (api.abort)(comm) };
    }
}

/// An error that says what NCCL says.
fn checked(stage: &'static str, status: ncclResult_t, comm: ncclComm_t) -> Result<()> {
    if status == ncclResult_t::ncclSuccess {
        return Ok(());
    }
    let mut message = format!("{status:?}");
    if let Some(api) = API.get() {
        // SAFETY: a null communicator is allowed; the text belongs to NCCL and ends with a zero.
        let text = unsafe {
            let text = (api.last_error)(comm);
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy()) }
        };
        if let Some(text) = text.filter(|t| !t.is_empty()) {
            message = format!("{message} ({})", text.trim());
        }
    }
    Err(Error::Cuda { stage, source: super::fault::Fault::Nccl(message) })
}
