//! The program of a step: memory that stays, the order of the kernels, and their recording.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::result::graph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DeviceRepr};
use half::f16;

use super::buffer::Buffer;
use super::coded::{Coded, SUB};
use super::context::Cuda;
use super::elementwise::device_table;
use super::error::StageContext;
use super::kv::Cache;
use super::matrix::Matrix;
use super::ordered::{CELL_WORDS, Ordered};
use super::product::{FEW_TOKENS, Inputs, Output, Sums, prepare, sums_of};
use super::rope_table::DeviceTable;
use super::step_launch::{Attention, Launcher, Splits};
use super::transfer::address;
use crate::error::{Error, Result};
use crate::kv_cache::{CacheShape, Span};
use crate::steps::{StepBlock, StepModel};

const STAGE: &str = "a step";
/// Tokens that a step takes.
pub(crate) const MOST_TOKENS: usize = FEW_TOKENS;
/// Places of the linears in a block.
const QKV: [usize; 3] = [0, 1, 2];
const OUT: usize = 3;
const GATE_UP: [usize; 2] = [4, 5];
const DOWN: usize = 6;

/// A model laid out for steps.
pub(crate) struct Program {
    cuda: Arc<Cuda>,
    shape: CacheShape,
    eps: f32,
    blocks: Vec<Block>,
    /// Values of a hidden state.
    width: usize,
    norm: Option<Buffer<f32>>,
    table: DeviceTable,
    splits: Splits,
    room: Room,
    /// For every number of tokens, and of the splits that the longest of their sequences needs.
    recorded: HashMap<(usize, usize), Recorded>,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// How far the recording of a step is.
enum Recorded {
    /// Its kernels were launched once, one by one, and are ready.
    Launched,
    Graph(Graph),
}

struct Graph {
    graph: CudaGraph,
    context: Arc<CudaContext>,
}

// SAFETY: a graph may be launched from any thread, by one at a time; it is launched through `&mut Program`
// alone, and the context that it belongs to is bound before it is launched and before it is dropped.
unsafe impl Send for Graph {}

impl Graph {
    fn launch(&self, cuda: &Cuda) -> Result<()> {
        self.context.bind_to_thread().stage(STAGE)?;
        // SAFETY: the graph is this program's, whose memory it works on, and lives as long as it.
        unsafe { graph::launch(self.graph.cu_graph_exec(), cuda.stream().cu_stream()) }.stage(STAGE)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
    }
}

/// What the kernels of a step leave for each other, for up to `MOST_TOKENS` tokens.
struct Room {
    /// Hidden states, f32.
    hidden: Buffer<f32>,
    /// Inputs of a linear, two bytes each, in its order.
    ordered: Buffer<f16>,
    /// What belongs to their cells.
    ordered_cells: Buffer<i32>,
    /// By which parts of products put their sums together.
    product_sums: Sums,
    qkv: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    /// Attention's splits: weighted values, and maximum and sum.
    sums: Buffer<f32>,
    stats: Buffer<f32>,
    /// Sequence and position of every token.
    at: Buffer<i32>,
    /// The result.
    normed: Buffer<f16>,
}

/// A block on the card.
struct Block {
    linears: [Arc<Coded>; 7],
    biases: [Option<Buffer<f32>>; 7],
    head_norms: Option<[Buffer<f32>; 2]>,
    norms: [Buffer<f32>; 2],
    cache: Cache,
}

impl Block {
    fn new(cuda: &Arc<Cuda>, block: &StepBlock<'_>) -> Result<Self> {
        let elsewhere = || Error::DeviceMismatch { op: STAGE };
        let linears = block.linears.iter().map(|linear| linear.on(cuda).ok_or_else(elsewhere));
        let linears: Vec<_> = linears.collect::<Result<_>>()?;
        let there = |values: &[f32]| cuda.copied(STAGE, values);
        let biases: Vec<_> =
            block.biases.iter().map(|bias| bias.map(there).transpose()).collect::<Result<_>>()?;
        let head_norms = match &block.head_norms {
            Some([q, k]) => Some([there(q)?, there(k)?]),
            None => None,
        };
        Ok(Self {
            linears: linears.try_into().map_err(|_| elsewhere())?,
            biases: biases.try_into().map_err(|_| elsewhere())?,
            head_norms,
            norms: [there(block.norms[0])?, there(block.norms[1])?],
            cache: block.cache.on(cuda).ok_or_else(elsewhere)?.clone(),
        })
    }
}

impl Block {
    /// Those of some linears whose columns are in the same order, which are one launch.
    fn together(&self, linears: &[usize]) -> Vec<Vec<usize>> {
        let mut left = linears.to_vec();
        let mut found = Vec::new();
        while let Some(&first) = left.first() {
            let goes = |&i: &usize| self.linears[i].goes_with(&self.linears[first]);
            let (together, others) = left.into_iter().partition(goes);
            found.push(together);
            left = others;
        }
        found
    }

