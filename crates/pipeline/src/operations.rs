//! Floating-point operations of calibrated blocks, by stage: what `plan` adds up, `bench` divides by
//! seconds, and predictions divide by rates. They are counted here alone.

use std::collections::BTreeSet;

use gptq_checkpoint::{Expert, Experts, LinearShape, ModelConfig};
use gptq_model::{LinearId, Reading, Stage};
use gptq_quant::{Choices, Rotate, ValueInputs};
use serde::Serialize;

use crate::calibrate::Sample;
use crate::work::Work;

/// Operations, one multiply-add being two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Operations {
    /// A forward over every window.
    pub forward: f64,
    /// Gram matrices, upper triangles only.
    pub gram: f64,
    /// Cholesky factors and triangular inverses.
    pub factor: f64,
    /// The solver's updates.
    pub solve: f64,
    /// The unquantized model's forward, where a recipe walks it.
    pub reference: f64,
    /// Shifted weights: the products that compare the two models.
    pub shift: f64,
    /// Tuning the scales of the whole model, where a recipe does.
    #[serde(skip_serializing_if = "is_none")]
    pub tune: f64,
    /// Learning the residual stream's rotation, where a recipe does.
    #[serde(skip_serializing_if = "is_none")]
    pub learn: f64,
}

/// Plans of recipes that do neither stay as they were before there was tuning or learning.
fn is_none(count: &f64) -> bool {
    *count == 0.0
}

/// What the operations of a block follow from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockKind {
    pub(crate) linears: Vec<LinearShape>,
    /// Tokens that a token attends to at most.
    pub(crate) window: Option<usize>,
    pub(crate) routing: Option<Routing>,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
}

/// What a recipe has computed beside the solve of what goes forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extras {
    /// The unquantized model is walked too.
    pub(crate) reference: bool,
    /// v's Hessian is of what attention makes of its inputs.
    pub(crate) attended: bool,
    /// Weights are turned by a matrix.
    pub(crate) learned: bool,
}

impl Extras {
    /// The unquantized model's walk alone.
    pub(crate) const REFERENCE: Self = Self { reference: true, attended: false, learned: false };

    /// That of a recipe's choices.
    pub(crate) fn of(choices: &Choices) -> Self {
        Self {
            reference: choices.needs_reference(),
            attended: choices.values == ValueInputs::Attended,
            learned: choices.rotate == Rotate::Learned,
        }
    }
}

/// How a router spreads tokens over experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Routing {
    /// Experts that it chooses from.
    pub(crate) count: usize,
    /// How many it chooses.
    pub(crate) per_token: usize,
    /// Rows of its weights, and of the shared expert's own gate.
    pub(crate) rows: usize,
}

impl Routing {
    fn of(experts: &Experts) -> Self {
        let Experts { count, per_token, shared, .. } = *experts;
        let rows = count + usize::from(shared.is_some_and(|shared| shared.gated));
        Self { count, per_token, rows }
    }
}

impl BlockKind {
    /// That of a model's block.
    pub(crate) fn of(model: &ModelConfig, block: usize) -> Self {
        Self {
            linears: model.block_linears(block),
            window: model.block_attention(block).window,
            routing: model.experts(block).map(Routing::of),
            kv_heads: model.num_key_value_heads,
        }
    }

    /// Of all tokens, those that a linear sees where a router spreads them evenly.
    fn share(&self, linear: LinearId) -> f64 {
        match (linear.expert(), self.routing) {
            (Some(Expert::Routed(_)), Some(Routing { count, per_token, .. })) => {
                per_token as f64 / count as f64
            }
            _ => 1.0,
        }
    }

    /// Operations that route a token.
    fn routed(&self) -> f64 {
        let Some(routing) = self.routing else { return 0.0 };
        let inputs = self.linears.iter().find(|linear| Stage::of(linear.id) == Stage::GateUp);
        2.0 * routing.rows as f64 * inputs.map_or(0, |linear| linear.in_features) as f64
    }
}

