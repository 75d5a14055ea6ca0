//! What was made and how good it is: the report that lies in every checkpoint folder.
//!
//! It holds no seconds, dates or paths, so that two runs of one job leave the same bytes; timings
//! are in the sweep's own `sweep.json`.

use std::path::Path;

use gptq_checkpoint::REPORT_FILE;
use serde::{Deserialize, Serialize};

use crate::dataset_identity::{DatasetIdentity, contaminated};
use crate::error::{Error, Result};
use crate::source_dtype::SourceDtype;

/// The version of the fields below.
pub const REPORT_FORMAT: u32 = 1;
/// The program, as reports and manifests name it.
pub const TOOL: &str = concat!("gptq ", env!("CARGO_PKG_VERSION"));

/// A checkpoint made by this program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BranchReport {
    /// [`REPORT_FORMAT`].
    pub format: u32,
    /// [`TOOL`] of the time.
    pub tool: String,
    /// Hub id of the dense model, or the name of its folder.
    pub model: String,
    /// Branch of the configuration; made of the settings where there was none.
    pub branch: String,
    /// Width of a code.
    pub bits: u8,
    /// Columns of a group; `null` is all of in_features.
    pub group_size: Option<usize>,
    /// Columns solved by descending diag(H).
    pub act_order: bool,
    /// Damping asked for, as a fraction of mean(diag H).
    pub damp: f64,
    /// Solver recipe.
    pub recipe: String,
    /// Its choices, as `KEY=VALUE` parted by spaces; `null` for recipes without calibration.
    pub choices: Option<String>,
    /// What was quantized of the source's weights.
    pub source_dtype: SourceDtype,
    /// Layout of the weight files.
    pub layout: String,
    /// What computed it.
    pub device: String,
    /// How many such devices shared the work: sums are rounded in another order by each number of
    /// them, so files differ. Left out where it is one.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub ranks: usize,
    /// Bytes of the weight files.
    pub file_bytes: u64,
    /// What it was calibrated on; `null` for recipes without calibration.
    pub calibration: Option<CalibrationRecord>,
    /// Linears whose damping had to be raised.
    pub damp_retries: u32,
    /// Linears whose Hessian a GPU had to factor in f64; 0 in reports of versions that did not count.
    #[serde(default)]
    pub f64_retries: u32,
    /// Linears of experts that saw fewer tokens than they have inputs, and were calibrated on all tokens
    /// of their blocks. Left out where there are none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub few_tokens: u32,
    /// Every block, in order.
    pub blocks: Vec<BlockRecord>,
    /// What the Hessian of a fitted head needed; `null` where none was fitted, and in reports of
    /// versions that did not say.
    #[serde(default)]
    pub head: Option<LinearRecord>,
    /// What tuning the scales of the whole model did; left out where nothing was tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<TuningRecord>,
    /// What learning the residual stream's rotation did; left out where none was learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<RotationRecord>,
    /// Measurements from the file; empty until there is one.
    pub evaluations: Vec<EvaluationRecord>,
    /// Results on tasks of a harness, by task and metric; left out until there is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskRecord>,
}

fn one() -> usize {
    1
}

fn is_one(ranks: &usize) -> bool {
    *ranks == 1
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// Calibration windows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// The text, or texts, that they were drawn from.
    pub dataset: DatasetIdentity,
    /// How many.
    pub windows: usize,
    /// How many of each source, in order; left out where there is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_windows: Vec<usize>,
    /// Tokens of each; the most that one has where they are of unequal length.
    pub seq_len: usize,
    /// Tokens of all; left out where each has `seq_len`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Seed of their positions.
    pub seed: u64,
    /// SHA-256 (hex) of all windows' tokens as little-endian u32; of windows of unequal length, the
    /// number of each one's tokens, as such, goes before them.
    pub sha256: String,
}

