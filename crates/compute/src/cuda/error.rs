//! How what the CUDA libraries report becomes an error of this crate.

use super::fault::Fault;
use crate::error::{Error, Result};

/// Names the stage in which a CUDA call failed.
pub(crate) trait StageContext<T> {
    /// Turns a library's status into [`Error::Cuda`] with the name of the stage.
    fn stage(self, stage: &'static str) -> Result<T>;
}

impl<T, F: Into<Fault>> StageContext<T> for std::result::Result<T, F> {
    fn stage(self, stage: &'static str) -> Result<T> {
        self.map_err(|fault| Error::Cuda { stage, source: fault.into() })
    }
}
