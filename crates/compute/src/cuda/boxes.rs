//! Boxes of matrices in a card's memory, which one instruction of `kernels/bulk.cuh` copies.

use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use super::error::StageContext;
use crate::error::Result;

/// Bytes of an element of a map.
const ELEMENT: usize = 8;

/// The map of a matrix of bytes at an address and of its boxes, `[rows, row bytes]` and `[rows, bytes]`. All
/// bytes are multiples of 16, those of a box 2048 at most, and its rows 256.
pub(super) fn tensor_map(
    stage: &'static str,
    address: u64,
    matrix: (usize, usize),
    a_box: (usize, usize),
) -> Result<CUtensorMap> {
    let sides = [(matrix.1 / ELEMENT) as u64, matrix.0 as u64];
    let box_sides = [(a_box.1 / ELEMENT) as u32, a_box.0 as u32];
    let mut map = MaybeUninit::uninit();
    // SAFETY: the driver writes a map or fails, and reads two sides, one stride between rows, two sides of a box
    // and two steps, which outlive the call. It does not touch the matrix.
    unsafe {
        cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT64,
            2,
            address as *mut _,
            sides.as_ptr(),
            [matrix.1 as u64].as_ptr(),
            box_sides.as_ptr(),
            [1, 1].as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .stage(stage)?;
    // SAFETY: the driver wrote it.
    Ok(unsafe { map.assume_init() })
}
