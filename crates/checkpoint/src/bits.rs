//! Code widths and the bit stream that holds codes in 32-bit words.
//!
//! For every width the stream is the same: value `j` occupies bits `[bits*j, bits*(j+1))` of the
//! concatenation of little-endian 32-bit words. 32 values are exactly `bits` words, so everything
//! here works in chunks of 32 values whose inner loops unroll to constant shifts. 3-bit values may
//! straddle two words; the others never do.
//!
//! AutoGPTQ packs zeros along a row and codes down a column, and codes are kept the other way
//! round in memory (`[out, in]`), hence the two orientations: [`pack_rows`] and
//! [`pack_transposed`].

use std::ops::Range;

use crate::{Error, Result};

/// Values per chunk: the least number that fills whole words at every width.
const CHUNK: usize = 32;

/// Columns of the transposed layout handled together: 16 words are one cache line.
const TILE: usize = 16;

/// A code width that GPTQ files support.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bits {
    /// 2 bits, 16 codes a word.
    Two,
    /// 3 bits, 32 codes in three words.
    Three,
    /// 4 bits, 8 codes a word.
    Four,
    /// 8 bits, 4 codes a word.
    Eight,
}

impl Bits {
    /// All widths, narrowest first.
    pub const ALL: [Self; 4] = [Self::Two, Self::Three, Self::Four, Self::Eight];

    /// The width of `bits` bits.
    ///
    /// # Errors
    /// [`Error::UnsupportedBits`] for anything but 2, 3, 4 and 8.
    pub fn new(bits: u8) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|width| width.get() == bits)
            .ok_or(Error::UnsupportedBits { bits })
    }

    /// The width as a number.
    #[must_use]
    pub const fn get(self) -> u8 {
        match self {
            Self::Two => 2,
            Self::Three => 3,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// The largest code, `2^bits - 1`.
    #[must_use]
    pub const fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.get())
    }

    /// The zero of a symmetric grid, `2^(bits-1)`.
    #[must_use]
    pub const fn symmetric_zero(self) -> u8 {
        1 << (self.get() - 1)
    }

    /// Words that hold `len` codes, for `len` a multiple of 32.
    #[must_use]
    pub const fn words(self, len: usize) -> usize {
        len / CHUNK * self.get() as usize
    }
}

impl std::fmt::Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.get().fmt(f)
    }
}

/// Packs `values` `[rows, cols]` along rows into words `[rows, cols * bits / 32]`.
///
/// # Errors
/// A `cols` that is no multiple of 32, a wrong length, or a value above [`Bits::max_code`].
pub fn pack_rows(bits: Bits, values: &[u8], rows: usize, cols: usize) -> Result<Vec<u32>> {
    check_values(bits, values, rows, cols)?;
    Ok(match bits {
        Bits::Two => rows_to_words::<2>(values),
        Bits::Three => rows_to_words::<3>(values),
        Bits::Four => rows_to_words::<4>(values),
        Bits::Eight => rows_to_words::<8>(values),
    })
}

/// Inverse of [`pack_rows`]: words `[rows, cols * bits / 32]` to values `[rows, cols]`.
///
/// # Errors
/// A `cols` that is no multiple of 32, or a wrong length.
pub fn unpack_rows(bits: Bits, words: &[u32], rows: usize, cols: usize) -> Result<Vec<u8>> {
    check_words(bits, words, rows, cols)?;
    Ok(row_values(bits, words))
}

/// [`unpack_rows`] without its checks.
pub(crate) fn row_values(bits: Bits, words: &[u32]) -> Vec<u8> {
    match bits {
        Bits::Two => rows_to_values::<2>(words),
        Bits::Three => rows_to_values::<3>(words),
        Bits::Four => rows_to_values::<4>(words),
        Bits::Eight => rows_to_values::<8>(words),
    }
}

/// Packs `values` `[rows, cols]` along rows and transposes: words `[cols * bits / 32, rows]`.
///
/// # Errors
/// A `cols` that is no multiple of 32, a wrong length, or a value above [`Bits::max_code`].
pub fn pack_transposed(bits: Bits, values: &[u8], rows: usize, cols: usize) -> Result<Vec<u32>> {
    check_values(bits, values, rows, cols)?;
    Ok(match bits {
        Bits::Two => to_columns::<2>(values, rows, cols),
        Bits::Three => to_columns::<3>(values, rows, cols),
        Bits::Four => to_columns::<4>(values, rows, cols),
        Bits::Eight => to_columns::<8>(values, rows, cols),
    })
}

/// Inverse of [`pack_transposed`]: words `[cols * bits / 32, rows]` to values `[rows, cols]`. Panics
/// where the lengths do not fit.
pub(crate) fn column_values(bits: Bits, words: &[u32], rows: usize, cols: usize) -> Vec<u8> {
    let mut values = vec![0; rows * cols];
    some_column_values(bits, words, (rows, cols), 0..rows, &mut values);
    values
}

