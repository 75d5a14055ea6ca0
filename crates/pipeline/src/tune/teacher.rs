//! What the tuned model is to say: the unquantized model's last states of every window, and the heads.

use std::ops::Range;

use gptq_compute::{Device, FloatType, HostMatrix, Tensor};
use gptq_model::{FinalNorm, Model};
use half::f16;

use super::split::Split;
use crate::chunk_store::ChunkStore;
use crate::error::Result;
use crate::rotate::{FusedRotations, dense_head, final_gain};
use crate::states::{States, chunk_ranges};

/// Windows that pass through the model together.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    /// Their tokens, one window after another.
    pub(super) ids: Vec<u32>,
    /// Tokens of a window.
    pub(super) seq_len: usize,
}

/// Chunks, and the unquantized model's normed last states of each.
struct Lesson {
    chunks: Vec<Chunk>,
    /// `[tokens, hidden]` a chunk, in host memory while they wait.
    states: ChunkStore,
}

/// The unquantized model's part in tuning.
pub(super) struct Teacher {
    /// The norm before the head, which both models have.
    pub(super) norm: FinalNorm,
    reference: Tensor,
    /// The quantized model's head, where it is another.
    head: Option<Tensor>,
    softcap: Option<f32>,
    train: Lesson,
    /// Chunks of every batch.
    batches: Vec<Range<usize>>,
    held_out: Lesson,
}

impl Teacher {
    /// Takes the states after the last block over, those of the calibration's windows and of others to judge by,
    /// where there are any; `head` is the quantized model's where it is fitted.
    pub(super) fn new(
        model: &Model<'_>,
        (rotations, head): (Option<&FusedRotations>, Option<&[f16]>),
        (windows, split, mut states): (&[Vec<u32>], &Split, States),
        others: Option<(&[Vec<u32>], States)>,
    ) -> Result<Self> {
        let norm = FinalNorm::new(model.config(), final_gain(model.checkpoint(), rotations)?);
        let (train_windows, last) = windows.split_at(split.trained());
        let mut batches = Vec::new();
        let mut ranges = Vec::new();
        for batch in split.batches() {
            let first = ranges.len();
            ranges.extend(ranges_of(model.device(), train_windows, batch));
            batches.push(first..ranges.len());
        }
        let all = |windows: &[Vec<u32>]| -> Vec<Range<usize>> {
            ranges_of(model.device(), windows, 0..windows.len()).collect()
        };
        let held = all(windows);
        let mut pick = Picker { model, norm: &norm, states: &mut states, held, windows };
        let train = pick.lesson(ranges)?;
        let held_out = if let Some((windows, mut states)) = others {
            let held = all(windows);
            let ranges = held.clone();
            Picker { model, norm: &norm, states: &mut states, held, windows }.lesson(ranges)?
        } else {
            let first = split.trained();
            let behind = |range: Range<usize>| range.start + first..range.end + first;
            pick.lesson(all(last).into_iter().map(behind).collect())?
        };
        let reference = table(model, &dense_head(model.checkpoint(), rotations)?)?;
        let head = head.map(|head| table(model, head)).transpose()?;
        let softcap = model.config().logit_softcap;
        Ok(Self { norm, reference, head, softcap, train, batches, held_out })
    }

    /// Places of a batch's chunks among those that are trained on.
    pub(super) fn batch(&self, batch: usize) -> Range<usize> {
        self.batches[batch].clone()
    }

    /// How many chunks are held out.
    pub(super) fn held_out(&self) -> usize {
        self.held_out.chunks.len()
    }

    /// The windows of a chunk that is trained on.
    pub(super) fn train_chunk(&self, chunk: usize) -> &Chunk {
        &self.train.chunks[chunk]
    }

    /// The windows of a chunk that is held out.
    pub(super) fn held_out_chunk(&self, chunk: usize) -> &Chunk {
        &self.held_out.chunks[chunk]
    }

