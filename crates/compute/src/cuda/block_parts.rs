//! Parts of matrices, scaled sums and capped values.

use std::ops::Range;

use super::matrix::Matrix;
use crate::error::{Error, Result};

fn missing<T>(op: &'static str) -> Result<T> {
    Err(Error::Unsupported { op, reason: "its kernel is not written yet".into() })
}

pub(crate) fn columns(_: &Matrix, _: Range<usize>) -> Result<Matrix> {
    missing("columns")
}

pub(crate) fn scale(_: &mut Matrix, _: f32) -> Result<()> {
    missing("scale")
}

pub(crate) fn add_scaled(_: &mut Matrix, _: &Matrix, _: f32) -> Result<()> {
    missing("add_scaled")
}

pub(crate) fn add_rows(_: &mut Matrix, _: &[u32], _: &[f32], _: &Matrix) -> Result<()> {
    missing("add_rows")
}

pub(crate) fn softcap(_: &mut Matrix, _: f32) -> Result<()> {
    missing("softcap")
}

pub(crate) fn layer_norm(_: &Matrix, _: &[f32], _: usize, _: f32) -> Result<Matrix> {
    missing("layer_norm")
}

pub(crate) fn gelu_mul(_: Matrix, _: &Matrix) -> Result<Matrix> {
    missing("gelu_mul")
}