impl Operations {
    /// Of a block over `windows` windows of `seq_len` tokens, of which each expert sees as many.
    pub(crate) fn of_block(
        block: &BlockKind,
        (windows, seq_len): (usize, usize),
        Extras { reference, attended, learned }: Extras,
    ) -> Self {
        let BlockKind { linears, window, .. } = block;
        let tokens = windows as f64 * seq_len as f64;
        // Causal attention: half of the scores' square, and as much again for the contexts.
        let output = linears.iter().find(|linear| linear.id == LinearId::O);
        let width = output.map_or(0, |linear| linear.in_features);
        let length = seq_len as f64;
        let reach = match window {
            Some(window) if *window < seq_len => {
                let window = *window as f64;
                2.0 * window - window * window / length
            }
            _ => length,
        };
        let mut sum = Self { forward: 2.0 * tokens * reach * width as f64, ..Self::default() };
        sum.forward += tokens * block.routed();
        let mut counted = BTreeSet::new();
        for linear in linears {
            let (rows, n) = (linear.out_features as f64, linear.in_features as f64);
            let stage = Stage::of(linear.id);
            let all_tokens = tokens;
            let tokens = tokens * block.share(linear.id);
            sum.forward += 2.0 * tokens * n * rows;
            sum.solve += rows * n * n;
            // By both halves of the matrix.
            let turned = if matches!(stage, Stage::Output | Stage::Down) { rows } else { n };
            sum.learn += if learned { 4.0 * rows * n * turned } else { 0.0 };
            // k and v share q's inputs, and up shares gate's; every expert has its own.
            if counted.insert(Reading::of(linear.id)) {
                sum.gram += tokens * n * n;
                sum.factor += 2.0 / 3.0 * n * n * n;
            }
            // The drift times the inputs, taken over the Hessian as triangles.
            let moves = matches!(stage, Stage::Output | Stage::Down);
            if reference && moves && linear.id.expert().is_none() {
                sum.shift += rows * n * (2.0 * all_tokens + 2.0 * n);
            }
        }
        sum.reference = if reference { sum.forward } else { 0.0 };
        let value = linears.iter().find(|linear| linear.id == LinearId::V);
        if let Some(value) = value.filter(|_| attended) {
            let n = value.in_features;
            let sample = Sample::of((windows, seq_len), n, block.kv_heads);
            let (n, seen) = (n as f64, sample.windows(windows) as f64 * length);
            // Queries, keys and values once more; then one head's attention, as wide as the inputs.
            let inputs = linears.iter().filter(|linear| Stage::of(linear.id) == Stage::Qkv);
            let rows: usize = inputs.map(|linear| linear.out_features).sum();
            let heads = seen * sample.heads() as f64;
            sum.forward += 2.0 * seen * n * rows as f64 + 2.0 * heads * reach * n;
            sum.gram += heads * n * n;
            sum.factor += 2.0 / 3.0 * n * n * n;
        }
        sum
    }

    /// Of all blocks of a model.
    pub(crate) fn of_model(model: &ModelConfig, tokens: (usize, usize), extras: Extras) -> Self {
        let mut kinds: Vec<(BlockKind, usize)> = Vec::new();
        for block in 0..model.num_hidden_layers {
            let found = BlockKind::of(model, block);
            match kinds.iter_mut().find(|(kind, _)| *kind == found) {
                Some((_, count)) => *count += 1,
                None => kinds.push((found, 1)),
            }
        }
        let of_kind = |(kind, count): (BlockKind, usize)| {
            Self::of_block(&kind, tokens, extras).times(count as f64)
        };
        kinds.into_iter().map(of_kind).reduce(Self::plus).unwrap_or_default()
    }

    /// Both.
    fn plus(self, other: Self) -> Self {
        Self {
            forward: self.forward + other.forward,
            gram: self.gram + other.gram,
            factor: self.factor + other.factor,
            solve: self.solve + other.solve,
            reference: self.reference + other.reference,
            shift: self.shift + other.shift,
            tune: self.tune + other.tune,
            learn: self.learn + other.learn,
        }
    }

