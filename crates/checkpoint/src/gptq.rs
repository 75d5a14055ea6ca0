//! One quantized linear in the form that AutoGPTQ files hold.
//!
//! | field | stored as | shape | packing |
//! | --- | --- | --- | --- |
//! | `qweight` | I32 | `[in_features / 32 * bits, out_features]` | codes, down a column |
//! | `qzeros` | I32 | `[groups, out_features / 32 * bits]` | zero - 1, along a row |
//! | `scales` | F16 | `[groups, out_features]` | |
//! | `g_idx` | I32 | `[in_features]` | the group of each column |
//!
//! This is what is written; [`Checkpoint::gptq_linear`](crate::Checkpoint::gptq_linear) reads more.
//!
//! A weight is `scale * (code - zero)` with the scale and zero of its column's group.

use std::ops::Range;

use half::f16;

use crate::bits::{column_values, pack_rows, pack_transposed, row_values, some_column_values};
use crate::names::{G_IDX, QWEIGHT, QZEROS, SCALES};
use crate::{Bits, Error, Result};

/// A linear's codes, zeros, scales and group index, packed as in a `gptq` (v1) file.
#[derive(Debug, Clone, PartialEq)]
pub struct GptqLinear {
    /// Code width.
    pub bits: Bits,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
    /// How many groups share `in_features`.
    pub groups: usize,
    /// Packed codes, `[in_features / 32 * bits, out_features]`.
    pub qweight: Vec<u32>,
    /// Packed zeros minus one, `[groups, out_features / 32 * bits]`.
    pub qzeros: Vec<u32>,
    /// Scales, `[groups, out_features]`.
    pub scales: Vec<f16>,
    /// The group of each column, `[in_features]`.
    pub g_idx: Vec<u32>,
}

impl GptqLinear {
    /// Packs a solved linear.
    ///
    /// `codes` is `[out, in]`; `zeros` and `scales` are `[groups, out]`; `g_idx` is `[in]`. A zero
    /// is the code of 0.0 and must be at least 1, because the file stores it minus one and readers
    /// disagree on what a wrapped value means.
    ///
    /// # Errors
    /// Sides that are no multiple of 32, buffers of the wrong length, codes or zeros out of range,
    /// scales that are not finite, and groups that do not exist.
    pub fn pack(
        bits: Bits,
        in_features: usize,
        out_features: usize,
        codes: &[u8],
        zeros: &[u8],
        scales: &[f16],
        g_idx: &[u32],
    ) -> Result<Self> {
        check_sides("being packed", in_features, out_features)?;
        // The number of groups is what the scales say; everything else has to agree with it.
        let groups = scales.len() / out_features;
        check_len("zeros", zeros.len(), groups * out_features)?;
        if let Some(index) = zeros.iter().position(|&z| z == 0 || z > bits.max_code()) {
            let (value, max) = (zeros[index].into(), bits.max_code().into());
            return Err(Error::ValueRange { what: "zeros", index, value, min: 1, max });
        }
        let stored: Vec<u8> = zeros.iter().map(|z| z - 1).collect();
        let linear = Self {
            bits,
            in_features,
            out_features,
            groups,
            qweight: pack_transposed(bits, codes, out_features, in_features)?,
            qzeros: pack_rows(bits, &stored, groups, out_features)?,
            scales: scales.to_vec(),
            g_idx: g_idx.to_vec(),
        };
        linear.check("linear")?;
        Ok(linear)
    }

    /// A symmetric linear of `[in, out]` features: every zero is the middle code, 2^(bits-1), and is
    /// stored minus one.
    ///
    /// `qweight` holds packed codes (see [`pack_transposed`]), `scales` is `[groups, out]`, `g_idx`
    /// is `[in]`.
    ///
    /// # Errors
    /// Buffers that do not fit the sides, as [`GptqLinear::check`] says.
    pub fn symmetric(
        bits: Bits,
        [in_features, out_features]: [usize; 2],
        qweight: Vec<u32>,
        scales: Vec<f16>,
        g_idx: Vec<u32>,
    ) -> Result<Self> {
        check_sides("being packed", in_features, out_features)?;
        let groups = scales.len() / out_features;
        let zeros = vec![bits.symmetric_zero() - 1; groups * out_features];
        let qzeros = pack_rows(bits, &zeros, groups, out_features)?;
        let linear =
            Self { bits, in_features, out_features, groups, qweight, qzeros, scales, g_idx };
        linear.check("linear")?;
        Ok(linear)
    }

