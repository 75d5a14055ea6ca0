//! What can go wrong on a device.
//!
//! Shape errors are the caller's fault and name the operation; numerical errors carry the pivot, so
//! that a recipe can decide whether more damping helps.

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
        /// Index of the failing pivot, in the order of factorisation.
        pivot: usize,
        /// Value found where a positive one is needed.
        value: f64,
    },
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