    /// Of so many.
    fn times(self, blocks: f64) -> Self {
        Self {
            forward: self.forward * blocks,
            gram: self.gram * blocks,
            factor: self.factor * blocks,
            solve: self.solve * blocks,
            reference: self.reference * blocks,
            shift: self.shift * blocks,
            tune: self.tune * blocks,
            learn: self.learn * blocks,
        }
    }

    /// Those of a stage; what moves data has none.
    pub(crate) fn of(&self, work: Work) -> f64 {
        match work {
            Work::Forward => self.forward,
            Work::Gram => self.gram,
            Work::Factor => self.factor,
            Work::Solve => self.solve,
            Work::Reference => self.reference,
            Work::Shift => self.shift,
            Work::Tune => self.tune,
            Work::Exchange | Work::Pack => 0.0,
        }
    }

    /// The sum.
    pub fn total(&self) -> f64 {
        let walk = self.forward + self.gram + self.factor + self.solve;
        walk + self.reference + self.shift + self.tune + self.learn
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;
    use crate::bench::Width;

    /// Counted by hand for a 70B block: 32 of 128 windows, 4 heads of each.
    #[test]
    fn a_hessian_of_attended_inputs_takes_attention_over_all_of_them() {
        let kind = "70b".parse::<Width>().unwrap().kind();
        let with = |attended| {
            Operations::of_block(&kind, (128, 4096), Extras { attended, ..Extras::REFERENCE })
        };
        let (plain, attended) = (with(false), with(true));
        let (n, tokens) = (8192.0_f64, 32.0 * 4096.0);
        let projections = 2.0 * tokens * n * (8192.0 + 2.0 * 1024.0);
        let attention = 4.0 * 2.0 * tokens * 4096.0 * n;
        let near = |found: f64, wanted: f64| {
            assert!((found / wanted - 1.0).abs() < 1e-9, "{found} {wanted}");
        };
        near(attended.forward - plain.forward, projections + attention);
        near(attended.gram - plain.gram, 4.0 * tokens * n * n);
        near(attended.factor - plain.factor, 2.0 / 3.0 * n * n * n);
        assert_eq!((attended.solve, attended.reference), (plain.solve, plain.reference));
    }

    /// A Llama of 70B parameters.
    pub(crate) fn llama_70b() -> ModelConfig {
        model(
            r#"{"model_type":"llama","hidden_size":8192,"intermediate_size":28672,
            "num_hidden_layers":80,"num_attention_heads":64,"num_key_value_heads":8,
            "vocab_size":32000,"max_position_embeddings":4096}"#,
        )
    }

    pub(crate) fn model(text: &str) -> ModelConfig {
        ModelConfig::parse(text, Path::new("config.json")).unwrap()
    }

