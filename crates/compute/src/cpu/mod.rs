//! The host backend: f32 data, f64 factorizations, ndarray over matrixmultiply, rayon over tiles.
//!
//! Work is always cut into tiles of fixed size and each tile is summed in a fixed order, so results
//! do not depend on the number of threads.

pub(crate) mod attention;
pub(crate) mod attention_backward;
pub(crate) mod backward;
pub(crate) mod block_parts;
pub(crate) mod cached_attention;
mod dots;
#[cfg(target_arch = "x86_64")]
mod dots_avx2;
pub(crate) mod elementwise;
pub(crate) mod fourth_powers;
pub(crate) mod gram;
pub(crate) mod least_squares;
pub mod linalg;
pub(crate) mod matmul;
pub(crate) mod orthogonal;
pub(crate) mod resident;
pub(crate) mod rows;
pub(crate) mod scaled_codes;
mod simd;
mod tiles;
pub(crate) mod token_loss;
