//! Where tokens' values go in a weight's order; `kernels/ordered.cuh` tells the orders.

use cudarc::driver::{DeviceRepr, LaunchConfig};

use super::dense::int;
use crate::error::Result;

/// Words of what belongs to a cell of a token, as in `ordered.cuh`.
pub(super) const CELL_WORDS: usize = 4;

/// `Ordered` of `ordered.cuh`: where tokens' values go in a weight's order.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Ordered {
    /// Address of the column at every place; 0 where each is in its own.
    pub(super) places: u64,
    /// Address of the values, two bytes a place.
    pub(super) x: u64,
    /// Address of what belongs to cells.
    pub(super) cells: u64,
    /// Places of a token.
    pub(super) padded: i32,
    /// Sub-blocks of a cell, or 0 for values in fp16.
    pub(super) every: i32,
    /// Slots of a stream, or 0.
    pub(super) slots: i32,
}

const _: () = assert!(size_of::<Ordered>() == 40, "as in ordered.cuh");

impl Ordered {
    /// fp16 values of tokens, each in its own place.
    pub(super) fn plain(x: u64, values: usize) -> Result<Self> {
        Ok(Self { places: 0, x, cells: 0, padded: int(values)?, every: 0, slots: 0 })
    }
}

// SAFETY: integers and addresses, laid out as the kernels' struct.
unsafe impl DeviceRepr for Ordered {}

/// A thread for every place of every token.
pub(super) fn per_place(padded: usize, tokens: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (padded.div_ceil(256) as u32, tokens as u32, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    }
}
