//! Tensors offloaded to pinned host memory, for hidden states that do not fit on the card.
//!
//! Each direction has a stream of its own, beside the computation: the bus carries both at once,
//! and a tensor that leaves waits for the work that makes it while the next one already arrives. An
//! offloaded tensor's device memory is freed when its copy is done; until then it is kept in a short
//! queue, whose oldest entry is waited for when the queue is full, so that offloading can never run
//! ahead of the bus. Pinned memory is slow to allocate and is kept for the next tensor of the same
//! size.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, DevicePtr, DeviceRepr, result};
use half::f16;

use super::buffer::{Buffer, Values};
use super::context::Cuda;
use super::error::StageContext;
use super::matrix::Matrix;
use super::pinned::Pinned;
use crate::error::Result;
use crate::lock::lock;

const STAGE: &str = "offloading a tensor";
/// Copies under way before the oldest is waited for.
const IN_FLIGHT: usize = 2;

/// A tensor in pinned host memory.
#[derive(Debug)]
pub struct Offloaded {
    cuda: Arc<Cuda>,
    shape: (usize, usize),
    is_f16: bool,
    host: Option<Pinned>,
}

/// A tensor on its way back to the card.
#[derive(Debug)]
pub struct Prefetched {
    matrix: Option<Matrix>,
    arrived: Arc<CudaEvent>,
}

impl Prefetched {
    /// The tensor; work queued from now on waits for its arrival.
    pub(crate) fn wait(mut self) -> Result<Matrix> {
        self.order()?;
        self.matrix.take().ok_or(crate::error::Error::DeviceMismatch { op: STAGE })
    }

    fn order(&self) -> Result<()> {
        match &self.matrix {
            Some(matrix) => matrix.cuda().stream().wait(&self.arrived).stage(STAGE),
            None => Ok(()),
        }
    }
}

impl Drop for Prefetched {
    fn drop(&mut self) {
        // The memory is freed on the stream of all work: not under the copy that fills it.
        let _ = self.order();
    }
}

impl Offloaded {
    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.host.as_ref().map_or(0, |host| host.memory.num_bytes())
    }

    /// Rows and columns of the tensor.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }
}

impl Drop for Offloaded {
    fn drop(&mut self) {
        // The next user waits for the last copy.
        if let Some(host) = self.host.take() {
            lock(&self.cuda.pinned().free).push(host);
        }
    }
}

/// Queues the copy of `matrix` to the host; its device memory is freed when that is done.
pub(crate) fn offload(matrix: Matrix) -> Result<Offloaded> {
    let cuda = Arc::clone(matrix.cuda());
    let stream = cuda.driver().leaving();
    let mut host = cuda.pinned().take(cuda.driver(), matrix.bytes())?;
    stream.join(cuda.stream()).stage(STAGE)?;
    if let Some(last) = &host.last {
        stream.wait(last).stage(STAGE)?;
    }
    let from = match matrix.values() {
        Values::F16(buffer) => buffer.slice().device_ptr(stream).0,
        Values::F32(buffer) => buffer.slice().device_ptr(stream).0,
    };
    let target = host.memory.as_mut_slice().stage(STAGE)?;
    // SAFETY: both hold `matrix.bytes()` bytes; the device memory lives in `leaving` until the copy
    // is done, and every copy from or to the host memory waits for the one before.
    unsafe { result::memcpy_dtoh_async(target, from, stream.cu_stream()) }.stage(STAGE)?;
    let done = Arc::new(stream.record_event(None).stage(STAGE)?);
    host.last = Some(Arc::clone(&done));
    let offloaded = Offloaded {
        cuda: Arc::clone(&cuda),
        shape: matrix.shape(),
        is_f16: matches!(matrix.values(), Values::F16(_)),
        host: Some(host),
    };
    let mut leaving = lock(&cuda.pinned().leaving);
    leaving.push_back((done, matrix.into_values()));
    while let Some((done, _)) = leaving.front() {
        if leaving.len() > IN_FLIGHT {
            done.synchronize().stage(STAGE)?;
        } else if !done.is_complete() {
            break;
        }
        leaving.pop_front();
    }
    Ok(offloaded)
}

/// Queues the copy back; the host's copy stays as it is.
pub(crate) fn prefetch(offloaded: &mut Offloaded) -> Result<Prefetched> {
    let (cuda, shape) = (Arc::clone(&offloaded.cuda), offloaded.shape);
    let count = shape.0 * shape.1;
    let matrix = if offloaded.is_f16 {
        Matrix::from_f16(&cuda, shape, copied_back::<f16>(&cuda, offloaded, count)?)
    } else {
        Matrix::from_f32(&cuda, shape, copied_back::<f32>(&cuda, offloaded, count)?)
    };
    let arrived = Arc::new(cuda.driver().arriving().record_event(None).stage(STAGE)?);
    if let Some(host) = &mut offloaded.host {
        host.last = Some(Arc::clone(&arrived));
    }
    Ok(Prefetched { matrix: Some(matrix), arrived })
}

fn copied_back<T: DeviceRepr>(
    cuda: &Cuda,
    offloaded: &Offloaded,
    count: usize,
) -> Result<Buffer<T>> {
    let stream = cuda.driver().arriving();
    let buffer = Buffer::<T>::uninit_on(cuda.driver(), stream, STAGE, count)?;
    let to = buffer.slice().device_ptr(stream).0;
    if let Some(host) = &offloaded.host {
        if let Some(last) = &host.last {
            stream.wait(last).stage(STAGE)?;
        }
        let from = host.memory.as_slice().stage(STAGE)?;
        // SAFETY: the buffer holds as many bytes as were offloaded; the stream waits for the copy
        // that filled the host memory, and the next writer of that waits for this copy.
        unsafe { result::memcpy_htod_async(to, from, stream.cu_stream()) }.stage(STAGE)?;
    }
    Ok(buffer)
}