    /// The weights of every launch.
    fn sets(&self) -> impl Iterator<Item = Vec<&Coded>> {
        let all = [&QKV[..], &[OUT], &GATE_UP, &[DOWN]];
        let sets = all.into_iter().flat_map(|linears| self.together(linears));
        sets.map(|set| set.into_iter().map(|i| &*self.linears[i]).collect())
    }
}

impl Program {
    /// The caller has checked that the parts fit one another.
    pub(crate) fn new(cuda: &Arc<Cuda>, model: &StepModel<'_>, shape: CacheShape) -> Result<Self> {
        let blocks = model.blocks.iter().map(|block| Block::new(cuda, block));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let splits = Splits::of(shape);
        let linears = || blocks.iter().flat_map(|block| &block.linears);
        let padded = linears().map(|linear| linear.padded()).max().unwrap_or(0);
        let wide = blocks.iter().map(|block| block.linears[4].shape().0).max().unwrap_or(0);
        let (width, values) = (model.width, shape.heads * shape.head_dim);
        let sets = blocks.iter().flat_map(Block::sets);
        let needed = sets.flat_map(|set| (1..=MOST_TOKENS).map(move |n| sums_of(&set, n)));
        let sums = needed.fold((0, 0), |most, one| (most.0.max(one.0), most.1.max(one.1)));
        let f32s = |count: usize| cuda.uninit::<f32>(STAGE, MOST_TOKENS * count);
        let room = Room {
            hidden: f32s(width)?,
            ordered: cuda.uninit(STAGE, MOST_TOKENS * padded)?,
            ordered_cells: cuda.uninit(STAGE, MOST_TOKENS * padded / SUB * CELL_WORDS)?,
            product_sums: Sums::new(cuda, STAGE, sums)?,
            qkv: f32s((shape.heads + 2 * shape.kv_heads) * shape.head_dim)?,
            gate: f32s(wide)?,
            up: f32s(wide)?,
            sums: f32s(splits.count * values)?,
            stats: f32s(splits.count * shape.heads * 2)?,
            at: cuda.uninit(STAGE, MOST_TOKENS * 2)?,
            normed: cuda.uninit(STAGE, MOST_TOKENS * width)?,
        };
        Ok(Self {
            cuda: Arc::clone(cuda),
            shape,
            eps: model.eps,
            blocks,
            width,
            norm: model.norm.map(|gain| cuda.copied(STAGE, gain)).transpose()?,
            table: device_table(cuda, model.rope)?,
            splits,
            room,
            recorded: HashMap::new(),
        })
    }