/// The rows `of` the values that [`column_values`] gives, into `values` `[of.len(), cols]`.
pub(crate) fn some_column_values(
    bits: Bits,
    words: &[u32],
    sides: (usize, usize),
    of: Range<usize>,
    values: &mut [u8],
) {
    match bits {
        Bits::Two => from_columns::<2>(words, sides, of, values),
        Bits::Three => from_columns::<3>(words, sides, of, values),
        Bits::Four => from_columns::<4>(words, sides, of, values),
        Bits::Eight => from_columns::<8>(words, sides, of, values),
    }
}

fn check_values(bits: Bits, values: &[u8], rows: usize, cols: usize) -> Result<()> {
    check_len("values", values.len(), rows, cols, cols)?;
    let max = bits.max_code();
    // The common case is one vectorized pass; only a failure looks for the place.
    if values.iter().fold(0, |top, &v| top.max(v)) > max {
        let index = values.iter().position(|&v| v > max).unwrap_or_default();
        let value = u32::from(values[index]);
        return Err(Error::ValueRange { what: "codes", index, value, min: 0, max: max.into() });
    }
    Ok(())
}

fn check_words(bits: Bits, words: &[u32], rows: usize, cols: usize) -> Result<()> {
    check_len("words", words.len(), rows, cols, bits.words(cols))
}

fn check_len(what: &str, found: usize, rows: usize, cols: usize, per_row: usize) -> Result<()> {
    if !cols.is_multiple_of(CHUNK) {
        return Err(Error::PackLength { len: cols });
    }
    let expected = rows.saturating_mul(per_row);
    if found != expected {
        return Err(Error::Length { what: what.to_owned(), expected, found });
    }
    Ok(())
}

/// One chunk into its words. `B` is the width, so every shift below is a constant.
#[inline(always)]
fn pack_chunk<const B: usize>(values: &[u8; CHUNK]) -> [u32; B] {
    let mut words = [0; B];
    for (j, &value) in values.iter().enumerate() {
        let (word, shift) = (j * B / 32, j * B % 32);
        words[word] |= u32::from(value) << shift;
        if shift + B > 32 {
            words[word + 1] |= u32::from(value) >> (32 - shift);
        }
    }
    words
}

#[inline(always)]
fn unpack_chunk<const B: usize>(words: &[u32; B]) -> [u8; CHUNK] {
    let mut values = [0; CHUNK];
    for (k, eight) in values.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (word, shift) = (k * 8 * B / 32, k * 8 * B % 32);
        let mut bits = u64::from(words[word]) >> shift;
        if shift + 8 * B > 32 {
            bits |= u64::from(words[word + 1]) << (32 - shift);
        }
        *eight = spread::<B>(bits).to_le_bytes();
    }
    values
}

/// The eight lowest values of `B` bits, a byte each: they are parted in halves three times.
#[inline(always)]
fn spread<const B: usize>(bits: u64) -> u64 {
    // `B` ones in every byte, twice as many in every two, and so on.
    let lanes = |width: usize, ones: usize| low(ones) * (u64::MAX / low(width));
    let mut bits = bits & low(8 * B);
    bits = (bits | bits << (32 - 4 * B)) & lanes(32, 4 * B);
    bits = (bits | bits << (16 - 2 * B)) & lanes(16, 2 * B);
    (bits | bits << (8 - B)) & lanes(8, B)
}

/// So many ones.
const fn low(ones: usize) -> u64 {
    u64::MAX >> (64 - ones)
}

fn rows_to_words<const B: usize>(values: &[u8]) -> Vec<u32> {
    values.as_chunks::<CHUNK>().0.iter().flat_map(pack_chunk::<B>).collect()
}

fn rows_to_values<const B: usize>(words: &[u32]) -> Vec<u8> {
    words.as_chunks::<B>().0.iter().flat_map(unpack_chunk::<B>).collect()
}

/// Each source row becomes a destination column. A tile of 16 rows is packed chunk by chunk, so
/// that the strided stores fill whole cache lines while the loads stay sequential per row.
fn to_columns<const B: usize>(values: &[u8], rows: usize, cols: usize) -> Vec<u32> {
    let mut words = vec![0; cols / CHUNK * B * rows];
    for first in (0..rows).step_by(TILE) {
        let tile = first..rows.min(first + TILE);
        for chunk in 0..cols / CHUNK {
            for row in tile.clone() {
                let start = row * cols + chunk * CHUNK;
                let Some(source) = values[start..].first_chunk() else { continue };
                for (w, word) in pack_chunk::<B>(source).into_iter().enumerate() {
                    words[(chunk * B + w) * rows + row] = word;
                }
            }
        }
    }
    words
}