/// A quantized block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockRecord {
    /// Position in the model.
    pub block: usize,
    /// Its linears in calibration order.
    pub linears: Vec<LinearRecord>,
}

/// A quantized linear in a report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LinearRecord {
    /// Prefix in the checkpoint.
    pub name: String,
    /// Energy of the output error over energy of the outputs, on the calibration windows; `None`
    /// for recipes without calibration, and for weights whose outputs have no energy.
    pub relative_error: Option<f64>,
    /// Damping that was used in the end.
    pub damp: Option<f64>,
    /// How often damping had to be raised.
    pub damp_retries: u32,
    /// 1 where f32 could not factor the Hessian on a GPU and f64 did; reports that do not say so
    /// were written before it was counted.
    #[serde(default)]
    pub f64_retries: u32,
    /// Tokens that were routed to it, of a linear of an expert; left out of those that see all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Whether these were too few, and it was calibrated on all tokens of its block instead; left out
    /// where they were not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub few_tokens: bool,
    /// What fitting made of it, of the head; left out of all else, and by versions that did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit: Option<HeadFit>,
}

/// A fitted head beside the one that it was made of, in the same coordinates: by how much it differs, which has
/// no size of its own, as fitting makes up for whatever the blocks have lost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadFit {
    /// Energy of the difference over the original's.
    pub change: f64,
    /// What is left of the original: the products of both, summed, over its energy.
    pub gain: f64,
    /// The least such of a row.
    pub least_gain: f64,
    /// The most.
    pub most_gain: f64,
}

impl LinearRecord {
    /// What it is called where linears of one kind are looked at together: `q` of
    /// `model.layers.3.self_attn.q_proj`, and `experts.gate` of
    /// `model.layers.3.mlp.experts.17.gate_proj`, whichever the expert.
    #[must_use]
    pub fn kind(&self) -> String {
        kind_of(&self.name)
    }
}

/// [`LinearRecord::kind`] of a linear of this prefix.
#[must_use]
pub fn kind_of(prefix: &str) -> String {
    let mut parts = prefix.rsplit('.');
    let last = parts.next().unwrap_or(prefix);
    let last = last.strip_suffix("_proj").unwrap_or(last);
    let above: Vec<&str> = parts.take(2).collect();
    match above[..] {
        [number, "experts"] if number.bytes().all(|b| b.is_ascii_digit()) => {
            format!("experts.{last}")
        }
        [shared, _] if shared.starts_with("shared_expert") => format!("shared.{last}"),
        _ => last.to_owned(),
    }
}

/// Scales that were tuned by the quantized model's KL to the unquantized one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuningRecord {
    /// Steps that were made.
    pub steps: u32,
    /// Calibration windows that were trained on.
    pub windows: usize,
    /// Windows that were not, and by which the best step was found.
    pub held_out: usize,
    /// Whether these are none of the calibration's, so that neither the solver nor the head has seen them; where the
    /// text had no others, they are. Reports that do not say so were written before there were any.
    #[serde(default)]
    pub unseen: bool,
    /// Mean KL in nats a token on these before the first step.
    pub kl_before: f64,
    /// With the scales that were kept.
    pub kl_after: f64,
    /// Steps behind which these were; 0 where nothing was better than the start.
    pub best_step: u32,
}

/// What learning a rotation from the weights did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RotationRecord {
    /// Times that all weights were looked at.
    pub looks: usize,
    /// Mean fourth power of the turned weights, those of a row brought to a mean square of 1, under the rotation
    /// that learning began at.
    pub before: f64,
    /// Under the one that was learned.
    pub after: f64,
}

