//! Perplexity protocols: which tokens are shown to the model, and which of them are scored.
//!
//! Published perplexities of one model on one text differ by more than quantization costs, because
//! papers, llama.cpp and the Hugging Face guide cut the text differently. A protocol fixes all of
//! it: how rows become one text, the windows, and the scored targets. Every protocol reduces the
//! same way: perplexity = exp(mean of −log p over all scored tokens). For `paper` and `llama-cpp`
//! that equals the mean over windows of each window's mean, since all their windows score equally
//! many tokens; for `strided` it does not, and the mean over tokens is the definition.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::dataset::Join;
use crate::error::{Error, Result};

/// The step between the windows of `strided`, in tokens, as in the Hugging Face guide.
const STRIDE: usize = 512;

/// How perplexity is measured. See the variants for the exact windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The GPTQ paper's (IST-DASLab `llama.py:llama_eval`, AWQ, `OmniQuant`, AQLM): rows joined
    /// by blank lines, encoded once, non-overlapping windows, the remainder dropped, and every
    /// target of a window but its first token scored.
    Paper,
    /// llama.cpp's and AutoGPTQ's (`perplexity_utils.py`): the card join, non-overlapping windows,
    /// the first token of each replaced by BOS where the tokenizer adds one, and the second half
    /// scored. AutoGPTQ scores from
    /// target 513 on when windows exceed 1024 tokens; this follows llama.cpp there.
    LlamaCpp,
    /// The Hugging Face guide's: windows overlap, each token is scored once, and all but the first
    /// window's have at least `seq_len − stride` tokens of context.
    Strided,
}

/// One sequence to run through the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvalWindow {
    /// The tokens shown, at most `seq_len`.
    pub tokens: Vec<u32>,
    /// Targets `tokens[score_from..]` are scored, target t by the logits of position t − 1. Always
    /// at least 1 and less than the number of tokens.
    pub score_from: usize,
}

impl EvalWindow {
    /// How many targets this window adds to the mean.
    #[must_use]
    pub fn scored(&self) -> usize {
        self.tokens.len() - self.score_from
    }
}

impl Protocol {
    /// All protocols, in the order in which help texts list them.
    pub const ALL: [Self; 3] = [Self::Paper, Self::LlamaCpp, Self::Strided];

    /// The name used on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper",
            Self::LlamaCpp => "llama-cpp",
            Self::Strided => "strided",
        }
    }

    /// How a dataset's rows become the one text that is encoded.
    #[must_use]
    pub fn join(self) -> Join {
        match self {
            Self::Paper | Self::Strided => Join::Paragraphs,
            Self::LlamaCpp => Join::Card,
        }
    }

    /// The window length in tokens when none is asked for; `context` is the model's
    /// `max_position_embeddings`, which no default exceeds.
    #[must_use]
    pub fn default_seq_len(self, context: usize) -> usize {
        match self {
            Self::Paper => context.min(2048),
            Self::LlamaCpp => context.min(512),
            Self::Strided => context,
        }
    }

    /// The step between windows in tokens. That of `strided` is 512, or half a window where the
    /// window is no longer than that: without an overlap, tokens at the seams would go unscored.
    #[must_use]
    pub fn stride(self, seq_len: usize) -> usize {
        match self {
            Self::Paper | Self::LlamaCpp => seq_len,
            Self::Strided if seq_len > STRIDE => STRIDE,
            Self::Strided => (seq_len / 2).max(1),
        }
    }

    /// Tokens of a text that so many windows are cut from.
    #[must_use]
    pub fn tokens_of(self, windows: usize, seq_len: usize) -> usize {
        let steps = windows.saturating_sub(1).saturating_mul(self.stride(seq_len));
        steps.saturating_add(seq_len)
    }

    /// Whether the windows of a text begin with BOS where the tokenizer adds one.
    #[must_use]
    pub fn takes_bos(self) -> bool {
        self == Self::LlamaCpp
    }

    /// Cuts an encoded text into windows.
    ///
    /// `ids` is the text, encoded once, at least the [tokens](Self::tokens_of) of `max_windows`
    /// windows or all that it has; `seq_len` the window length in tokens; `bos` the BOS that the
    /// tokenizer adds, which `llama-cpp` puts at the start of each window (None leaves the text's
    /// own token there) and the others ignore; `max_windows` keeps only the first so many.
    ///
    /// # Errors
    /// When `seq_len` is too short to score anything, when the text does not fill one window
    /// (`strided` needs two tokens only), or when `max_windows` is 0.
    pub fn windows(
        self,
        ids: &[u32],
        seq_len: usize,
        bos: Option<u32>,
        max_windows: Option<usize>,
    ) -> Result<Vec<EvalWindow>> {
        self.check(ids.len(), seq_len, max_windows)?;
        let limit = max_windows.unwrap_or(usize::MAX);
        Ok(match self {
            Self::Paper => ids
                .chunks_exact(seq_len)
                .take(limit)
                .map(|chunk| EvalWindow { tokens: chunk.to_vec(), score_from: 1 })
                .collect(),
            Self::LlamaCpp => {
                ids.chunks_exact(seq_len).take(limit).map(|chunk| second_half(chunk, bos)).collect()
            }
            Self::Strided => overlapping(ids, seq_len, self.stride(seq_len), limit),
        })
    }

    fn check(self, tokens: usize, seq_len: usize, max_windows: Option<usize>) -> Result<()> {
        let (least, needed) = match self {
            Self::Paper => (2, seq_len),
            // Two tokens have their only target in the first half.
            Self::LlamaCpp => (3, seq_len),
            Self::Strided => (2, 2),
        };
        if seq_len < least {
            return Err(Error::WindowTooShort { protocol: self.name(), seq_len, least });
        }
        if tokens < needed {
            return Err(Error::EvaluationTextTooShort { protocol: self.name(), tokens, needed });
        }
        if max_windows == Some(0) {
            return Err(Error::NoWindows);
        }
        Ok(())
    }
}

