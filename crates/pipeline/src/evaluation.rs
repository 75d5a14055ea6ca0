//! The evaluation text of a model: dataset, join, tokens, windows.

use gptq_checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

use crate::branch_report::calibrated_on;
use crate::config::EvaluationSpec;
use crate::error::Result;
use crate::identity::{DatasetIdentity, contaminated};
use crate::manifest::sha256;
use crate::protocol::EvalWindow;
use crate::tokens::TextTokenizer;

/// Text to evaluate on, cut into windows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvalText {
    /// Protocol name.
    pub protocol: String,
    /// The dataset.
    pub dataset: String,
    /// What the dataset holds.
    #[serde(skip)]
    pub identity: DatasetIdentity,
    /// Tokens of the whole text.
    pub tokens_in_text: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// True when the model was calibrated on the same split: its perplexity is optimistic. `null`
    /// where it is not known what the model was calibrated on.
    pub contaminated: Option<bool>,
    /// The windows.
    #[serde(skip)]
    pub windows: Vec<EvalWindow>,
}

impl EvalText {
    /// SHA-256 (hex) of all windows: where each is scored from as little-endian u64, and its tokens
    /// as u32.
    pub(crate) fn sha256(&self) -> String {
        let bytes = |w: &EvalWindow| {
            let mut bytes = (w.score_from as u64).to_le_bytes().to_vec();
            bytes.extend(w.tokens.iter().flat_map(|t| t.to_le_bytes()));
            bytes
        };
        sha256(&self.windows.iter().flat_map(bytes).collect::<Vec<u8>>())
    }
}

/// Reads, encodes and cuts the text with the checkpoint's own tokeniser. What the model was calibrated
/// on is `calibration`, or else what the report in the checkpoint's folder says.
pub fn evaluation_text(
    checkpoint: &Checkpoint,
    spec: &EvaluationSpec,
    calibration: Option<&DatasetIdentity>,
) -> Result<EvalText> {
    let config = checkpoint.config();
    let tokenizer = TextTokenizer::open(checkpoint.dir(), config.vocab_size)?;
    let dataset = spec.dataset.load()?;
    let ids = tokenizer.encode(&spec.protocol.join().text(&dataset.rows))?;
    let context = config.context();
    let seq_len = spec.seq_len.unwrap_or_else(|| spec.protocol.default_seq_len(context));
    let windows = spec.protocol.windows(&ids, seq_len, tokenizer.bos(), spec.max_windows)?;
    Ok(EvalText {
        protocol: spec.protocol.name().to_owned(),
        dataset: dataset.identity.name.clone(),
        tokens_in_text: ids.len(),
        seq_len,
        contaminated: match calibration {
            Some(c) => Some(contaminated(c, &dataset.identity)),
            None => calibrated_on(checkpoint.dir(), &dataset.identity),
        },
        identity: dataset.identity,
        windows,
    })
}
