//! How a run reports to its caller what it is doing; drawing belongs to the caller.

use gptq_records::branch_report::LinearRecord;
use serde::Serialize;

/// A finished block in a report.
#[derive(Clone, Debug, Serialize)]
pub struct BlockReport {
    /// Position in the model.
    pub block: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Seconds by stage, as the device counted them; empty for recipes without calibration.
    pub stages: std::collections::BTreeMap<&'static str, f64>,
    /// Its linears in calibration order.
    pub linears: Vec<LinearRecord>,
}

impl BlockReport {
    /// Mean of the linears' relative errors, where they have one.
    pub fn mean_error(&self) -> Option<f64> {
        let errors: Vec<f64> = self.linears.iter().filter_map(|l| l.relative_error).collect();
        if errors.is_empty() {
            None
        } else {
            Some(errors.iter().sum::<f64>() / errors.len() as f64)
        }
    }
}

/// Hears nothing: for ranks other than the first, whose progress is the same, and for callers that
/// show none.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _phase: &str, _steps: usize) {}
    fn begin_steps(&self, _phase: &str, _steps: usize) {}
    fn step(&self) {}
    fn block(&self, _report: &BlockReport) {}
    fn block_of(&self, _branch: &str, _report: &BlockReport, _blocks: usize) {}
    fn end(&self) {}
    fn note(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
}

/// Listens to a run.
pub trait Progress: Sync {
    /// A phase of `steps` blocks begins.
    fn begin(&self, phase: &str, steps: usize);
    /// A phase of `steps` steps that are no blocks begins.
    fn begin_steps(&self, phase: &str, steps: usize);
    /// One block or step of the phase is done.
    fn step(&self);
    /// A block was quantized: also a step.
    fn block(&self, report: &BlockReport);
    /// A block of one of several branches, of so many blocks each, was quantized: also a step.
    fn block_of(&self, branch: &str, report: &BlockReport, blocks: usize);
    /// The phase is over.
    fn end(&self);
    /// What is done next, or need not be done.
    fn note(&self, message: &str);
    /// Something that the user should know, but that stops nothing.
    fn warn(&self, message: &str);
}
