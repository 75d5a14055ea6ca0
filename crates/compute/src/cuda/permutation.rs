//! The order in which columns are solved, on the device.

use super::buffer::Buffer;
use super::context::Cuda;
use crate::error::{Error, Result, ensure_shape};

/// A permutation of columns, its inverse, and the columns that no token used.
pub(super) struct SolveOrder {
    /// Column j of the solve is column `order[j]` of the weights.
    pub(super) order: Buffer<u32>,
    /// The place in solve order of each column of the weights.
    pub(super) inverse: Buffer<u32>,
    /// 1 for columns of the weights that are dead.
    pub(super) dead: Buffer<u8>,
    /// True when some column is dead.
    pub(super) any_dead: bool,
}

impl SolveOrder {
    /// Checks and uploads an order of columns. Kernels index with it, so an entry that is no column
    /// or comes twice is refused here.
    pub(super) fn upload(cuda: &Cuda, order: &[u32], dead: &[bool]) -> Result<Self> {
        const STAGE: &str = "uploading the order of columns";
        let n = order.len();
        ensure_shape(dead.len() == n, STAGE, (n, 1), (dead.len(), 1))?;
        let inverse = inverse_of(order)?;
        let flags: Vec<u8> = dead.iter().map(|&d| u8::from(d)).collect();
        Ok(Self {
            order: cuda.copied(STAGE, order)?,
            inverse: cuda.copied(STAGE, &inverse)?,
            dead: cuda.copied(STAGE, &flags)?,
            any_dead: dead.contains(&true),
        })
    }
}

/// The inverse of a permutation.
///
/// # Errors
/// [`Error::RowOutOfRange`] for an entry that is out of range or comes twice.
pub(crate) fn inverse_of(order: &[u32]) -> Result<Vec<u32>> {
    let n = order.len();
    let mut inverse = vec![u32::MAX; n];
    for (place, &column) in order.iter().enumerate() {
        let refused = Error::RowOutOfRange { row: column as usize, rows: n };
        match inverse.get_mut(column as usize) {
            Some(slot) if *slot == u32::MAX => *slot = place as u32,
            _ => return Err(refused),
        }
    }
    Ok(inverse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_permutations_have_an_inverse() {
        assert_eq!(inverse_of(&[2, 0, 1]).unwrap(), [1, 2, 0]);
        assert!(inverse_of(&[0, 0, 1]).is_err());
        assert!(inverse_of(&[0, 3, 1]).is_err());
        assert!(inverse_of(&[]).unwrap().is_empty());
    }
}