    /// Numbers of the two counts that `plan` and `bench` each had of their own.
    #[test]
    fn a_models_operations_are_those_that_plan_counted() {
        let qwen3 = model(
            r#"{"model_type":"qwen3","hidden_size":1024,"intermediate_size":3072,"head_dim":128,
            "num_hidden_layers":28,"num_attention_heads":16,"num_key_value_heads":8,
            "vocab_size":151936,"max_position_embeddings":40960}"#,
        );
        let smollm2 = model(
            r#"{"model_type":"llama","hidden_size":576,"intermediate_size":1536,
            "num_hidden_layers":30,"num_attention_heads":9,"num_key_value_heads":3,
            "vocab_size":49152,"max_position_embeddings":2048}"#,
        );
        // Forward, Gram, factor, solve, and shift with the reference's forward in it.
        let counted: [(_, _, [f64; 5]); 3] = [
            (
                llama_70b(),
                (128, 4096),
                [
                    7.459086882832384e16,
                    4.292493394837504e16,
                    1345069224645973.3,
                    945579999887360.0,
                    1.0108909905772544e17,
                ],
            ),
            (
                qwen3,
                (96, 2048),
                [
                    219352569741312.0,
                    86586540687360.0,
                    741597686442.6667,
                    691489734656.0,
                    277858614247424.0,
                ],
            ),
            (
                smollm2,
                (3, 77),
                [49664482560.0, 23247544320.0, 83943751680.0, 86633349120.0, 159528787200.0],
            ),
        ];
        for (model, tokens, [forward, gram, factor, solve, shift]) in counted {
            let all = Operations::of_model(&model, tokens, Extras::REFERENCE);
            let with_reference = all.shift + all.reference;
            assert_eq!(
                (all.forward, all.gram, all.factor, all.solve, with_reference),
                (forward, gram, factor, solve, shift)
            );
            assert_eq!(all.reference, forward);
            assert_eq!(all.total(), forward + gram + factor + solve + with_reference);
            let alone = Operations { reference: 0.0, shift: 0.0, ..all };
            assert_eq!(Operations::of_model(&model, tokens, Extras::default()), alone);
        }
    }

    #[test]
    fn a_blocks_operations_are_those_that_bench_divided_by_seconds() {
        // Forward, Gram, factor, solve, reference, shift.
        let counted: [(&str, (usize, usize), [f64; 6]); 4] = [
            (
                "tiny",
                (3, 77),
                [372438528.0, 181665792.0, 335544320.0, 301989888.0, 372438528.0, 456654848.0],
            ),
            (
                "smollm2",
                (128, 4096),
                [
                    6184752906240.0,
                    1758789107712.0,
                    2798125056.0,
                    2887778304.0,
                    6184752906240.0,
                    1278705401856.0,
                ],
            ),
            (
                "13b",
                (128, 4096),
                [
                    354592499957760.0,
                    141424683122688.0,
                    2029640482816.0,
                    2240093880320.0,
                    354592499957760.0,
                    103930155499520.0,
                ],
            ),
            (
                "70b",
                (128, 4096),
                [
                    932385860354048.0,
                    536561674354688.0,
                    16813365308074.666,
                    11819749998592.0,
                    932385860354048.0,
                    331227877867520.0,
                ],
            ),
        ];
        let stages =
            [Work::Forward, Work::Gram, Work::Factor, Work::Solve, Work::Reference, Work::Shift];
        for (width, tokens, expected) in counted {
            let kind = width.parse::<Width>().unwrap().kind();
            let block = Operations::of_block(&kind, tokens, Extras::REFERENCE);
            assert_eq!(stages.map(|stage| block.of(stage)), expected, "{width}");
            assert_eq!((block.of(Work::Exchange), block.of(Work::Pack)), (0.0, 0.0));
        }
    }

    /// Counted by hand: Mixtral's block, of whose tokens each expert sees a quarter.
    #[test]
    fn experts_see_their_share_and_are_solved_each() {
        let mixtral = model(
            r#"{"model_type":"mixtral","hidden_size":4096,"intermediate_size":14336,
            "num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,
            "num_local_experts":8,"num_experts_per_tok":2,
            "vocab_size":32000,"max_position_embeddings":32768}"#,
        );
        let (windows, seq_len) = (128, 2048);
        let tokens = (windows * seq_len) as f64;
        let (h, kv, inner) = (4096.0, 1024.0, 14336.0);
        let attention = 2.0 * tokens * 2048.0 * h;
        let projections = 2.0 * tokens * (2.0 * h * h + 2.0 * h * kv);
        let router = 2.0 * tokens * h * 8.0;
        let routed = 2.0 * 2.0 * tokens * 3.0 * h * inner;
        let all = Operations::of_model(&mixtral, (windows, seq_len), Extras::REFERENCE);
        let near = |found: f64, of_block: f64| {
            let wanted = 32.0 * of_block;
            assert!((found / wanted - 1.0).abs() < 1e-12, "{found} {wanted}");
        };
        near(all.forward, attention + projections + router + routed);
        near(all.reference, attention + projections + router + routed);
        near(all.gram, tokens * (2.0 * h * h + 2.0 * (h * h + inner * inner)));
        near(all.factor, 2.0 / 3.0 * (2.0 * h.powi(3) + 8.0 * (h.powi(3) + inner.powi(3))));
        let solve_of_experts = 8.0 * (2.0 * inner * h * h + h * inner * inner);
        near(all.solve, (2.0 * h + 2.0 * kv) * h * h + solve_of_experts);
        // o alone.
        near(all.shift, h * h * (2.0 * tokens + 2.0 * h));
    }
}
