//! The loops of `dots.rs` eight values at a time. Every function needs AVX2 and F16C.

use std::arch::x86_64::{
    __m256, __m256i, _mm_set1_epi64x, _mm256_add_ps, _mm256_and_si256, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_mul_ps, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_srlv_epi32,
    _mm256_sub_ps,
};

use half::f16;

use super::dots::{CodedRow, LANES};

/// Registers of [`LANES`] values.
const EIGHTS: usize = LANES / 8;

// Loops count, and bytes are put together one by one: what iterators and slices would call here is
// compiled for every processor, and a call out of wide code empties its registers each time.

/// Defines Σ w · x over stored values, of which `$widen` makes eight f32 of eight.
macro_rules! dot_stored {
    ($name:ident, $type:ty, $zero:expr, $widen:ident) => {
        #[target_feature(enable = "avx2,f16c")]
        pub(super) fn $name(w: &[$type], x: &[f32]) -> f32 {
            let (whole, rest) = w.as_chunks::<8>();
            let (x_whole, x_rest) = x.as_chunks::<8>();
            let mut sums = [_mm256_setzero_ps(); EIGHTS];
            let lanes = whole.len().min(x_whole.len()) / EIGHTS;
            for lane in 0..lanes {
                for i in 0..EIGHTS {
                    let at = EIGHTS * lane + i;
                    let product = _mm256_mul_ps($widen(&whole[at]), load(&x_whole[at]));
                    sums[i] = _mm256_add_ps(sums[i], product);
                }
            }
            for at in EIGHTS * lanes..whole.len().min(x_whole.len()) {
                let product = _mm256_mul_ps($widen(&whole[at]), load(&x_whole[at]));
                sums[at % EIGHTS] = _mm256_add_ps(sums[at % EIGHTS], product);
            }
            if !rest.is_empty() {
                let (mut w, mut x) = ([$zero; 8], [0.0; 8]);
                w[..rest.len()].copy_from_slice(rest);
                x[..x_rest.len()].copy_from_slice(x_rest);
                let at = whole.len() % EIGHTS;
                sums[at] = _mm256_add_ps(sums[at], _mm256_mul_ps($widen(&w), load(&x)));
            }
            total(sums)
        }
    };
}

dot_stored!(dot_f32, f32, 0.0, load);
dot_stored!(dot_f16, f16, f16::ZERO, widen_f16);
dot_stored!(dot_bf16, u16, 0, widen_bf16);

#[target_feature(enable = "avx2,f16c")]
pub(super) fn dot_coded<const BITS: usize>(row: CodedRow<'_>, x: &[f32]) -> f32 {
    let (codes, x) = (row.codes.as_chunks::<BITS>().0, x.as_chunks::<8>().0);
    let (places, mut sums) = (places::<BITS>(), [_mm256_setzero_ps(); EIGHTS]);
    for lane in 0..row.group_of.len() {
        let cell = cell(row, lane);
        for i in 0..EIGHTS {
            let weights = weights::<BITS>(&codes[EIGHTS * lane + i], places, cell);
            let product = _mm256_mul_ps(weights, load(&x[EIGHTS * lane + i]));
            sums[i] = _mm256_add_ps(sums[i], product);
        }
    }
    total(sums)
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_coded<const BITS: usize>(row: CodedRow<'_>, to: &mut [f32]) {
    let (codes, to) = (row.codes.as_chunks::<BITS>().0, to.as_chunks_mut::<8>().0);
    let places = places::<BITS>();
    for lane in 0..row.group_of.len() {
        let cell = cell(row, lane);
        for i in 0..EIGHTS {
            let at = EIGHTS * lane + i;
            to[at] = bytemuck::cast(weights::<BITS>(&codes[at], places, cell));
        }
    }
}

/// As `total` of the portable loops.
#[inline]
#[target_feature(enable = "avx2")]
fn total([a, b, c, d]: [__m256; EIGHTS]) -> f32 {
    let mut lanes: [f32; 8] =
        bytemuck::cast(_mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d)));
    for half in [4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Scale and zero of some [`LANES`] codes.
#[inline]
#[target_feature(enable = "avx2")]
fn cell(row: CodedRow<'_>, lane: usize) -> (__m256, __m256) {
    let group = row.group_of[lane] as usize;
    (_mm256_set1_ps(row.scales[group]), _mm256_set1_ps(f32::from(row.zeros[group])))
}

/// Where each of eight codes begins in a word.
#[inline]
#[target_feature(enable = "avx2")]
fn places<const BITS: usize>() -> __m256i {
    let bits = BITS as i32;
    _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits)
}

/// Eight weights from their codes, which lie in `BITS` whole bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn weights<const BITS: usize>(
    bytes: &[u8; BITS],
    places: __m256i,
    (scale, zero): (__m256, __m256),
) -> __m256 {
    let mut word = 0_u64;
    #[expect(clippy::needless_range_loop, reason = "an iterator would be called, see above")]
    for i in 0..BITS {
        word |= u64::from(bytes[i]) << (8 * i);
    }
    let codes = if BITS == 8 {
        _mm256_cvtepu8_epi32(_mm_set1_epi64x(word as i64))
    } else {
        let word = _mm256_set1_epi32(word as i32);
        _mm256_and_si256(_mm256_srlv_epi32(word, places), _mm256_set1_epi32((1 << BITS) - 1))
    };
    _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero), scale)
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32; 8]) -> __m256 {
    bytemuck::cast(*values)
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_f16(values: &[f16; 8]) -> __m256 {
    let bits: [u16; 8] = bytemuck::cast(*values);
    _mm256_cvtph_ps(bytemuck::cast(bits))
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_bf16(bits: &[u16; 8]) -> __m256 {
    let wide = _mm256_cvtepu16_epi32(bytemuck::cast(*bits));
    bytemuck::cast(_mm256_slli_epi32::<16>(wide))
}
