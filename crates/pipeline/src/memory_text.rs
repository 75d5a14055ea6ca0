//! Memory of a GPU that makes text, from config.json alone.

use std::collections::BTreeMap;

use gptq_checkpoint::ModelConfig;
use gptq_compute::Resident;
use gptq_model::PASS_TOKENS;
use serde::Serialize;

/// Bytes of an fp16 value.
const HALF: usize = 2;

/// What a GPU holds while text is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TextMemory {
    /// Codes or fp16 values of all linears, and the head.
    pub weights: u64,
    /// Keys and values of one text of `context` tokens.
    pub cache: u64,
    /// Tokens of that text.
    pub context: usize,
    /// What a prompt takes besides while it is read: the widest linear in fp16, and activations.
    pub prompt: u64,
}

impl TextMemory {
    /// Of symmetric codes of so many bits and groups, or with 16 bits of the dense model.
    #[must_use]
    pub fn of(model: &ModelConfig, bits: u8, group: Option<usize>, context: usize) -> Self {
        let head = (model.vocab_size, model.hidden_size);
        let linears = model.linears().map(|(_, linear)| linear.sides());
        let linears: usize = linears.map(|s| Resident::bytes_on_gpu(bits, s, group)).sum();
        let weights = linears + Resident::bytes_on_gpu(16, head, None);
        let keys = model.num_key_value_heads * model.head_dim;
        let widest = model.linears().map(|(_, l)| l.out_features * l.in_features * HALF).max();
        let widest = widest.unwrap_or(0);
        // Hidden states in f32, and the inputs and outputs of all linears of a block, as if at once; of
        // experts those of the widest, which are used one after the other.
        let of_block = |block| -> usize {
            let (mut always, mut experts) = (0, BTreeMap::new());
            for linear in model.block_linears(block) {
                let values = linear.out_features + linear.in_features;
                match linear.id.expert() {
                    Some(expert) => *experts.entry(expert).or_insert(0) += values,
                    None => always += values,
                }
            }
            always + experts.into_values().max().unwrap_or(0)
        };
        let wide = (0..model.num_hidden_layers).map(of_block).max().unwrap_or(0);
        let activations = PASS_TOKENS * (model.hidden_size * 4 + wide * HALF);
        Self {
            weights: weights as u64,
            cache: (2 * keys * HALF * model.num_hidden_layers * context) as u64,
            context,
            prompt: (widest + activations) as u64,
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.cache + self.prompt
    }
}