    /// Checks that the fields agree with each other: sides, lengths, groups, finite scales.
    ///
    /// # Errors
    /// The first disagreement, with tensors named under `prefix`.
    pub fn check(&self, prefix: &str) -> Result<()> {
        let Self { bits, in_features, out_features, groups, .. } = *self;
        check_sides(prefix, in_features, out_features)?;
        let len =
            |leaf: &str, found, expected| check_len(&format!("{prefix}.{leaf}"), found, expected);
        len(QWEIGHT, self.qweight.len(), bits.words(in_features) * out_features)?;
        len(QZEROS, self.qzeros.len(), groups * bits.words(out_features))?;
        len(SCALES, self.scales.len(), groups * out_features)?;
        len(G_IDX, self.g_idx.len(), in_features)?;
        check_values(prefix, groups, &self.g_idx, &self.scales)
    }

    /// The codes, `[out_features, in_features]`.
    ///
    /// # Panics
    /// If the fields do not fit each other, as [`GptqLinear::check`] would say.
    #[must_use]
    pub fn unpack_codes(&self) -> Vec<u8> {
        column_values(self.bits, &self.qweight, self.out_features, self.in_features)
    }

    /// The codes of some outputs into `codes` `[outputs.len(), in_features]`, for readers that need
    /// not hold all of them.
    ///
    /// # Panics
    /// As [`GptqLinear::unpack_codes`], and where `codes` has another length.
    pub fn unpack_codes_of(&self, outputs: Range<usize>, codes: &mut [u8]) {
        let sides = (self.out_features, self.in_features);
        some_column_values(self.bits, &self.qweight, sides, outputs, codes);
    }

    /// The zeros, `[groups, out_features]`: stored value plus one, modulo `2^bits`.
    ///
    /// The modulo matters only for files made by other tools, which store a zero of 0 as all ones.
    #[must_use]
    pub fn unpack_zeros(&self) -> Vec<u8> {
        let mut zeros = row_values(self.bits, &self.qzeros);
        let mask = self.bits.max_code();
        zeros.iter_mut().for_each(|z| *z = z.wrapping_add(1) & mask);
        zeros
    }

    /// The weight `[out_features, in_features]`, computed in f32 from the fp16 scales.
    ///
    /// # Panics
    /// If the fields do not fit each other, as [`GptqLinear::check`] would say.
    #[must_use]
    pub fn dequantize(&self) -> Vec<f32> {
        let (codes, zeros) = (self.unpack_codes(), self.unpack_zeros());
        let mut weight = Vec::with_capacity(codes.len());
        // A row of the weight uses one column of the [groups, out] tables: gather it first.
        let mut row_grid = vec![(0.0, 0.0); self.groups];
        for (out, row) in codes.chunks_exact(self.in_features).enumerate() {
            for (group, grid) in row_grid.iter_mut().enumerate() {
                let at = group * self.out_features + out;
                *grid = (self.scales[at].to_f32(), f32::from(zeros[at]));
            }
            weight.extend(row.iter().zip(&self.g_idx).map(|(&code, &group)| {
                let (scale, zero) = row_grid[group as usize];
                scale * (f32::from(code) - zero)
            }));
        }
        weight
    }

    /// Turns `gptq_v2` zeros, which are stored as they are, into this struct's minus-one form.
    pub(crate) fn shift_v2_zeros(&mut self) -> Result<()> {
        let mut zeros = row_values(self.bits, &self.qzeros);
        let mask = self.bits.max_code();
        zeros.iter_mut().for_each(|z| *z = z.wrapping_sub(1) & mask);
        self.qzeros = pack_rows(self.bits, &zeros, self.groups, self.out_features)?;
        Ok(())
    }
}

