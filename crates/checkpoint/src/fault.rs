//! What is wrong with a file of PyTorch's.

/// What is wrong with a file, and what to do where something helps.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) reason: String,
    pub(crate) advice: Option<&'static str>,
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self { reason, advice: None }
    }
}