/// Perplexity of the file on one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Protocol name.
    pub protocol: String,
    /// The text.
    pub dataset: DatasetIdentity,
    /// Tokens of the whole text; `null` where it was not read to its end.
    pub tokens_in_text: Option<usize>,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Whether the first token of each window is BOS; absent under protocols that put none there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bos: Option<bool>,
    /// Windows evaluated.
    pub windows: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Arithmetic of the forward pass: `f32` on the CPU, `fp16` on a GPU.
    pub dtype: String,
    /// True when the checkpoint was calibrated on the same split: its perplexity is optimistic.
    pub contaminated: bool,
    /// exp of the mean negative log likelihood.
    pub perplexity: f64,
    /// Standard error of the mean negative log likelihood over tokens, in nats.
    pub standard_error: f64,
    /// Mean KL to the fp16 model in nats a token.
    pub kl: Option<f64>,
    /// Perplexity of the fp16 model on the same windows.
    pub base_perplexity: Option<f64>,
    /// The same grid rounded to nearest.
    pub rtn: Option<Measured>,
}

/// A result of the file on a task of an evaluation harness.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// The task's name in the harness.
    pub task: String,
    /// What was measured of it, as `acc`.
    pub metric: String,
    /// The result.
    pub value: f64,
    /// Its standard error over the task's questions, where the harness gives one.
    pub standard_error: Option<f64>,
    /// Whether more is better; otherwise less is.
    pub higher_is_better: bool,
    /// Questions that were asked.
    pub samples: Option<u64>,
    /// Solved questions before each.
    pub few_shot: Option<u64>,
    /// The harness and its version.
    pub harness: String,
    /// Arithmetic of the forward pass.
    pub dtype: String,
    /// The dense model's result, where it was measured, too.
    pub base: Option<f64>,
}

/// Accuracy on the evaluation text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Perplexity.
    pub perplexity: f64,
    /// Mean KL to the dense model in nats a token.
    pub kl: f64,
}

