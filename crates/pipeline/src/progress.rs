//! How a run tells its caller what it is doing; drawing belongs to the caller.

use gptq_compute::Precision;
use gptq_quant::Factored;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A quantised linear in a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearReport {
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
}

impl LinearReport {
    /// Of a linear that was solved with this Hessian.
    pub(crate) fn solved(name: String, relative_error: Option<f64>, factored: &Factored) -> Self {
        Self {
            name,
            relative_error,
            damp: Some(factored.damp),
            damp_retries: factored.damp_retries,
            f64_retries: u32::from(factored.precision == Precision::RetriedInF64),
        }
    }

    /// Of a linear that was rounded without calibration.
    pub(crate) fn rounded(name: String) -> Self {
        Self { name, relative_error: None, damp: None, damp_retries: 0, f64_retries: 0 }
    }

    /// What its Hessian needed beside what was asked for, damping `asked`, one line each.
    pub(crate) fn retries(&self, asked: f64) -> Vec<String> {
        let (name, damp) = (&self.name, self.damp.unwrap_or(asked));
        let mut said = Vec::new();
        if self.damp_retries > 0 {
            said.push(format!(
                "the Hessian of `{name}` is not positive definite at damping {asked:?}; used {damp:?}"
            ));
        }
        if self.f64_retries > 0 {
            said.push(format!(
                "the Hessian of `{name}` is not positive definite in f32 at damping {damp:?}; \
                 factored it in f64"
            ));
        }
        said
    }

    /// Refuses what [`Self::retries`] says, for `--strict`.
    pub(crate) fn refuse_retries(&self, asked: f64) -> Result<()> {
        let (linear, damp) = (self.name.clone(), self.damp.unwrap_or(asked));
        match (self.damp_retries, self.f64_retries) {
            (0, 0) => Ok(()),
            (0, _) => Err(Error::StrictPrecision { linear, damp }),
            _ => Err(Error::Strict { linear, damp, asked }),
        }
    }
}

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
    pub linears: Vec<LinearReport>,
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
    fn step(&self) {}
    fn block(&self, _report: &BlockReport) {}
    fn end(&self) {}
    fn note(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
}

/// Listens to a run.
pub trait Progress: Sync {
    /// A phase of `steps` steps begins.
    fn begin(&self, phase: &str, steps: usize);
    /// One step of the phase is done.
    fn step(&self);
    /// A block was quantised: also a step.
    fn block(&self, report: &BlockReport);
    /// The phase is over.
    fn end(&self);
    /// What is done next, or need not be done.
    fn note(&self, message: &str);
    /// Something that the user should know, but that stops nothing.
    fn warn(&self, message: &str);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_retry_is_said_and_refused() {
        let linear = |damp, damp_retries, f64_retries| LinearReport {
            name: "q_proj".to_owned(),
            relative_error: None,
            damp: Some(damp),
            damp_retries,
            f64_retries,
        };
        let usual = linear(0.01, 0, 0);
        assert!(usual.retries(0.01).is_empty() && usual.refuse_retries(0.01).is_ok());
        for (linear, words) in [
            (linear(0.1, 1, 0), &["used 0.1"][..]),
            (linear(0.01, 0, 1), &["in f32 at damping 0.01; factored it in f64"]),
            (linear(0.1, 1, 1), &["used 0.1", "in f32 at damping 0.1; factored it in f64"]),
        ] {
            let said = linear.retries(0.01);
            assert_eq!(said.len(), words.len(), "{said:?}");
            for (line, words) in said.iter().zip(words) {
                assert!(line.contains("`q_proj`") && line.contains(words), "{line}");
            }
            let refused = linear.refuse_retries(0.01).unwrap_err().to_string();
            assert!(refused.contains("`q_proj`") && refused.contains("--strict"), "{refused}");
        }
    }
}