    /// KL of the rows of a chunk that is held out, the quantized model's normed last states being `normed`.
    pub(super) fn judge(
        &mut self,
        device: &Device,
        chunk: usize,
        normed: &Tensor,
    ) -> Result<Vec<f32>> {
        let (reference, softcap) = (&self.reference, self.softcap);
        let head = self.head.as_ref().unwrap_or(reference);
        self.held_out.states.read(chunk, |states| {
            Ok(device.token_kl((states, reference), (normed, head), softcap)?)
        })
    }

    /// The gradient of `scale` times the sum of KL over a chunk that is trained on, by `normed`.
    pub(super) fn gradient(
        &mut self,
        device: &Device,
        chunk: usize,
        normed: &Tensor,
        scale: f32,
    ) -> Result<Tensor> {
        let (reference, softcap) = (&self.reference, self.softcap);
        let head = self.head.as_ref().unwrap_or(reference);
        self.train.states.read(chunk, |states| {
            let (_, gradient) =
                device.kl_backward((states, reference), (normed, head), softcap, scale)?;
            Ok(gradient)
        })
    }
}

/// Ranges of `windows` that make up the chunks of `batch`, one of them.
fn ranges_of(
    device: &Device,
    windows: &[Vec<u32>],
    batch: Range<usize>,
) -> impl Iterator<Item = Range<usize>> {
    let of_batch: Vec<&[u32]> = windows[batch.clone()].iter().map(Vec::as_slice).collect();
    let chunks = chunk_ranges(&of_batch, device.chunk_tokens()).into_iter();
    chunks.map(move |range| range.start + batch.start..range.end + batch.start)
}

/// The head's values `[vocab, hidden]` on the device.
fn table(model: &Model<'_>, values: &[f16]) -> Result<Tensor> {
    let (rows, cols) = (model.config().vocab_size, model.config().hidden_size);
    let matrix = HostMatrix::new(bytemuck::cast_slice(values), FloatType::F16, rows, cols);
    Ok(model.device().upload(matrix)?)
}

/// Regroups the states of calibration's chunks.
struct Picker<'a, 'm> {
    model: &'a Model<'m>,
    norm: &'a FinalNorm,
    states: &'a mut States,
    /// Windows of each chunk of these.
    held: Vec<Range<usize>>,
    windows: &'a [Vec<u32>],
}

impl Picker<'_, '_> {
    /// Chunks of these ranges of windows.
    fn lesson(&mut self, ranges: Vec<Range<usize>>) -> Result<Lesson> {
        let device = self.model.device();
        let mut states = ChunkStore::new(device, ranges.len(), 1.0);
        let mut chunks = Vec::with_capacity(ranges.len());
        for (place, range) in ranges.into_iter().enumerate() {
            let hidden = self.hidden(range.clone())?;
            states.put(place, self.norm.apply(device, &hidden)?)?;
            let windows = &self.windows[range];
            let seq_len = windows.first().map_or(0, Vec::len);
            chunks.push(Chunk { ids: windows.concat(), seq_len });
        }
        Ok(Lesson { chunks, states })
    }

    /// The states of a range of windows, all of one length, `[tokens, hidden]`.
    fn hidden(&mut self, range: Range<usize>) -> Result<Tensor> {
        let device = self.model.device();
        let seq_len = self.windows[range.start].len();
        let rows = range.len() * seq_len;
        let mut hidden = device.zeros(rows, self.model.config().hidden_size)?;
        for (chunk, held) in self.held.iter().enumerate() {
            let both = held.start.max(range.start)..held.end.min(range.end);
            if both.is_empty() {
                continue;
            }
            let rows_from = |first: usize| -> Vec<u32> {
                let at = (both.start - first) * seq_len..(both.end - first) * seq_len;
                at.map(|row| row as u32).collect()
            };
            let (from, to) = (rows_from(held.start), rows_from(range.start));
            self.states.hidden.read(chunk, |states| {
                let part = device.select_rows(states, &from)?;
                Ok(device.add_rows(&mut hidden, &to, &vec![1.0; to.len()], &part)?)
            })?;
        }
        Ok(hidden)
    }
}