/// A `llama-cpp` window: logits L/2 to L−2 are scored, that is targets L/2+1 to L−1 (255 of 512).
fn second_half(chunk: &[u32], bos: Option<u32>) -> EvalWindow {
    let mut tokens = chunk.to_vec();
    if let (Some(first), Some(bos)) = (tokens.first_mut(), bos) {
        *first = bos;
    }
    EvalWindow { tokens, score_from: chunk.len() / 2 + 1 }
}

/// Windows every `stride` tokens up to the one that reaches the end of the text, each scoring what
/// the one before it did not reach. `stride < seq_len` keeps a token of context before each target.
fn overlapping(ids: &[u32], seq_len: usize, stride: usize, limit: usize) -> Vec<EvalWindow> {
    let mut windows = Vec::new();
    // The text's first token has nothing before it to be predicted from.
    let mut next_target = 1;
    for start in (0..ids.len()).step_by(stride) {
        let end = ids.len().min(start.saturating_add(seq_len));
        if next_target == end || windows.len() == limit {
            break;
        }
        windows
            .push(EvalWindow { tokens: ids[start..end].to_vec(), score_from: next_target - start });
        next_target = end;
    }
    windows
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Protocol {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.name() == name)
            .ok_or_else(|| Error::ProtocolUnknown { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: usize) -> Vec<u32> {
        (0..count as u32).collect()
    }

    #[test]
    fn known_window_counts() {
        // format.md §4: LLaMA tokens of the wikitext-2-raw-v1 test split under both joins.
        let paper = |seq_len| Protocol::Paper.windows(&ids(341_469), seq_len, None, None);
        assert_eq!(paper(2048).unwrap().len(), 166);
        assert_eq!(paper(4096).unwrap().len(), 83);
        let windows = Protocol::LlamaCpp.windows(&ids(335_688), 512, Some(1), None).unwrap();
        assert_eq!(windows.len(), 655);
    }

    #[test]
    fn paper_scores_all_but_the_first_token_and_drops_the_remainder() {
        let windows = Protocol::Paper.windows(&ids(11), 4, Some(99), None).unwrap();
        let expected = [[0, 1, 2, 3], [4, 5, 6, 7]]
            .map(|tokens| EvalWindow { tokens: tokens.to_vec(), score_from: 1 });
        assert_eq!(windows, expected);
    }

    #[test]
    fn llama_cpp_scores_the_second_half_after_a_bos() {
        let windows = Protocol::LlamaCpp.windows(&ids(1024), 512, Some(7), None).unwrap();
        assert_eq!(windows.len(), 2);
        for (index, window) in windows.iter().enumerate() {
            assert_eq!(window.tokens[0], 7);
            assert_eq!(window.tokens[1], index as u32 * 512 + 1);
            // AutoGPTQ: for j in range(min(512, n_ctx // 2), n_ctx - 1): score tokens[j + 1].
            let targets: Vec<usize> = (window.score_from..512).collect();
            assert_eq!(targets, (256..511).map(|j| j + 1).collect::<Vec<_>>());
            assert_eq!(window.scored(), 255);
        }
        let without = Protocol::LlamaCpp.windows(&ids(512), 512, None, None).unwrap();
        assert_eq!(without[0].tokens[0], 0);
    }

    #[test]
    fn strided_scores_every_token_but_the_first_exactly_once() {
        let check = |count: usize, seq_len: usize| {
            let ids = ids(count);
            let windows = Protocol::Strided.windows(&ids, seq_len, None, None).unwrap();
            let mut scored = Vec::new();
            for window in &windows {
                assert!(window.tokens.len() <= seq_len);
                assert!(window.score_from >= 1 && window.scored() >= 1, "{count} {seq_len}");
                // Tokens are their own positions here, so contiguity shows that none was skipped.
                assert!(window.tokens.windows(2).all(|pair| pair[1] == pair[0] + 1));
                scored.extend_from_slice(&window.tokens[window.score_from..]);
            }
            assert_eq!(scored, ids[1..], "{count} tokens, seq_len {seq_len}");
        };
        for seq_len in 2..20 {
            for count in 2..70 {
                check(count, seq_len);
            }
        }
        for count in [2, 511, 512, 513, 1024, 1025, 1536, 1537, 2047, 2048, 2049, 5000, 10_007] {
            for seq_len in [511, 512, 513, 700, 1024, 2048, 4096] {
                check(count, seq_len);
            }
        }
    }

    #[test]
    fn strided_windows_follow_the_guide() {
        // max_length 1024, stride 512, 2300 tokens: (begin, end, trg_len) of the guide's loop are
        // (0, 1024, 1024), (512, 1536, 512), (1024, 2048, 512), (1536, 2300, 252).
        let windows = Protocol::Strided.windows(&ids(2300), 1024, None, None).unwrap();
        let shapes: Vec<_> =
            windows.iter().map(|w| (w.tokens[0], w.tokens.len(), w.scored())).collect();
        assert_eq!(
            shapes,
            [(0, 1024, 1023), (512, 1024, 512), (1024, 1024, 512), (1536, 764, 252)]
        );
    }

    #[test]
    fn limits_and_impossible_requests() {
        for protocol in Protocol::ALL {
            assert_eq!(protocol.windows(&ids(9000), 600, None, Some(2)).unwrap().len(), 2);
            assert!(protocol.windows(&ids(9000), 600, None, Some(0)).is_err());
            assert!(protocol.windows(&ids(9000), 1, None, None).is_err());
            assert!(protocol.windows(&ids(1), 600, None, None).is_err());
        }
        assert!(Protocol::LlamaCpp.windows(&ids(9000), 2, None, None).is_err());
        let error = Protocol::Paper.windows(&ids(10), 16, None, None).unwrap_err();
        let text = "The evaluation text has 10 tokens but protocol paper needs 16";
        assert_eq!(error.to_string(), text);
        assert_eq!(error.hint().unwrap(), "use a longer text or a smaller seq_len");
    }

    #[test]
    fn the_first_windows_need_the_first_tokens_only() {
        for protocol in Protocol::ALL {
            for (seq_len, most) in [(600, 1), (600, 3), (300, 5), (4096, 2)] {
                let all = protocol.windows(&ids(20_000), seq_len, Some(7), Some(most)).unwrap();
                let needed = protocol.tokens_of(most, seq_len);
                let first = protocol.windows(&ids(needed), seq_len, Some(7), Some(most)).unwrap();
                assert_eq!(first, all, "{protocol} {seq_len} {most}");
                assert_eq!(all.len(), most);
            }
            assert_eq!(protocol.tokens_of(usize::MAX, 600), usize::MAX);
        }
    }

    #[test]
    fn names_round_trip() {
        for protocol in Protocol::ALL {
            assert_eq!(protocol.to_string().parse::<Protocol>().unwrap(), protocol);
            let json = serde_json::to_string(&protocol).unwrap();
            assert_eq!(json, format!("\"{protocol}\""));
        }
        assert!("Paper".parse::<Protocol>().is_err());
    }

    #[test]
    fn defaults_stay_within_the_context() {
        assert_eq!(Protocol::ALL.map(|p| p.default_seq_len(4096)), [2048, 512, 4096]);
        assert_eq!(Protocol::ALL.map(|p| p.default_seq_len(256)), [256, 256, 256]);
    }
}
