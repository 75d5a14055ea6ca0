//! Calibrating the experts of a block, one after the other.
//!
//! What gate and up read is made once for all experts, before any of them adds to the residual stream, and
//! kept; a router sends each token's row of it to a few experts, and its choice depends on no expert. Of each
//! expert the rows are then gathered chunk by chunk: their Gram, its gate and up solved, what these make of
//! them, the Gram of that, its down solved, and its part added to the states, in the order of the block's own
//! forward, so that the states are those of the file to the bit. One expert's Hessian is held at a time.
//!
//! The shared expert, which every token goes through, is one more of these. Routers stay as they are. Downs of
//! experts are not shifted: what the stream lacks is no expert's own, and each sees its own few tokens only.

use gptq_checkpoint::Expert;
use gptq_compute::{Device, Gram, Tensor};
use gptq_model::{Block, LinearId, Routes, Stage};
use gptq_quant::Factored;

use super::{Along, BlockRun, Work};
use crate::chunk_store::ChunkStore;
use crate::error::Result;
use crate::memory::kept_activations;
use crate::row_shards::summed;

/// What the experts of a block have in common.
struct Layer {
    /// What gate and up read, `[tokens, hidden]` a chunk.
    inputs: ChunkStore,
    /// Which tokens of a chunk go through which expert.
    routes: Vec<Routes>,
    /// Tokens of all chunks and ranks.
    tokens: u64,
    /// Those of each routed expert.
    routed: Vec<u64>,
    /// Activations of an expert that are kept on this rank, in values.
    room: usize,
    /// The Hessian of all tokens, once it is needed.
    all_tokens: Option<(Gram, Factored)>,
}

impl Layer {
    /// Tokens that go through an expert, on all ranks.
    fn seen(&self, expert: Expert) -> u64 {
        match expert {
            Expert::Routed(number) => self.routed[usize::from(number)],
            Expert::Shared => self.tokens,
        }
    }

    /// Whether an expert sees too few tokens for a Hessian of so many inputs: one of fewer tokens than
    /// inputs is singular, whatever they are, and what is solved along it is fitted to damping wherever
    /// these tokens do not reach. That of all tokens knows at least what is usual in the block.
    fn is_short(&self, expert: Expert, inputs: usize) -> bool {
        let seen = self.seen(expert);
        seen < inputs as u64 && seen < self.tokens
    }

    /// Tokens that go through an expert on this rank.
    fn own(&self, expert: Expert) -> usize {
        self.routes.iter().map(|routes| routes.tokens(expert)).sum()
    }
}

/// Rows of the inputs.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    /// Of the tokens that a router sends to the expert.
    Routed,
    /// Of all tokens.
    All,
}

impl Of {
    /// What an expert reads in the block's forward.
    fn read_by(expert: Expert) -> Self {
        if expert == Expert::Shared { Self::All } else { Self::Routed }
    }
}