    /// The card.
    pub(crate) fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    /// The caches' shape.
    pub(crate) fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Values of a hidden state.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// As [`crate::Steps::run`], which has checked everything.
    ///
    /// The two copies before the kernels wait for all that was queued, and so nothing of a step is read or
    /// written by what came before it: attention relies on that when it fetches keys early.
    pub(crate) fn run(&mut self, hidden: &Matrix, spans: &[Span]) -> Result<Matrix> {
        let (tokens, width) = (spans.len(), self.width());
        let stream = Arc::clone(self.cuda.stream());
        let at: Vec<i32> =
            spans.iter().flat_map(|span| [span.slot as i32, span.start as i32]).collect();
        stream
            .memcpy_htod(&at, &mut self.room.at.make_mut()?.slice_mut(..at.len()))
            .stage(STAGE)?;
        let count = tokens * width;
        let from = hidden.f32(STAGE)?.slice(..count);
        stream
            .memcpy_dtod(&from, &mut self.room.hidden.make_mut()?.slice_mut(..count))
            .stage(STAGE)?;
        let longest = spans.iter().map(|span| span.start + span.len).max().unwrap_or(0);
        self.go(tokens, self.splits.up_to(longest))?;
        if self.norm.is_none() {
            let mut out = Matrix::uninit_f32(&self.cuda, STAGE, (tokens, width))?;
            let hidden = self.room.hidden.slice().slice(..count);
            stream.memcpy_dtod(&hidden, out.f32_mut(STAGE)?).stage(STAGE)?;
            return Ok(out);
        }
        let mut out = Matrix::uninit_f16(&self.cuda, STAGE, (tokens, width))?;
        stream
            .memcpy_dtod(&self.room.normed.slice().slice(..count), out.f16_mut(STAGE)?)
            .stage(STAGE)?;
        Ok(out)
    }

    /// Launches the step's kernels: one by one the first time, which makes them ready, from then on as a
    /// graph.
    fn go(&mut self, tokens: usize, splits: Splits) -> Result<()> {
        let of = (tokens, splits.count);
        let now = match self.recorded.get(&of) {
            Some(Recorded::Graph(graph)) => return graph.launch(&self.cuda),
            Some(Recorded::Launched) => {
                let graph = self.record(tokens, splits)?;
                graph.launch(&self.cuda)?;
                Recorded::Graph(graph)
            }
            None => {
                self.queue(self.cuda.stream(), tokens, splits)?;
                Recorded::Launched
            }
        };
        self.recorded.insert(of, now);
        Ok(())
    }

    /// Records a step on a stream of its own: what else is queued meanwhile is no part of it.
    fn record(&self, tokens: usize, splits: Splits) -> Result<Graph> {
        let context = Arc::clone(self.cuda.context());
        let stream = context.new_stream().stage(STAGE)?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).stage(STAGE)?;
        let queued = self.queue(&stream, tokens, splits);
        // Whatever became of the launches, the stream has to leave its state of being recorded.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).stage(STAGE);
        queued?;
        let none = || Error::Unsupported { op: STAGE, reason: "no graph was recorded".to_owned() };
        Ok(Graph { graph: graph?.ok_or_else(none)?, context })
    }

    /// All kernels of a step, in order.
    fn queue(&self, stream: &CudaStream, tokens: usize, splits: Splits) -> Result<()> {
        let launcher = Launcher { cuda: &self.cuda, stream, tokens };
        for block in &self.blocks {
            self.queue_attention(&launcher, block, splits)?;
            self.queue_mlp(&launcher, block)?;
        }
        let Some(norm) = &self.norm else { return Ok(()) };
        launcher.norm(
            (self.at(&self.room.hidden), self.at(norm), self.eps),
            self.width,
            &Ordered::plain(self.at(&self.room.normed), self.width)?,
        )
    }

    /// Where the inputs of a weight go, in its order.
    fn ordered(&self, weight: &Coded, tokens: usize) -> Result<Ordered> {
        weight.ordered(self.at(&self.room.ordered), self.at(&self.room.ordered_cells), tokens)
    }

    /// The same as products find them.
    fn inputs(&self) -> Inputs {
        let [x, cells] = [self.at(&self.room.ordered), self.at(&self.room.ordered_cells)];
        self.room.product_sums.with(x, cells, self.cuda.stream())
    }

    fn at<T: DeviceRepr>(&self, buffer: &Buffer<T>) -> u64 {
        address(buffer.slice(), self.cuda.stream())
    }

