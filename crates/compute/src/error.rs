//! What can go wrong on a device.
//!
//! Shape errors are the caller's fault and name the operation; numerical errors carry the pivot, so
//! that a recipe can decide whether more damping helps.

use std::borrow::Cow;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a device operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two operands do not fit each other.
    #[error(
        "Operation `{op}` cannot combine shapes {left:?} and {right:?} (rows, columns or lengths)"
    )]
    ShapeMismatch {
        /// The operation.
        op: &'static str,
        /// Shape of the left operand.
        left: (usize, usize),
        /// Shape of the right operand.
        right: (usize, usize),
    },
    /// A row index is outside a table.
    #[error("Row {row} is outside a table of {rows} rows")]
    RowOutOfRange {
        /// The index asked for.
        row: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// Cholesky met a pivot that is not positive (or is NaN).
    #[error(
        "The {n}×{n} matrix is not positive definite: pivot {pivot} of its Cholesky factor is {value:e}"
    )]
    NotPositiveDefinite {
        /// Order of the matrix.
        n: usize,
        /// Index of the failing pivot, in the order of factorization.
        pivot: usize,
        /// Value found where a positive one is needed.
        value: f64,
    },
    /// Operands live on different devices.
    #[error("Operation `{op}` got operands that live on different devices")]
    DeviceMismatch {
        /// The operation.
        op: &'static str,
    },
    /// An operand is stored in another type than the operation takes.
    #[error("Operation `{op}` needs {needs} values on this device")]
    WrongType {
        /// The operation.
        op: &'static str,
        /// The type it takes.
        needs: &'static str,
    },
    /// A device cannot run an operation at this size.
    #[error("Operation `{op}` is not available on this device: {reason}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What it cannot do.
        reason: String,
    },
    /// Stored values are too large for fp16.
    #[error("{count} values are not finite in fp16; the largest fp16 value is 65504")]
    HalfOverflow {
        /// Number of such values.
        count: usize,
    },
    /// A CUDA library is not installed or not found.
    #[error("CUDA library `{library}` was not found")]
    MissingLibrary {
        /// File name of the library.
        library: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The machine has no such card.
    #[error("GPU {ordinal} does not exist: {count} found")]
    NoSuchDevice {
        /// The number asked for.
        ordinal: usize,
        /// Cards present.
        count: usize,
    },
    /// The card is older than the kernels support.
    #[error("GPU `{name}` has compute capability {found}; 8.0 or newer is needed")]
    UnsupportedDevice {
        /// Name of the card.
        name: String,
        /// Its compute capability.
        found: String,
    },
    /// A kernel does not compile: usually a compiler too old for the card.
    #[error("Kernel file `{file}` does not compile for {arch}:\n{log}")]
    KernelCompilation {
        /// The file, in `kernels/`.
        file: String,
        /// The architecture compiled for.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// Device memory is used up.
    #[error(
        "Out of GPU memory during {stage}: {} MiB wanted, {} MiB held, {} MiB left",
        wanted >> 20, held >> 20, free >> 20
    )]
    OutOfMemory {
        /// What was being done.
        stage: &'static str,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes held by this device's tensors.
        held: usize,
        /// Bytes left on the card within the budget.
        free: usize,
    },
    /// Another rank of the run has ended, or does not answer.
    #[error(
        "{} was lost before the run was over",
        rank.map_or_else(|| "Another rank".to_owned(), |rank| format!("Rank {rank}"))
    )]
    RankLost {
        /// Which one, where it is known.
        rank: Option<usize>,
    },
    /// Ranks that were not started alike.
    #[error("The ranks do not agree: they differ in {}", .0.join("; "))]
    Disagreement(Vec<String>),
    /// Ranks that do not find each other, or do not fit each other.
    #[error("{message}")]
    Ranks {
        /// What is wrong, with the ranks it concerns.
        message: String,
        /// What to do, where something helps.
        advice: Option<&'static str>,
    },
    /// A CUDA call failed, or an earlier kernel did and this call found out.
    #[error("CUDA failed during {stage}")]
    Cuda {
        /// What was being done.
        stage: &'static str,
        /// What the library says.
        source: crate::cuda::Fault,
    },
}

impl Error {
    /// Ranks that do not find or fit each other, where nothing is known that helps.
    pub(crate) fn ranks(message: String) -> Self {
        Self::Ranks { message, advice: None }
    }

    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::MissingLibrary { advice, .. } => (*advice).into(),
            Self::Ranks { advice, .. } => (*advice)?.into(),
            Self::OutOfMemory { .. } => {
                "use fewer or shorter windows or texts, raise --gpu-memory, or use --device cpu"
                    .into()
            }
            Self::RankLost { .. } => "see its own message, and start the run again".into(),
            Self::Disagreement(_) => {
                "start all ranks with one command, one build and the same files".into()
            }
            _ => return None,
        })
    }

    /// True for a fault of the caller's program: shapes are checked where files are read, so no input
    /// should come as far as a mismatch inside an operation.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::ShapeMismatch { .. } | Self::RowOutOfRange { .. })
    }
}

/// Checks that two shapes are as an operation needs them.
pub(crate) fn ensure_shape(
    fits: bool,
    op: &'static str,
    left: (usize, usize),
    right: (usize, usize),
) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::ShapeMismatch { op, left, right }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error = Error::RankLost { rank: Some(3) };
        assert_eq!(error.to_string(), "Rank 3 was lost before the run was over");
        assert_eq!(error.hint().unwrap(), "see its own message, and start the run again");
        assert_eq!(Error::RowOutOfRange { row: 1, rows: 1 }.hint(), None);
    }
}
