//! Matrices as a file holds them: bytes and a floating-point type.

use half::{bf16, f16};

/// Floating-point types that a checkpoint may store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl FloatType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// A row-major matrix in host memory, little-endian, at any alignment (usually a mapped file).
#[derive(Clone, Copy, Debug)]
pub struct HostMatrix<'a> {
    bytes: &'a [u8],
    dtype: FloatType,
    rows: usize,
    cols: usize,
}

impl<'a> HostMatrix<'a> {
    /// Views `bytes` as `[rows, cols]` values of `dtype`.
    ///
    /// # Panics
    /// When the number of bytes is not `rows × cols × dtype.size()`: readers check shapes before.
    pub fn new(bytes: &'a [u8], dtype: FloatType, rows: usize, cols: usize) -> Self {
        assert_eq!(bytes.len(), rows * cols * dtype.size(), "bytes of a {rows}×{cols} matrix");
        Self { bytes, dtype, rows, cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Type of the values.
    pub fn dtype(&self) -> FloatType {
        self.dtype
    }

    /// The bytes, row after row.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Widens one row into `out` (`cols` values); exact for every [`FloatType`].
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let stride = self.cols * self.dtype.size();
        widen(&self.bytes[row * stride..(row + 1) * stride], self.dtype, out);
    }
}

/// Widens little-endian values of `dtype` into f32; exact.
fn widen(bytes: &[u8], dtype: FloatType, out: &mut [f32]) {
    match dtype {
        FloatType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        FloatType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        FloatType::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_type() {
        let values = [0.0_f32, -1.5, 0.333_251_95, 65504.0];
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let mut row = [0.0; 2];
        HostMatrix::new(&f16s, FloatType::F16, 2, 2).read_row(1, &mut row);
        assert_eq!(row, [0.333_251_95, 65504.0]);

        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        HostMatrix::new(&f32s, FloatType::F32, 2, 2).read_row(0, &mut row);
        assert_eq!(row, [0.0, -1.5]);

        let bf16s: Vec<u8> = [3.0e38_f32, 1.0, -2.0, 0.5]
            .iter()
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect();
        HostMatrix::new(&bf16s, FloatType::BF16, 2, 2).read_row(0, &mut row);
        assert_eq!(row, [bf16::from_f32(3.0e38).to_f32(), 1.0]);
    }
}
