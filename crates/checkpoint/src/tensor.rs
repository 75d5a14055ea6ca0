//! A stored tensor as a view of its bytes, and its values in other types.
//!
//! Values in a file are aligned to 8 bytes at best and to nothing at worst, so they are assembled
//! from bytes and never cast in place.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::{DType, Error, Result};

/// Values converted at a time: small enough for the stack and the first cache.
const BATCH: usize = 1024;

/// A tensor in a mapped file.
#[derive(Debug, Clone)]
pub struct TensorRef<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Type of the values.
    pub dtype: DType,
    /// Dimensions, row-major.
    pub shape: &'a [usize],
    /// The values, row-major and little-endian, at any alignment: the file's own, unless they had
    /// to be gathered.
    pub bytes: Cow<'a, [u8]>,
}

impl TensorRef<'_> {
    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether a dimension is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The values as f32. Exact for the float types; integers beyond 2^24 round.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        self.read_f32(0, &mut values);
        values
    }

    /// The values as fp16, rounded to nearest, ties to even. NaN and infinity stay as they are.
    ///
    /// # Errors
    /// [`Error::F16Overflow`] for a finite value that would become infinite.
    pub fn to_f16(&self) -> Result<Vec<f16>> {
        let mut values = vec![f16::ZERO; self.len()];
        self.read_f16(0, &mut values)?;
        Ok(values)
    }

    /// Checks that no value is NaN or infinite. Integers always pass.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming the tensor and the flat index of the first offender.
    pub fn check_finite(&self) -> Result<()> {
        // Whole batches are looked at without a branch a value; only a bad one is searched.
        let bytes = BATCH * self.dtype.size();
        let Some(batch) = self.bytes.chunks(bytes).position(|batch| !self.view(batch).is_finite())
        else {
            return Ok(());
        };
        let mut value = [0.0];
        let first = batch * BATCH;
        let size = self.dtype.size();
        let finite = |index: &usize| self.view(&self.bytes[index * size..][..size]).is_finite();
        let index = (first..self.len()).find(|index| !finite(index)).unwrap_or(first);
        self.read_f32(index, &mut value);
        Err(Error::NonFinite { tensor: self.name.to_owned(), index, value: value[0] })
    }

    /// Whether both hold the same values in the same shape, in whatever types.
    #[must_use]
    pub fn equals(&self, other: &TensorRef<'_>) -> bool {
        if self.shape != other.shape {
            return false;
        }
        if self.dtype == other.dtype {
            return self.bytes == other.bytes;
        }
        let (mut mine, mut theirs) = ([0.0; BATCH], [0.0; BATCH]);
        (0..self.len()).step_by(BATCH).all(|start| {
            let count = BATCH.min(self.len() - start);
            self.read_f32(start, &mut mine[..count]);
            other.read_f32(start, &mut theirs[..count]);
            mine[..count] == theirs[..count]
        })
    }

    /// The 32-bit words of an I32 tensor.
    pub(crate) fn to_words(&self) -> Vec<u32> {
        self.words().collect()
    }

    /// Values `start..` as fp16 into `values`, as [`TensorRef::to_f16`] has them, for callers that
    /// convert piecewise.
    ///
    /// # Errors
    /// As [`TensorRef::to_f16`].
    pub fn read_f16(&self, start: usize, values: &mut [f16]) -> Result<()> {
        if self.dtype == DType::F16 {
            let source = self.from(start);
            values.iter_mut().zip(source.halves()).for_each(|(to, h)| *to = f16::from_bits(h));
            return Ok(());
        }
        let mut wide = [0.0; BATCH];
        for (batch, values) in values.chunks_mut(BATCH).enumerate() {
            let wide = &mut wide[..values.len()];
            let first = start + batch * BATCH;
            self.read_f32(first, wide);
            values.convert_from_f32_slice(wide);
            let overflow = |(v, h): (&f32, &f16)| v.is_finite() && !h.is_finite();
            if let Some(at) = wide.iter().zip(&*values).position(overflow) {
                let (tensor, index) = (self.name.to_owned(), first + at);
                return Err(Error::F16Overflow { tensor, index, value: wide[at] });
            }
        }
        Ok(())
    }

    /// Values `start..` as f32 into `values`, as [`TensorRef::to_f32`] has them.
    pub fn read_f32(&self, start: usize, values: &mut [f32]) {
        for (index, batch) in values.chunks_mut(BATCH).enumerate() {
            self.read_batch(start + index * BATCH, batch);
        }
    }

    /// Values `start..` as f32 into at most [`BATCH`] `values`.
    fn read_batch(&self, start: usize, values: &mut [f32]) {
        let source = self.from(start);
        match self.dtype {
            DType::F32 => fill(values, source.words().map(f32::from_bits)),
            DType::I32 => fill(values, source.words().map(|w| w as i32 as f32)),
            DType::BF16 => fill(values, source.halves().map(|h| bf16::from_bits(h).to_f32())),
            DType::F16 => {
                // The slice conversion uses the CPU's own instruction, but needs aligned input.
                let mut halves = [f16::ZERO; BATCH];
                let halves = &mut halves[..values.len()];
                halves.iter_mut().zip(source.halves()).for_each(|(to, h)| *to = f16::from_bits(h));
                halves.convert_to_f32_slice(values);
            }
        }
    }

    fn from(&self, start: usize) -> TensorRef<'_> {
        self.view(&self.bytes[start * self.dtype.size()..])
    }

    /// Some of the values.
    fn view<'a>(&'a self, bytes: &'a [u8]) -> TensorRef<'a> {
        TensorRef { bytes: Cow::Borrowed(bytes), ..*self }
    }

    /// Whether no value is NaN or infinite: their exponents are all ones.
    fn is_finite(&self) -> bool {
        match self.dtype {
            DType::F32 => {
                !self.words().fold(false, |bad, w| bad | (w & 0x7F80_0000 == 0x7F80_0000))
            }
            DType::F16 => !self.halves().fold(false, |bad, h| bad | (h & 0x7C00 == 0x7C00)),
            DType::BF16 => !self.halves().fold(false, |bad, h| bad | (h & 0x7F80 == 0x7F80)),
            DType::I32 => true,
        }
    }

    fn words(&self) -> impl Iterator<Item = u32> {
        self.bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word))
    }

    fn halves(&self) -> impl Iterator<Item = u16> {
        self.bytes.as_chunks().0.iter().map(|&half| u16::from_le_bytes(half))
    }
}