    fn queue_attention(
        &self,
        launcher: &Launcher<'_>,
        block: &Block,
        splits: Splits,
    ) -> Result<()> {
        let CacheShape { heads, kv_heads, head_dim, .. } = self.shape;
        let qkv = self.at(&self.room.qkv);
        let stride = (heads + 2 * kv_heads) * head_dim;
        let starts = [0, heads * head_dim, (heads + kv_heads) * head_dim];
        let to = starts.map(|start| (qkv + 4 * start as u64, stride));
        self.queue_normed(launcher, block, &QKV, 0, &to)?;
        let gains = block.head_norms.as_ref();
        let attention = Attention {
            qkv,
            cache: block.cache.addresses(),
            at: self.at(&self.room.at),
            angles: [self.at(&self.table.cos), self.at(&self.table.sin)],
            gains: gains.map_or([0; 2], |gains| gains.each_ref().map(|gain| self.at(gain))),
            eps: self.eps,
            sums: self.at(&self.room.sums),
            stats: self.at(&self.room.stats),
            shape: self.shape,
            splits,
        };
        launcher.attention(&attention)?;
        self.queue_join(
            launcher,
            &attention,
            &self.ordered(&block.linears[OUT], launcher.tokens)?,
        )?;
        self.queue_into_hidden(launcher, block, OUT)
    }

    /// Attention's splits put together, in the order of the output projection.
    fn queue_join(&self, launcher: &Launcher<'_>, of: &Attention, to: &Ordered) -> Result<()> {
        if !of.splits.join_then_gather(to) {
            return launcher.join(of, to);
        }
        let values = self.shape.heads * self.shape.head_dim;
        // Queries, keys and values are done with: their place, wider than this, takes the values.
        let own = Ordered::plain(of.qkv, values)?;
        launcher.join(of, &own)?;
        launcher.gather(of.qkv, values, to)
    }

    fn queue_mlp(&self, launcher: &Launcher<'_>, block: &Block) -> Result<()> {
        let wide = block.linears[GATE_UP[0]].shape().0;
        let [gate, up] = [&self.room.gate, &self.room.up].map(|buffer| self.at(buffer));
        self.queue_normed(launcher, block, &GATE_UP, 1, &[(gate, wide), (up, wide)])?;
        launcher.silu((gate, up), wide, &self.ordered(&block.linears[DOWN], launcher.tokens)?)?;
        self.queue_into_hidden(launcher, block, DOWN)
    }

    /// A norm and the linears that read it, which stand side by side in the block: one launch for all whose
    /// columns are in the same order.
    fn queue_normed(
        &self,
        launcher: &Launcher<'_>,
        block: &Block,
        linears: &[usize],
        norm: usize,
        to: &[(u64, usize)],
    ) -> Result<()> {
        for together in block.together(linears) {
            launcher.norm(
                (self.at(&self.room.hidden), self.at(&block.norms[norm]), self.eps),
                self.width(),
                &self.ordered(&block.linears[together[0]], launcher.tokens)?,
            )?;
            let outputs: Vec<_> = together
                .into_iter()
                .map(|linear| Output {
                    weight: &block.linears[linear],
                    bias: self.bias(block, linear),
                    out: to[linear - linears[0]].0,
                    stride: to[linear - linears[0]].1,
                })
                .collect();
            launcher.product(&prepare(&outputs, self.inputs(), launcher.tokens, false)?)?;
        }
        Ok(())
    }

    /// A linear that is added to the hidden states.
    fn queue_into_hidden(
        &self,
        launcher: &Launcher<'_>,
        block: &Block,
        linear: usize,
    ) -> Result<()> {
        let output = Output {
            weight: &block.linears[linear],
            bias: self.bias(block, linear),
            out: self.at(&self.room.hidden),
            stride: self.width(),
        };
        launcher.product(&prepare(&[output], self.inputs(), launcher.tokens, true)?)
    }

    fn bias(&self, block: &Block, linear: usize) -> u64 {
        block.biases[linear].as_ref().map_or(0, |bias| self.at(bias))
    }
}