fn from_columns<const B: usize>(
    words: &[u32],
    (rows, cols): (usize, usize),
    of: Range<usize>,
    values: &mut [u8],
) {
    for first in of.clone().step_by(TILE) {
        let tile = first..of.end.min(first + TILE);
        for chunk in 0..cols / CHUNK {
            for row in tile.clone() {
                let mut source = [0; B];
                for (w, word) in source.iter_mut().enumerate() {
                    *word = words[(chunk * B + w) * rows + row];
                }
                let start = (row - of.start) * cols + chunk * CHUNK;
                values[start..start + CHUNK].copy_from_slice(&unpack_chunk::<B>(&source));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The stream as defined, one bit at a time.
    fn naive_pack(bits: Bits, row: &[u8]) -> Vec<u32> {
        let width = bits.get() as usize;
        let mut words = vec![0; row.len() * width / 32];
        for (j, value) in row.iter().enumerate() {
            for bit in 0..width {
                let at = j * width + bit;
                words[at / 32] |= u32::from(value >> bit & 1) << (at % 32);
            }
        }
        words
    }

    fn transposed(words: &[u32], rows: usize) -> Vec<u32> {
        let per_row = words.len() / rows;
        (0..per_row).flat_map(|w| (0..rows).map(move |r| words[r * per_row + w])).collect()
    }

    fn matrices() -> impl Strategy<Value = (Bits, usize, usize, Vec<u8>)> {
        (0..4_usize, 1..40_usize, 1..5_usize).prop_flat_map(|(bits, rows, chunks)| {
            let bits = Bits::ALL[bits];
            let values = prop::collection::vec(0..=bits.max_code(), rows * chunks * CHUNK);
            (Just(bits), Just(rows), Just(chunks * CHUNK), values)
        })
    }

    proptest! {
        #[test]
        fn packing_is_the_naive_stream_and_inverts((bits, rows, cols, values) in matrices()) {
            let expected: Vec<u32> =
                values.chunks(cols).flat_map(|row| naive_pack(bits, row)).collect();
            let words = pack_rows(bits, &values, rows, cols).unwrap();
            prop_assert_eq!(&words, &expected);
            prop_assert_eq!(&unpack_rows(bits, &words, rows, cols).unwrap(), &values);
            let words = pack_transposed(bits, &values, rows, cols).unwrap();
            prop_assert_eq!(&words, &transposed(&expected, rows));
            prop_assert_eq!(&column_values(bits, &words, rows, cols), &values);
        }
    }

    #[test]
    fn three_bits_follow_the_published_words() {
        let v: Vec<u8> = (0..32).map(|j| (j * 5 + j / 7) % 8).collect();
        let at = |j: usize| u32::from(v[j]);
        let mut words = [at(10) << 30, at(10) >> 2 | at(21) << 31, at(21) >> 1];
        for k in 0..10 {
            words[0] |= at(k) << (3 * k);
            words[1] |= at(11 + k) << (3 * k + 1);
            words[2] |= at(22 + k) << (3 * k + 2);
        }
        assert_eq!(pack_rows(Bits::Three, &v, 1, 32).unwrap(), words);
    }

    #[test]
    fn symmetric_zeros_are_the_published_constants() {
        let zeros = |bits: Bits| pack_rows(bits, &[bits.symmetric_zero() - 1; 32], 1, 32).unwrap();
        assert_eq!(zeros(Bits::Four), [0x7777_7777; 4]);
        assert_eq!(zeros(Bits::Three), [0xDB6D_B6DB, 0xB6DB_6DB6, 0x6DB6_DB6D]);
    }

    #[test]
    fn misfits_are_errors() {
        assert!(matches!(Bits::new(5), Err(Error::UnsupportedBits { bits: 5 })));
        assert_eq!(Bits::ALL.map(|b| Bits::new(b.get()).unwrap()), Bits::ALL);
        assert_eq!(Bits::ALL.map(Bits::max_code), [3, 7, 15, 255]);
        let mut values = vec![7; 64];
        assert!(matches!(
            pack_rows(Bits::Three, &values[..33], 1, 33),
            Err(Error::PackLength { len: 33 })
        ));
        assert!(matches!(pack_rows(Bits::Three, &values, 1, 32), Err(Error::Length { .. })));
        assert!(matches!(unpack_rows(Bits::Three, &[0; 5], 2, 32), Err(Error::Length { .. })));
        values[40] = 8;
        assert!(matches!(
            pack_transposed(Bits::Three, &values, 2, 32),
            Err(Error::ValueRange { index: 40, value: 8, .. })
        ));
    }

    /// The largest linear of a 70B model. The bound is loose: this also runs without optimization,
    /// on busy machines.
    #[test]
    #[ignore = "takes 240 MB; run with --release to time packing"]
    fn large_linears_pack_quickly() {
        let (rows, cols) = (8192, 28672);
        let values: Vec<u8> = (0..rows * cols).map(|i| (i % 7) as u8).collect();
        for bits in [Bits::Three, Bits::Four] {
            let start = std::time::Instant::now();
            let words = pack_transposed(bits, &values, rows, cols).unwrap();
            let packed = start.elapsed();
            let back = column_values(bits, &words, rows, cols);
            println!("{bits} bits: pack {packed:?}, unpack {:?}", start.elapsed() - packed);
            assert!(back == values);
            assert!(packed.as_secs_f64() < 2.0);
        }
    }
}
