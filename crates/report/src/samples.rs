//! Reports made up for tests.

use gptq_records::branch_report::{
    BlockRecord, BranchReport, CalibrationRecord, EvaluationRecord, LinearRecord, Measured,
    REPORT_FORMAT, TOOL,
};
use gptq_records::dataset_identity::DatasetIdentity;
use gptq_records::source_dtype::SourceDtype;

use crate::collect::Report;

/// Branches in the order of a report that was read.
pub(crate) fn report<const N: usize>(branches: [BranchReport; N]) -> Report {
    Report::of(branches.to_vec())
}

/// A branch of two blocks with the accuracy given; rounded to nearest it is a third worse.
pub(crate) fn branch(
    name: &str,
    bits: u8,
    group_size: Option<usize>,
    perplexity: f64,
    kl: f64,
) -> BranchReport {
    let text = |name: &str| DatasetIdentity::new(name.to_owned(), None, &[name.to_owned()]);
    let linear = |block: usize, linear: &str, error: f64| LinearRecord {
        name: format!("model.layers.{block}.{linear}"),
        relative_error: Some(error * kl),
        damp: Some(0.01),
        ..LinearRecord::default()
    };
    let blocks = (0..2).map(|block| BlockRecord {
        block,
        linears: vec![
            linear(block, "self_attn.q_proj", 1.0 + block as f64),
            linear(block, "mlp.down_proj", 3.0),
        ],
    });
    BranchReport {
        format: REPORT_FORMAT,
        tool: TOOL.to_owned(),
        model: "org/model".to_owned(),
        branch: name.to_owned(),
        bits,
        group_size,
        act_order: true,
        damp: 0.01,
        recipe: "autogptq".to_owned(),
        choices: Some("clip=none".to_owned()),
        source_dtype: SourceDtype::Fp16,
        layout: "modern".to_owned(),
        device: "cpu".to_owned(),
        ranks: 1,
        file_bytes: 1_000_000 * u64::from(bits) + 40_000_000 / group_size.unwrap_or(1000) as u64,
        calibration: Some(CalibrationRecord {
            dataset: text("calibration.txt"),
            windows: 32,
            source_windows: Vec::new(),
            seq_len: 512,
            tokens: None,
            seed: 0,
            sha256: "c0ffee".to_owned(),
        }),
        damp_retries: 0,
        f64_retries: 0,
        few_tokens: 0,
        blocks: blocks.collect(),
        head: None,
        tuning: None,
        rotation: None,
        evaluations: vec![EvaluationRecord {
            protocol: "paper".to_owned(),
            dataset: text("heldout.txt"),
            tokens_in_text: Some(55_628),
            window_bos: None,
            seq_len: 512,
            windows: 40,
            tokens: 20_440,
            dtype: "f32".to_owned(),
            contaminated: false,
            perplexity,
            standard_error: 0.02,
            kl: Some(kl),
            base_perplexity: Some(18.727),
            rtn: Some(Measured { perplexity: perplexity * 4.0 / 3.0, kl: kl * 4.0 / 3.0 }),
        }],
        tasks: Vec::new(),
    }
}