/// The format packs both sides in chunks of 32.
pub(crate) fn check_sides(linear: &str, in_features: usize, out_features: usize) -> Result<()> {
    let fits = |side: usize| side != 0 && side.is_multiple_of(32);
    if fits(in_features) && fits(out_features) {
        return Ok(());
    }
    Err(Error::LinearSize { linear: linear.to_owned(), in_features, out_features })
}

/// Checks that groups exist and that scales are finite, with tensors named under `prefix`.
pub(crate) fn check_values(
    prefix: &str,
    groups: usize,
    g_idx: &[u32],
    scales: &[f16],
) -> Result<()> {
    if let Some(index) = g_idx.iter().position(|&g| g as usize >= groups) {
        // Files hold signed words; a negative one should read as such in the message.
        let (tensor, group) = (format!("{prefix}.g_idx"), i64::from(g_idx[index] as i32));
        return Err(Error::GroupIndex { tensor, index, group, groups });
    }
    if let Some(index) = scales.iter().position(|s| !s.is_finite()) {
        let (tensor, value) = (format!("{prefix}.scales"), scales[index].to_f32());
        return Err(Error::NonFinite { tensor, index, value });
    }
    Ok(())
}

fn check_len(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Length { what: what.to_owned(), expected, found })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::DType;

    #[derive(Debug, Clone)]
    struct Parts {
        bits: Bits,
        in_features: usize,
        out_features: usize,
        codes: Vec<u8>,
        zeros: Vec<u8>,
        scales: Vec<f16>,
        g_idx: Vec<u32>,
    }

    impl Parts {
        fn pack(&self) -> Result<GptqLinear> {
            let Self { bits, in_features, out_features, codes, zeros, scales, g_idx } = self;
            GptqLinear::pack(*bits, *in_features, *out_features, codes, zeros, scales, g_idx)
        }
    }

    fn parts() -> impl Strategy<Value = Parts> {
        (0..4_usize, 1..4_usize, 1..4_usize, 1..6_usize).prop_flat_map(|(b, k, n, groups)| {
            let (bits, k, n) = (Bits::ALL[b], 32 * k, 32 * n);
            (
                prop::collection::vec(0..=bits.max_code(), k * n),
                prop::collection::vec(1..=bits.max_code(), groups * n),
                prop::collection::vec(1e-4_f32..10.0, groups * n),
                prop::collection::vec(0..groups as u32, k),
            )
                .prop_map(move |(codes, zeros, scales, g_idx)| Parts {
                    bits,
                    in_features: k,
                    out_features: n,
                    codes,
                    zeros,
                    scales: scales.into_iter().map(f16::from_f32).collect(),
                    g_idx,
                })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn packing_inverts_and_dequantizes(p in parts()) {
            let linear = p.pack().unwrap();
            prop_assert_eq!(&linear.unpack_codes(), &p.codes);
            prop_assert_eq!(&linear.unpack_zeros(), &p.zeros);
            let mut some = vec![0; (p.out_features - 7) * p.in_features];
            linear.unpack_codes_of(7..p.out_features, &mut some);
            prop_assert_eq!(&some[..], &p.codes[7 * p.in_features..]);
            let weight = linear.dequantize();
            for out in 0..p.out_features {
                for column in 0..p.in_features {
                    let at = p.g_idx[column] as usize * p.out_features + out;
                    let index = out * p.in_features + column;
                    let step = f32::from(p.codes[index]) - f32::from(p.zeros[at]);
                    prop_assert_eq!(weight[index], p.scales[at].to_f32() * step);
                }
            }
            let mut shifted = linear.clone();
            shifted.qzeros = pack_rows(p.bits, &p.zeros, linear.groups, p.out_features).unwrap();
            shifted.shift_v2_zeros().unwrap();
            prop_assert_eq!(shifted, linear);
        }
    }

    fn small() -> Parts {
        Parts {
            bits: Bits::Four,
            in_features: 32,
            out_features: 32,
            codes: vec![3; 1024],
            zeros: vec![8; 32],
            scales: vec![f16::ONE; 32],
            g_idx: vec![0; 32],
        }
    }

    /// As other tools store a zero of 0, and as kernels/dequant.cu reads it too.
    #[test]
    fn a_stored_zero_of_all_ones_means_0() {
        for bits in Bits::ALL {
            let mut linear = Parts { bits, zeros: vec![1; 32], ..small() }.pack().unwrap();
            linear.qzeros.fill(u32::MAX);
            assert_eq!(linear.unpack_zeros(), [0; 32], "{bits} bits");
            assert_eq!(linear.dequantize(), [3.0; 1024], "{bits} bits");
        }
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused() {
        small().pack().unwrap();
        let pack = |change: fn(&mut Parts)| {
            let mut parts = small();
            change(&mut parts);
            parts.pack().unwrap_err()
        };
        assert!(matches!(pack(|p| p.in_features = 40), Error::LinearSize { .. }));
        assert!(matches!(pack(|p| p.out_features = 0), Error::LinearSize { .. }));
        assert!(matches!(pack(|p| p.codes[5] = 16), Error::ValueRange { index: 5, .. }));
        assert!(matches!(pack(|p| p.zeros[6] = 0), Error::ValueRange { index: 6, .. }));
        assert!(matches!(pack(|p| p.zeros[7] = 16), Error::ValueRange { index: 7, .. }));
        assert!(matches!(pack(|p| p.scales[1] = f16::NAN), Error::NonFinite { index: 1, .. }));
        assert!(matches!(pack(|p| p.g_idx[2] = 1), Error::GroupIndex { index: 2, .. }));
        assert!(matches!(pack(|p| p.g_idx.truncate(31)), Error::Length { .. }));
        assert!(matches!(pack(|p| p.scales.truncate(31)), Error::Length { .. }));
        assert!(matches!(pack(|p| p.codes.truncate(31)), Error::Length { .. }));
    }

    /// Files made by AutoGPTQ itself: unpacking and packing again has to give the same words.
    #[test]
    fn golden_files_survive_a_round_trip() {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
        let entries = std::fs::read_dir(&golden).unwrap();
        let mut cases = 0;
        for entry in entries {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for prefix in file.names().iter().filter_map(|n| n.strip_suffix(".qweight")) {
                round_trip(&file, prefix);
                cases += 1;
            }
        }
        assert!(cases > 0, "no linears in `{}`", golden.display());
    }

    fn round_trip(file: &safetensors::SafeTensors<'_>, prefix: &str) {
        let bits = Bits::new(prefix[..1].parse().unwrap()).unwrap();
        let words = |leaf: &str| {
            let tensor = file.tensor(&format!("{prefix}.{leaf}")).unwrap();
            let name = "golden";
            let bytes = tensor.data().into();
            crate::TensorRef { name, dtype: DType::I32, shape: &[], bytes }.to_words()
        };
        let scales = file.tensor(&format!("{prefix}.scales")).unwrap();
        let [groups, out_features] = *scales.shape() else { panic!("{prefix}: {scales:?}") };
        let g_idx = words("g_idx");
        let linear = GptqLinear {
            bits,
            in_features: g_idx.len(),
            out_features,
            groups,
            qweight: words("qweight"),
            qzeros: words("qzeros"),
            scales: scales.data().chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect(),
            g_idx,
        };
        linear.check(prefix).unwrap();
        let parts = Parts {
            bits,
            in_features: linear.in_features,
            out_features,
            codes: linear.unpack_codes(),
            zeros: linear.unpack_zeros(),
            scales: linear.scales.clone(),
            g_idx: linear.g_idx.clone(),
        };
        assert_eq!(parts.pack().unwrap(), linear, "{prefix}");
    }
}