impl BlockRun<'_, '_, '_> {
    /// Quantizes every expert of `block`, and moves the states past them.
    pub(super) fn experts(&mut self, block: &mut Block) -> Result<()> {
        let mut layer = self.layer(block)?;
        // All of o's inputs are used up.
        self.stream.kept = None;
        for expert in block.experts() {
            self.expert(block, &mut layer, expert)?;
        }
        let all = self.all;
        let Some((dense, states)) = &mut self.reference else { return Ok(()) };
        for chunk in 0..states.seq_lens.len() {
            let hidden = states.past(all, dense, Stage::Down, chunk)?;
            states.hidden.put(chunk, hidden)?;
        }
        Ok(self.timer.mark(Work::Reference)?)
    }

    /// Adds o's products to the states, and routes what comes of them.
    fn layer(&mut self, block: &Block) -> Result<Layer> {
        let all = self.all;
        let chunks = self.stream.states.seq_lens.len();
        let mut inputs = ChunkStore::new(all.device, chunks, all.offload.inputs);
        let mut routes = Vec::with_capacity(chunks);
        let mut tokens = 0;
        for chunk in 0..chunks {
            let input = self.stream.input(all, block, Stage::GateUp, chunk)?;
            routes.push(block.routes(all.device, &input)?);
            tokens += input.rows();
            inputs.put(chunk, input)?;
        }
        self.timer.mark(Work::Forward)?;
        let mixture = block.mixture().map(|mixture| &mixture.experts);
        let count = mixture.map_or(0, |experts| experts.count);
        let of = |number| routes.iter().map(|r| r.tokens(Expert::Routed(number))).sum::<usize>();
        let mut counts: Vec<f64> = (0..count as u16).map(|number| of(number) as f64).collect();
        counts.push(tokens as f64);
        let counts = summed(all.ranks, counts)?;
        self.exchanged()?;
        let counts: Vec<u64> = counts.into_iter().map(|count| count as u64).collect();
        Ok(Layer {
            inputs,
            routes,
            tokens: counts[count],
            routed: counts[..count].to_vec(),
            room: mixture.map_or(0, |experts| kept_activations(experts, tokens)),
            all_tokens: None,
        })
    }

    /// One expert: gate and up, then down, then what it adds.
    fn expert(&mut self, block: &mut Block, layer: &mut Layer, expert: Expert) -> Result<()> {
        let (gate, up, down) = (expert.gate(), expert.up(), expert.down());
        let width = block.linear(down).weight.cols();
        let hidden = block.linear(gate).weight.cols();
        let few = layer.is_short(expert, hidden);
        if few || expert == Expert::Shared {
            let (gram, factored) = match layer.all_tokens.take() {
                Some(known) => known,
                None => self.all_tokens(block, layer, expert)?,
            };
            self.solved(block, &[gate, up], (&gram, &factored))?;
            layer.all_tokens = Some((gram, factored));
        } else {
            let gram = self.gram_of(block, layer, (expert, Of::Routed), None)?;
            let factored = self.factor(&gram, &block.linear(gate).name)?;
            self.solved(block, &[gate, up], (&gram, &factored))?;
        }
        self.note(layer, expert, few, 2);
        let few = layer.is_short(expert, width);
        let keeps = !few && layer.own(expert) * width <= layer.room;
        let chunks = layer.routes.len();
        let mut kept =
            keeps.then(|| ChunkStore::new(self.all.device, chunks, self.all.offload.inputs));
        let of = if few { Of::All } else { Of::read_by(expert) };
        let gram = self.gram_of(block, layer, (expert, of), Some(&mut kept))?;
        let factored = self.factor(&gram, &block.linear(down).name)?;
        self.solved(block, &[down], (&gram, &factored))?;
        drop((gram, factored));
        self.note(layer, expert, few, 1);
        self.add(block, layer, expert, kept)
    }

    /// The Hessian of all tokens, which `expert` is the first to need.
    fn all_tokens(
        &mut self,
        block: &Block,
        layer: &mut Layer,
        expert: Expert,
    ) -> Result<(Gram, Factored)> {
        let gram = self.gram_of(block, layer, (expert, Of::All), None)?;
        let factored = self.factor(&gram, &block.linear(expert.gate()).name)?;
        self.timer.mark(Work::Factor)?;
        Ok((gram, factored))
    }

    /// Solves linears along the Hessian of what they read.
    fn solved(
        &mut self,
        block: &mut Block,
        ids: &[LinearId],
        (gram, factored): (&Gram, &Factored),
    ) -> Result<()> {
        let energies = self.energies(block, ids, gram)?;
        self.timer.mark(Work::Factor)?;
        self.solve(block, ids, Along { all: factored, values: None }, None, &energies)
    }

    /// Writes of the last `count` linears down what they saw.
    fn note(&mut self, layer: &Layer, expert: Expert, few_tokens: bool, count: usize) {
        if expert == Expert::Shared {
            return;
        }
        let first = self.linears.len() - count;
        for linear in &mut self.linears[first..] {
            (linear.tokens, linear.few_tokens) = (Some(layer.seen(expert)), few_tokens);
        }
    }

    /// XᵀX of rows of the layer's inputs, or with `activations` of what the expert's gate and up make of them;
    /// those are kept where there is a place for them.
    fn gram_of(
        &mut self,
        block: &Block,
        layer: &mut Layer,
        (expert, of): (Expert, Of),
        mut activations: Option<&mut Option<ChunkStore>>,
    ) -> Result<Gram> {
        let device = self.all.device;
        let order = if activations.is_some() { expert.down() } else { expert.gate() };
        let mut gram = device.gram(block.linear(order).weight.cols())?;
        let Layer { inputs, routes, .. } = layer;
        for (chunk, routes) in routes.iter().enumerate() {
            let Some(kept) = &mut activations else {
                with_rows((device, block), inputs, (chunk, routes), (expert, of), |rows| {
                    self.timer.mark(Work::Forward)?;
                    Ok(device.gram_add(&mut gram, rows)?)
                })?;
                self.timer.mark(Work::Gram)?;
                continue;
            };
            let made = activation((device, block), inputs, (chunk, routes), (expert, of))?;
            self.timer.mark(Work::Forward)?;
            let Some(made) = made else { continue };
            device.gram_add(&mut gram, &made)?;
            self.timer.mark(Work::Gram)?;
            if let Some(kept) = kept {
                kept.put(chunk, made)?;
            }
        }
        gram.sum_over(self.all.ranks)?;
        self.exchanged()?;
        Ok(gram)
    }

    /// Adds what an expert gives to the states of its tokens.
    fn add(
        &mut self,
        block: &Block,
        layer: &mut Layer,
        expert: Expert,
        mut kept: Option<ChunkStore>,
    ) -> Result<()> {
        let device = self.all.device;
        let Layer { inputs, routes, .. } = layer;
        for (chunk, routes) in routes.iter().enumerate() {
            if routes.tokens(expert) == 0 {
                continue;
            }
            let of = Of::read_by(expert);
            let made = match &mut kept {
                Some(kept) => Some(kept.take(chunk)?),
                None => activation((device, block), inputs, (chunk, routes), (expert, of))?,
            };
            let Some(made) = made else { continue };
            let mut hidden = self.stream.states.hidden.take(chunk)?;
            block.expert_output(device, expert, routes, &made, &mut hidden)?;
            self.stream.states.hidden.put(chunk, hidden)?;
        }
        Ok(self.timer.mark(Work::Forward)?)
    }
}

/// What `with` makes of rows of a chunk's inputs; `None` where there are none.
fn with_rows<R>(
    (device, block): (&Device, &Block),
    inputs: &mut ChunkStore,
    (chunk, routes): (usize, &Routes),
    (expert, of): (Expert, Of),
    with: impl FnOnce(&Tensor) -> Result<R>,
) -> Result<Option<R>> {
    if of == Of::Routed && routes.tokens(expert) == 0 {
        return Ok(None);
    }
    inputs.read(chunk, |input| match of {
        Of::All => with(input).map(Some),
        Of::Routed => {
            let rows = block.expert_input(device, expert, routes, input)?;
            rows.map(|rows| with(&rows)).transpose()
        }
    })
}

/// What an expert's gate and up make of them.
fn activation(
    (device, block): (&Device, &Block),
    inputs: &mut ChunkStore,
    (chunk, routes): (usize, &Routes),
    (expert, of): (Expert, Of),
) -> Result<Option<Tensor>> {
    with_rows((device, block), inputs, (chunk, routes), (expert, of), |rows| {
        Ok(block.expert_activation(device, expert, rows)?)
    })
}
