//! What can go wrong where results are collected, shown, published or held.

use std::borrow::Cow;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a report, a card or a baseline; every message names the file or branch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What lies in the folder of a branch.
    #[error(transparent)]
    Records(#[from] gptq_records::Error),
    /// Reading a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] gptq_checkpoint::Error),
    /// A folder without reports.
    #[error(
        "`{}` holds no gptq_report.json, nor does a folder in it",
        .0.display()
    )]
    NoReports(PathBuf),
    /// A baseline that is not there.
    #[error("There is no baseline `{}`", .0.display())]
    NoBaseline(PathBuf),
    /// A baseline that does not say what it should.
    #[error("`{}` is not a baseline: {message}", path.display())]
    Baseline {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place.
        message: String,
    },
    /// A branch whose numbers say nothing about the baseline's.
    #[error("`{branch}` cannot be compared with the baseline: {reason}")]
    NotComparable {
        /// The branch.
        branch: String,
        /// What differs.
        reason: String,
    },
    /// A report without a single perplexity or result on a task.
    #[error("No branch of the report was measured")]
    NotMeasured,
    /// A model's facts that do not say what they should.
    #[error("`{}` does not hold a card's facts: {message}", path.display())]
    Facts {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A branch that the Hub cannot have.
    #[error(
        "`{branch}` in `{}` cannot be a branch on the Hub: names have letters, digits, `-`, `_` and `.` only",
        dir.display()
    )]
    CardBranch {
        /// The branch.
        branch: String,
        /// Its folder.
        dir: PathBuf,
    },
    /// A dense model where a GPTQ checkpoint is needed.
    #[error("`{}` is not quantized: it has no quantize_config.json", .0.display())]
    NotQuantized(PathBuf),
    /// A template that does not fit what it is given.
    #[error("The template `{name}` cannot be rendered")]
    Template {
        /// The template.
        name: &'static str,
        /// Why.
        source: minijinja::Error,
    },
    /// The same branch found twice.
    #[error("Branch `{branch}` is named twice")]
    BranchTwice {
        /// The branch, with the path where it was found if several have the name.
        branch: String,
    },
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Records(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::NoReports(_) => {
                Some("name a folder that gptq sweep or gptq quantize made".into())
            }
            Self::NoBaseline(_) => Some("make it with gptq check --update".into()),
            Self::NotMeasured => Some(
                "give the configuration an [evaluation], or measure tasks with gptq eval".into(),
            ),
            Self::Facts { .. } => Some(
                "facts are a TOML file, such as configs/cards/demo.toml; --template takes its [prompt]"
                    .into(),
            ),
            Self::NotQuantized(_) => Some("name a folder that gptq quantize made".into()),
            Self::BranchTwice { .. } => Some("name each folder once".into()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error = Error::NoBaseline("b.json".into());
        assert_eq!(error.to_string(), "There is no baseline `b.json`");
        assert_eq!(error.hint().unwrap(), "make it with gptq check --update");
        let below = gptq_records::Error::BranchInUse("main".to_owned());
        assert!(Error::Records(below).hint().is_some());
        let unknown = Error::NotComparable { branch: "main".to_owned(), reason: String::new() };
        assert_eq!(unknown.hint(), None);
    }
}