fn fill(values: &mut [f32], source: impl Iterator<Item = f32>) {
    values.iter_mut().zip(source).for_each(|(to, from)| *to = from);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(dtype: DType, bytes: &[u8]) -> TensorRef<'_> {
        TensorRef { name: "w", dtype, shape: &[], bytes: Cow::Borrowed(bytes) }
    }

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn every_half_widens_exactly_at_any_alignment() {
        let mut bytes = vec![0];
        bytes.extend((0..=u16::MAX).flat_map(u16::to_le_bytes));
        for dtype in [DType::F16, DType::BF16] {
            let wide = view(dtype, &bytes[1..]).to_f32();
            for (bits, wide) in (0..=u16::MAX).zip(wide) {
                let expected = match dtype {
                    DType::F16 => f16::from_bits(bits).to_f32(),
                    _ => f32::from_bits(u32::from(bits) << 16),
                };
                assert!(wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan());
            }
        }
    }

    #[test]
    fn fp16_rounds_to_even() {
        let bytes = f32_bytes(&[1.0, 2049.0, 2051.0, -0.0, 65519.0, 2e-8, 3e-8]);
        let halves = view(DType::F32, &bytes).to_f16().unwrap();
        let expected = [1.0, 2048.0, 2052.0, -0.0, 65504.0, 0.0, 5.960_464_5e-8];
        for (half, expected) in halves.iter().zip(expected) {
            assert_eq!(half.to_f32().to_bits(), f32::to_bits(expected));
        }
    }

    #[test]
    fn overflow_names_tensor_and_place() {
        let mut values = vec![1.0; 3000];
        values[2500] = -65520.0;
        let error = view(DType::F32, &f32_bytes(&values)).to_f16().unwrap_err();
        assert_eq!(
            error.to_string(),
            "Tensor `w` holds `-65520` at flat index 2500, which overflows fp16"
        );
        // An infinity is not an overflow: it is damage, which check_finite reports.
        let bytes = f32_bytes(&[f32::INFINITY]);
        assert_eq!(view(DType::F32, &bytes).to_f16().unwrap(), [f16::INFINITY]);
    }

    #[test]
    fn values_are_compared_across_types() {
        let values: Vec<f32> = (0..3000).map(|i| (i % 97) as f32 / 8.0).collect();
        let halves: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let mut wide = f32_bytes(&values);
        assert!(view(DType::F32, &wide).equals(&view(DType::F16, &halves)));
        assert!(!view(DType::BF16, &halves).equals(&view(DType::F16, &halves)));
        wide[4 * 2999] ^= 1;
        assert!(!view(DType::F32, &wide).equals(&view(DType::F16, &halves)));
        let other = TensorRef { shape: &[3000], ..view(DType::F16, &halves) };
        assert!(!other.equals(&view(DType::F16, &halves)));
    }

    #[test]
    fn non_finite_values_are_found() {
        let bytes = f32_bytes(&[1.0, f32::NAN]);
        let error = view(DType::F32, &bytes).check_finite().unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 1, .. }), "{error}");
        assert!(view(DType::BF16, &bf16::NEG_INFINITY.to_le_bytes()).check_finite().is_err());
        assert!(view(DType::F16, &f16::INFINITY.to_le_bytes()).check_finite().is_err());
        view(DType::F16, &f16::MAX.to_le_bytes()).check_finite().unwrap();
    }
}