/// What reports call a model: a Hub id as it is, a folder by its name alone.
#[must_use]
pub fn model_name(id_or_path: &str) -> String {
    let folder = Path::new(id_or_path).canonicalize();
    let name = folder.ok().and_then(|f| Some(f.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| id_or_path.to_owned())
}

/// Whether the checkpoint in a folder was calibrated on this text, where the report beside it shows
/// that.
pub fn calibrated_on(dir: &Path, text: &DatasetIdentity) -> Option<bool> {
    let report = BranchReport::read(dir).ok()?;
    // A recipe without calibration saw none.
    Some(report.calibration.is_some_and(|c| contaminated(&c.dataset, text)))
}

impl BranchReport {
    /// Every linear that a Hessian was factored for, the head included.
    pub fn linears(&self) -> impl Iterator<Item = &LinearRecord> {
        self.blocks.iter().flat_map(|b| &b.linears).chain(&self.head)
    }

    /// Takes a result on a task in, in place of an earlier one of the same task and metric.
    pub fn set_task(&mut self, record: TaskRecord) {
        let key = |record: &TaskRecord| (record.task.clone(), record.metric.clone());
        match self.tasks.binary_search_by_key(&key(&record), key) {
            Ok(at) => self.tasks[at] = record,
            Err(at) => self.tasks.insert(at, record),
        }
    }

    /// Reads the report of a checkpoint's folder.
    ///
    /// # Errors
    /// [`Error::NoReport`], [`Error::Io`] and [`Error::Report`], which name the file.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(REPORT_FILE);
        let text = gptq_checkpoint::read_small_text(&path).map_err(Error::reading_report(&path))?;
        let invalid = |message: String| Error::Report { path: path.clone(), message };
        let report: Self = serde_json::from_str(&text).map_err(|e| invalid(e.to_string()))?;
        if report.format != REPORT_FORMAT {
            return Err(invalid(format!(
                "its format is {}, and this program reads {REPORT_FORMAT}",
                report.format
            )));
        }
        Ok(report)
    }

    /// The file's contents.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::Report { path: REPORT_FILE.into(), message: e.to_string() })?;
        text.push(b'\n');
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn report() -> BranchReport {
        let dataset = DatasetIdentity::new("text.txt".to_owned(), None, &["a b".to_owned()]);
        BranchReport {
            format: REPORT_FORMAT,
            tool: TOOL.to_owned(),
            model: "org/model".to_owned(),
            branch: "main".to_owned(),
            bits: 4,
            group_size: None,
            act_order: true,
            damp: 0.01,
            recipe: "autogptq".to_owned(),
            choices: Some("clip=none".to_owned()),
            source_dtype: SourceDtype::Fp16,
            layout: "modern".to_owned(),
            device: "cpu".to_owned(),
            ranks: 1,
            file_bytes: 123,
            calibration: Some(CalibrationRecord {
                dataset: dataset.clone(),
                windows: 4,
                source_windows: Vec::new(),
                seq_len: 8,
                tokens: None,
                seed: 0,
                sha256: "00".to_owned(),
            }),
            damp_retries: 0,
            f64_retries: 1,
            few_tokens: 0,
            blocks: vec![BlockRecord {
                block: 0,
                linears: vec![LinearRecord {
                    name: "model.layers.0.self_attn.q_proj".to_owned(),
                    // Digits that a reader without correct rounding gets wrong in the last place.
                    relative_error: Some(0.100_000_000_000_000_02),
                    damp: Some(0.01),
                    damp_retries: 0,
                    f64_retries: 1,
                    ..LinearRecord::default()
                }],
            }],
            head: None,
            tuning: None,
            rotation: None,
            evaluations: vec![EvaluationRecord {
                protocol: "paper".to_owned(),
                dataset,
                tokens_in_text: Some(1000),
                seq_len: 8,
                window_bos: None,
                windows: 2,
                tokens: 14,
                dtype: "f32".to_owned(),
                contaminated: true,
                perplexity: 20.672_317_543_219_876,
                standard_error: 0.031_415_926_535_897_93,
                kl: Some(1.234_567_890_123_456_7e-3),
                base_perplexity: Some(20.513_3),
                rtn: Some(Measured { perplexity: 21.1, kl: 0.01 }),
            }],
            tasks: Vec::new(),
        }
    }

    fn write(report: &BranchReport, dir: &Path) {
        fs::write(dir.join(REPORT_FILE), report.to_bytes().unwrap()).unwrap();
    }

    #[test]
    fn what_is_written_is_read_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = report();
        // A walk over many mantissas: floats must survive text exactly, or a resumed sweep would
        // not have the bytes of an undisturbed one.
        let mut x = 0.1_f64;
        for block in 1..500 {
            x = (x * 3.9 * (1.0 - x)).clamp(1e-9, 0.999);
            let mut next = report.blocks[0].clone();
            next.block = block;
            next.linears[0].relative_error = Some(x);
            report.blocks.push(next);
        }
        write(&report, dir.path());
        let read = BranchReport::read(dir.path()).unwrap();
        assert_eq!(read, report);
        assert_eq!(read.to_bytes().unwrap(), fs::read(dir.path().join(REPORT_FILE)).unwrap());
    }

    #[test]
    fn several_ranks_are_recorded_and_one_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let text = |ranks| {
            write(&BranchReport { ranks, ..report() }, dir.path());
            assert_eq!(BranchReport::read(dir.path()).unwrap().ranks, ranks);
            fs::read_to_string(dir.path().join(REPORT_FILE)).unwrap()
        };
        assert!(text(2).contains("\"ranks\": 2"));
        assert!(!text(1).contains("ranks"));
    }

    /// Reports of models without experts are the bytes that they were before there were any.
    #[test]
    fn tokens_of_experts_are_said_where_there_are_experts() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = report();
        let text = String::from_utf8(report.to_bytes().unwrap()).unwrap();
        assert!(!text.contains("few_tokens") && !text.contains("\"tokens\": null"), "{text}");
        let linear = &mut report.blocks[0].linears[0];
        (linear.tokens, linear.few_tokens, report.few_tokens) = (Some(3), true, 1);
        write(&report, dir.path());
        assert_eq!(BranchReport::read(dir.path()).unwrap(), report);
    }

    #[test]
    fn linears_of_experts_are_of_one_kind() {
        for (prefix, kind) in [
            ("model.layers.3.self_attn.q_proj", "q"),
            ("model.layers.3.self_attn.qkv_proj", "qkv"),
            ("model.layers.3.mlp.gate_up_proj", "gate_up"),
            ("model.layers.3.mlp.experts.17.gate_proj", "experts.gate"),
            ("model.layers.3.block_sparse_moe.experts.0.w2", "experts.w2"),
            ("model.layers.3.mlp.shared_expert.down_proj", "shared.down"),
            ("model.layers.3.mlp.shared_experts.up_proj", "shared.up"),
            ("lm_head.weight", "weight"),
            ("", ""),
        ] {
            assert_eq!(kind_of(prefix), kind, "{prefix}");
        }
    }

    #[test]
    fn reports_from_before_f64_and_the_head_were_counted_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = String::from_utf8(report().to_bytes().unwrap()).unwrap();
        let counted = |line: &&str| line.contains("f64_retries") || line.contains("\"head\"");
        assert_eq!(text.lines().filter(counted).count(), 3);
        let lines: Vec<&str> = text.lines().filter(|line| !counted(line)).collect();
        // The last field of a linear leaves a comma behind.
        let before = lines
            .join("\n")
            .replace("\"damp_retries\": 0,\n        }", "\"damp_retries\": 0\n        }");
        fs::write(dir.path().join(REPORT_FILE), before).unwrap();
        let read = BranchReport::read(dir.path()).unwrap();
        assert_eq!((read.f64_retries, read.blocks[0].linears[0].f64_retries), (0, 0));
        assert_eq!(read.head, None);
    }

    /// Of one source, with windows of one length, the record is what it always was.
    #[test]
    fn a_calibration_says_more_only_where_there_is_more_to_say() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = report();
        let text = |report: &BranchReport| String::from_utf8(report.to_bytes().unwrap()).unwrap();
        for key in ["\"source_windows\"", "\"tokens\": null", "\"sources\""] {
            assert!(!text(&report).contains(key), "{key}");
        }
        let calibration = report.calibration.as_mut().unwrap();
        let other = DatasetIdentity::new("b.txt".to_owned(), None, &["b".to_owned()]);
        let sources = vec![calibration.dataset.clone(), other.clone()];
        calibration.dataset = DatasetIdentity::of_sources(sources);
        calibration.source_windows = vec![3, 1];
        calibration.tokens = Some(29);
        write(&report, dir.path());
        assert_eq!(BranchReport::read(dir.path()).unwrap(), report);
        assert_eq!(calibrated_on(dir.path(), &other), Some(true));
    }

    /// What `--strict` looks at when it reuses a branch.
    #[test]
    fn the_head_is_one_of_the_linears_that_were_factored() {
        let mut report = report();
        report.blocks[0].linears[0].f64_retries = 0;
        let head = LinearRecord {
            name: "lm_head.weight".to_owned(),
            relative_error: None,
            damp: Some(0.1),
            damp_retries: 1,
            ..LinearRecord::default()
        };
        report.head = Some(head.clone());
        let all: Vec<&LinearRecord> = report.linears().collect();
        assert_eq!(all, [&report.blocks[0].linears[0], &head]);
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let refused = || BranchReport::read(dir.path()).unwrap_err().to_string();
        assert!(refused().contains(REPORT_FILE));
        fs::write(dir.path().join(REPORT_FILE), "{}").unwrap();
        assert!(refused().contains("missing field"), "{}", refused());
        let newer = BranchReport { format: 2, ..report() };
        write(&newer, dir.path());
        assert!(refused().contains("format is 2"), "{}", refused());
    }
}
