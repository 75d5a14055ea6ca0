//! The evaluation text of a model: dataset, join, tokens, windows.

use gptq_checkpoint::Checkpoint;
use gptq_records::branch_report::calibrated_on;
use gptq_records::dataset_identity::{DatasetIdentity, contaminated};
use gptq_records::digest::sha256;
use serde::{Deserialize, Serialize};

use crate::dataset::{Dataset, DatasetSpec};
use crate::error::Result;
use crate::protocol::{EvalWindow, Protocol};
use crate::tokens::{Encoded, TextTokenizer};

/// A perplexity measurement.
#[derive(Clone, Debug)]
pub struct EvaluationSpec {
    /// The text.
    pub dataset: DatasetSpec,
    /// Windows and reduction.
    pub protocol: Protocol,
    /// Window length; the protocol's own for the model's context otherwise.
    pub seq_len: Option<usize>,
    /// Stop after this many windows.
    pub max_windows: Option<usize>,
}

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
    /// Tokens of the whole text; `null` where it was not read to its end.
    pub tokens_in_text: Option<usize>,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Whether the first token of each window is BOS, put there because the tokenizer adds one;
    /// `null` under protocols that put none.
    #[serde(default)]
    pub window_bos: Option<bool>,
    /// True when the model was calibrated on the same split: its perplexity is optimistic. `null`
    /// where it is not known what the model was calibrated on.
    pub contaminated: Option<bool>,
    /// Rows that the join lets run into the next.
    #[serde(skip)]
    pub glued: usize,
    /// The windows.
    #[serde(skip)]
    pub windows: Vec<EvalWindow>,
}

/// Bytes up to which a text is always read to its end, so that reports can say how many tokens it
/// has; of a longer one no more is encoded than the windows need.
const COUNTED: usize = 4 << 20;

impl EvalText {
    /// SHA-256 (hex) of all windows: where each is scored from as little-endian u64, and its tokens
    /// as u32.
    #[must_use]
    pub fn sha256(&self) -> String {
        let bytes = |w: &EvalWindow| {
            let mut bytes = (w.score_from as u64).to_le_bytes().to_vec();
            bytes.extend(w.tokens.iter().flat_map(|t| t.to_le_bytes()));
            bytes
        };
        sha256(&self.windows.iter().flat_map(bytes).collect::<Vec<u8>>())
    }

    /// The protocol by its name, with what it had to do without.
    #[must_use]
    pub fn protocol(&self) -> String {
        let without = if self.window_bos == Some(false) { " without BOS" } else { "" };
        format!("{}{without}", self.protocol)
    }
}

/// Reads, encodes and cuts the text with the checkpoint's own tokenizer. What the model was calibrated
/// on is `calibration`, or else what the report in the checkpoint's folder says.
///
/// # Errors
/// A tokenizer or text that cannot be read, and a text too short for a window.
pub fn evaluation_text(
    checkpoint: &Checkpoint,
    spec: &EvaluationSpec,
    calibration: Option<&DatasetIdentity>,
) -> Result<EvalText> {
    let config = checkpoint.config();
    let tokenizer = TextTokenizer::open(checkpoint.dir(), config.vocab_size)?;
    let Dataset { rows, identity } = spec.dataset.load()?;
    let protocol = spec.protocol;
    let glued = protocol.join().glued(&rows);
    let text = protocol.join().text(rows);
    let context = config.max_position_embeddings;
    let seq_len = spec.seq_len.unwrap_or_else(|| protocol.default_seq_len(context));
    let enough = match spec.max_windows {
        Some(windows) if text.len() > COUNTED => protocol.tokens_of(windows, seq_len),
        _ => usize::MAX,
    };
    let Encoded { ids, whole } = tokenizer.encode_at_least(&text, enough)?;
    let bos = tokenizer.added_bos();
    Ok(EvalText {
        protocol: protocol.name().to_owned(),
        dataset: identity.name.clone(),
        tokens_in_text: whole.then_some(ids.len()),
        seq_len,
        window_bos: protocol.takes_bos().then_some(bos.is_some()),
        contaminated: match calibration {
            Some(c) => Some(contaminated(c, &identity)),
            None => calibrated_on(checkpoint.dir(), &identity),
        },
        identity,
        glued,
        windows: protocol.windows(&ids, seq_len, bos, spec.max_windows)?,
    })
}
