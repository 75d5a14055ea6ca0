//! Copies between host and device: uploads do not wait for queued work, nor small ones for large
//! ones.
//!
//! Host values go through two halves of a pinned buffer: while one half is being copied by the
//! card, the next piece is being written to the other by all cores. Uploads run on the copy stream
//! and the stream of all work waits for their end on the device, so the weights of the next block
//! arrive while the current one computes. Whoever uploads a tensor holds its buffer until the last
//! piece was read, page faults of a mapped file included; norm gains, biases and orders, which the
//! computing thread needs meanwhile, have a buffer of their own, and wait at most for the halves that
//! are on their way to the card.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, PushKernelArg, result,
};
use half::f16;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::context::Cuda;
use super::error::Stage;
use super::matrix::Matrix;
use crate::error::{Error, Result};
use crate::host::{FloatType, HostMatrix};

/// Bytes of one half: copies of this size run at full speed, and two take no room worth naming.
const HALF: usize = 16 << 20;
/// Bytes that one task copies, and the most that is a small upload.
const PIECE: usize = 1 << 20;

/// The pinned buffers, each allocated at its first use. The two directions are apart so that an
/// upload does not wait for a read, which itself waits for queued work.
#[derive(Default)]
pub(super) struct Staging {
    inward: Mutex<Option<Halves>>,
    /// For uploads of at most [`PIECE`] bytes.
    small: Mutex<Option<Halves>>,
    outward: Mutex<Option<Halves>>,
}

struct Halves {
    memory: [PinnedHostSlice<u8>; 2],
    /// The half that the next piece of an upload takes: small uploads, of one piece each, take turns.
    next: usize,
    /// Recorded after the last copy from or to a half.
    used: [CudaEvent; 2],
}

impl Halves {
    fn new(cuda: &Cuda, bytes: usize) -> Result<Self> {
        const STAGE: &str = "allocating pinned host memory";
        // SAFETY: every byte is written before it is read, by the host or by a copy.
        let half =
            || unsafe { cuda.context().alloc_pinned_with_flags::<u8>(bytes, 0) }.stage(STAGE);
        let event = || cuda.context().new_event(None).stage(STAGE);
        Ok(Self { memory: [half()?, half()?], next: 0, used: [event()?, event()?] })
    }
}

impl Cuda {
    /// Runs `work` with one of the staging buffers, whose halves are of `bytes`.
    fn with_staging<R>(
        &self,
        (staging, bytes): (&Mutex<Option<Halves>>, usize),
        work: impl FnOnce(&mut Halves) -> Result<R>,
    ) -> Result<R> {
        let mut staging = staging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut halves = match staging.take() {
            Some(halves) => halves,
            None => Halves::new(self, bytes)?,
        };
        let outcome = work(&mut halves);
        *staging = Some(halves);
        outcome
    }

    /// Queues the copy of `bytes` to `to`, on the copy stream; returns when `bytes` are read.
    fn stage_in(&self, stage: &'static str, bytes: &[u8], to: u64) -> Result<()> {
        let (staging, size) = match bytes.len() <= PIECE {
            true => (&self.staging().small, PIECE),
            false => (&self.staging().inward, HALF),
        };
        self.with_staging((staging, size), |halves| {
            for (i, chunk) in bytes.chunks(size).enumerate() {
                let at_hand = halves.next;
                halves.next = 1 - at_hand;
                halves.used[at_hand].synchronize().stage(stage)?;
                let half = halves.memory[at_hand].as_mut_slice().stage(stage)?;
                let half = &mut half[..chunk.len()];
                if chunk.len() <= PIECE {
                    // One piece: a thread of the pool would have to be free first.
                    half.copy_from_slice(chunk);
                } else {
                    let pieces = half.par_chunks_mut(PIECE).zip(chunk.par_chunks(PIECE));
                    pieces.for_each(|(to, from)| to.copy_from_slice(from));
                }
                let at = to + (i * size) as u64;
                // SAFETY: the target holds `bytes.len()` bytes and was allocated on this stream;
                // the half is not touched again before its event is done.
                unsafe { result::memcpy_htod_async(at, half, self.copies().cu_stream()) }
                    .stage(stage)?;
                halves.used[at_hand].record(self.copies()).stage(stage)?;
            }
            Ok(())
        })
    }

    /// A copy of `values` on the device, which work queued from now on may use.
    pub(crate) fn copied<T: DeviceRepr + Pod>(
        &self,
        stage: &'static str,
        values: &[T],
    ) -> Result<Buffer<T>> {
        let buffer = self.uninit_on::<T>(self.copies(), stage, values.len())?;
        self.stage_in(stage, bytemuck::cast_slice(values), address(buffer.slice(), self.copies()))?;
        self.stream().join(self.copies()).stage(stage)?;
        Ok(buffer)
    }

    /// The first `len` values of `slice` in host memory; waits for all queued work.
    pub(crate) fn read<T: DeviceRepr + Pod>(
        &self,
        stage: &'static str,
        slice: &CudaSlice<T>,
        len: usize,
    ) -> Result<Vec<T>> {
        assert!(len <= slice.len(), "{len} values of {}", slice.len());
        let mut values = vec![T::zeroed(); len];
        self.stage_out(
            stage,
            address(slice, self.stream()),
            bytemuck::cast_slice_mut(&mut values),
        )?;
        self.context().check_err().stage(stage)?;
        Ok(values)
    }

    /// Copies from `from` on the device into `bytes`, after all queued work.
    fn stage_out(&self, stage: &'static str, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.with_staging((&self.staging().outward, HALF), |halves| {
            let mut waiting: Option<(usize, &mut [u8])> = None;
            let drain = |halves: &mut Halves, entry: Option<(usize, &mut [u8])>| {
                let Some((half, chunk)) = entry else { return Ok(()) };
                halves.used[half].synchronize().stage(stage)?;
                let memory = halves.memory[half].as_slice().stage(stage)?;
                let pieces = chunk.par_chunks_mut(PIECE).zip(memory.par_chunks(PIECE));
                pieces.for_each(|(to, from)| to.copy_from_slice(&from[..to.len()]));
                Ok(())
            };
            for (i, chunk) in bytes.chunks_mut(HALF).enumerate() {
                let half = halves.memory[i % 2].as_mut_slice().stage(stage)?;
                let (half, at) = (&mut half[..chunk.len()], from + (i * HALF) as u64);
                // SAFETY: the source holds as many bytes as the caller's slice, and the half is
                // not touched before its event is done.
                unsafe { result::memcpy_dtoh_async(half, at, self.stream().cu_stream()) }
                    .stage(stage)?;
                halves.used[i % 2].record(self.stream()).stage(stage)?;
                drain(halves, waiting.replace((i % 2, chunk)))?;
            }
            drain(halves, waiting)
        })
    }

    /// Converts stored values on the copy stream; an error when one does not fit `name`'s target.
    fn convert<A, B>(
        &self,
        name: &'static str,
        from: &CudaSlice<A>,
        to: &CudaSlice<B>,
        count: usize,
    ) -> Result<()> {
        const STAGE: &str = "upload";
        let function = self.kernel("convert.cu", name)?;
        let bad = self.uninit_on::<u32>(self.copies(), STAGE, 1)?;
        let (stream, counter) = (self.copies(), address(bad.slice(), self.copies()));
        let n = count as i64;
        // SAFETY: one word at `counter`; `from` and `to` hold `count` values of the kernel's types.
        unsafe {
            result::memset_d8_async(counter, 0, size_of::<u32>(), stream.cu_stream())
                .stage(STAGE)?;
            let mut launch = stream.launch_builder(&function);
            launch.arg(from).arg(to).arg(&n).arg(bad.slice());
            launch.launch(self.spread(count / 2)).stage(STAGE)?;
        }
        let mut found = [0_u32];
        // Waits for the copy stream alone.
        stream.memcpy_dtoh(bad.slice(), &mut found[..]).stage(STAGE)?;
        stream.synchronize().stage(STAGE)?;
        match found[0] as usize {
            0 => Ok(()),
            count => Err(Error::HalfOverflow { count }),
        }
    }
}

/// Device address of a slice; its uses are ordered by the caller.
fn address<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> u64 {
    slice.device_ptr(stream).0
}

/// A stored matrix as fp16.
pub(crate) fn upload(cuda: &Arc<Cuda>, matrix: HostMatrix<'_>) -> Result<Matrix> {
    let values = converted::<f16>(
        cuda,
        matrix,
        match matrix.dtype() {
            FloatType::F32 => "f32_to_f16",
            FloatType::F16 => "f16_to_f16",
            FloatType::BF16 => "bf16_to_f16",
        },
    )?;
    Ok(Matrix::from_f16(cuda, (matrix.rows(), matrix.cols()), values))
}

/// Rows `ids` of a stored matrix as f32: the first hidden states. The caller has checked the range.
pub(crate) fn gather(cuda: &Arc<Cuda>, table: HostMatrix<'_>, ids: &[u32]) -> Result<Matrix> {
    let stride = table.cols() * table.dtype().size();
    let mut rows = vec![0_u8; ids.len() * stride];
    rows.par_chunks_mut(stride.max(1)).zip(ids).for_each(|(row, &id)| {
        row.copy_from_slice(&table.bytes()[id as usize * stride..][..stride]);
    });
    let rows = HostMatrix::new(&rows, table.dtype(), ids.len(), table.cols());
    let values = converted::<f32>(
        cuda,
        rows,
        match table.dtype() {
            FloatType::F32 => "f32_to_f32",
            FloatType::F16 => "f16_to_f32",
            FloatType::BF16 => "bf16_to_f32",
        },
    )?;
    Ok(Matrix::from_f32(cuda, (ids.len(), table.cols()), values))
}

/// The values of `matrix` on the device, converted by kernel `name` to `T`.
fn converted<T: DeviceRepr>(
    cuda: &Arc<Cuda>,
    matrix: HostMatrix<'_>,
    name: &'static str,
) -> Result<Buffer<T>> {
    const STAGE: &str = "upload";
    let count = matrix.rows() * matrix.cols();
    let values = cuda.uninit_on::<T>(cuda.copies(), STAGE, count)?;
    if matrix.dtype().size() == size_of::<T>() {
        // In place: each thread writes what it has read.
        cuda.stage_in(STAGE, matrix.bytes(), address(values.slice(), cuda.copies()))?;
        cuda.convert(name, values.slice(), values.slice(), count)?;
    } else {
        let raw = cuda.uninit_on::<u8>(cuda.copies(), STAGE, matrix.bytes().len())?;
        cuda.stage_in(STAGE, matrix.bytes(), address(raw.slice(), cuda.copies()))?;
        cuda.convert(name, raw.slice(), values.slice(), count)?;
    }
    cuda.stream().join(cuda.copies()).stage(STAGE)?;
    Ok(values)
}
