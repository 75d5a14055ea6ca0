//! Weights in host memory as a file holds them, and their products with few tokens or many.

use std::ops::Range;

use half::f16;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::dots::{CodedRow, LANES, dot_bf16, dot_f16, dot_f32};
use super::rows::{into_matrix, slice};
use super::tiles::tiles_mut;
use crate::host::{FloatType, HostMatrix};
use crate::resident::CodedMatrix;

/// Tokens up to which every row of the weight meets each of them on its own. Widening rows for a
/// product of matrices pays beyond; and so far a token's outputs do not depend on how many others
/// there are.
pub(crate) const FEW_TOKENS: usize = 16;
/// Rows of a weight that a thread takes at a time.
const BAND: usize = 32;
/// As many for a product of matrices, which reads the tokens anew for each.
const WIDE_BAND: usize = 128;

/// A weight `[out, in]`.
#[derive(Clone, Debug)]
pub(crate) struct Resident {
    rows: usize,
    cols: usize,
    values: Stored,
}

#[derive(Clone, Debug)]
enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    /// Bits of bfloat16.
    BF16(Vec<u16>),
    Coded(Coded),
}

/// Codes, the columns of a group side by side, every group filled up to whole lanes.
#[derive(Clone, Debug)]
struct Coded {
    bits: u8,
    /// Row by row, `width · bits / 8` bytes each.
    codes: Vec<u8>,
    /// `[rows, groups]`, as are the zeros.
    scales: Vec<f32>,
    zeros: Vec<u8>,
    groups: usize,
    /// The group of every [`LANES`] columns.
    group_of: Vec<u32>,
    /// The column that each of these columns is; `None` when all are in their own places.
    places: Option<Vec<Option<u32>>>,
}

impl Resident {
    /// A copy of stored values, as they are.
    pub(crate) fn dense(matrix: HostMatrix<'_>) -> Self {
        let bytes = matrix.bytes();
        let twos = |bytes: &[u8]| -> Vec<u16> {
            bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)).collect()
        };
        let values = match matrix.dtype() {
            FloatType::F32 => {
                Stored::F32(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
            }
            FloatType::F16 => Stored::F16(bytemuck::cast_vec(twos(bytes))),
            FloatType::BF16 => Stored::BF16(twos(bytes)),
        };
        Self { rows: matrix.rows(), cols: matrix.cols(), values }
    }

    /// Codes packed anew, in the order that products read them in.
    pub(crate) fn coded(matrix: CodedMatrix<'_>) -> Self {
        let CodedMatrix { bits, rows, cols, codes, zeros, scales, group_of } = matrix;
        let groups = zeros.len() / rows.max(1);
        let (group_of, places) = by_group(group_of, groups);
        let mut packed = vec![0_u8; rows * places.len() * usize::from(bits) / 8];
        let stride = places.len() * usize::from(bits) / 8;
        packed.par_chunks_mut(stride.max(1)).zip(codes.par_chunks(cols.max(1))).for_each(
            |(packed, codes)| {
                let at = |place: &Option<u32>| place.map_or(0, |place| codes[place as usize]);
                let eights = places.as_chunks::<8>().0;
                for (bytes, eight) in packed.chunks_exact_mut(bits.into()).zip(eights) {
                    let mut word = 0_u64;
                    for (i, place) in eight.iter().enumerate() {
                        word |= u64::from(at(place)) << (i * usize::from(bits));
                    }
                    bytes.copy_from_slice(&word.to_le_bytes()[..bits.into()]);
                }
            },
        );
        let transposed = |at: usize| (at % groups) * rows + at / groups;
        let cells = 0..rows * groups;
        let coded = Coded {
            bits,
            codes: packed,
            scales: cells.clone().map(|at| scales[transposed(at)].to_f32()).collect(),
            zeros: cells.map(|at| zeros[transposed(at)]).collect(),
            groups,
            group_of,
            places: Some(places)
                .filter(|places| !places.iter().zip(0..).all(|(&place, i)| place == Some(i))),
        };
        Self { rows, cols, values: Stored::Coded(coded) }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bytes that a product reads.
    pub(crate) fn bytes(&self) -> usize {
        match &self.values {
            Stored::F32(values) => 4 * values.len(),
            Stored::F16(values) => 2 * values.len(),
            Stored::BF16(values) => 2 * values.len(),
            Stored::Coded(coded) => coded.codes.len() + 5 * coded.scales.len(),
        }
    }

    /// out = x · wᵀ + beta · out, for x `[tokens, in]`; beta is 0 or 1.
    pub(crate) fn multiply(&self, x: &Array2<f32>, beta: f32, out: &mut Array2<f32>) {
        let ordered;
        let x = match &self.values {
            Stored::Coded(Coded { places: Some(places), .. }) => {
                ordered = in_order(x, places);
                &ordered
            }
            _ => x,
        };
        if x.nrows() > FEW_TOKENS {
            self.multiply_many(x.view(), beta, out);
        } else if x.nrows() > 0 {
            self.multiply_few(x, beta, out);
        }
    }

    /// Every row of the weight with every token.
    fn multiply_few(&self, x: &Array2<f32>, beta: f32, out: &mut Array2<f32>) {
        let tokens = x.nrows();
        let mut products = vec![0.0; self.rows * tokens];
        products.par_chunks_mut(BAND * tokens).enumerate().for_each(|(band, products)| {
            let mut row = vec![0.0; if tokens > 1 { x.ncols() } else { 0 }];
            for (i, products) in products.chunks_mut(tokens).enumerate() {
                let at = band * BAND + i;
                if let [product] = products {
                    *product = self.dot(at, slice(x.row(0)));
                    continue;
                }
                self.widen(at, &mut row);
                for (product, x) in products.iter_mut().zip(x.rows()) {
                    *product = dot_f32(&row, slice(x));
                }
            }
        });
        for ((token, row), value) in out.indexed_iter_mut() {
            *value = products[row * tokens + token] + if beta == 0.0 { 0.0 } else { *value };
        }
    }

    /// As products of matrices, some rows of the weight at a time.
    fn multiply_many(&self, x: ArrayView2<'_, f32>, beta: f32, out: &mut Array2<f32>) {
        let tokens = x.nrows();
        tiles_mut(out.view_mut(), tokens, WIDE_BAND).into_par_iter().for_each(|mut tile| {
            let rows = tile.col..tile.col + tile.view.ncols();
            let weight = self.widened(rows, x.ncols());
            general_mat_mul(1.0, &x, &weight.t(), beta, &mut tile.view);
        });
    }

    /// Some rows, as products read them.
    fn widened(&self, rows: Range<usize>, width: usize) -> Array2<f32> {
        let count = rows.len();
        let mut values = vec![0.0; count * width];
        for (row, to) in rows.zip(values.chunks_mut(width.max(1))) {
            self.widen(row, to);
        }
        into_matrix(values, count, width)
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        let at = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Stored::F32(values) => dot_f32(&values[at], x),
            Stored::F16(values) => dot_f16(&values[at], x),
            Stored::BF16(values) => dot_bf16(&values[at], x),
            Stored::Coded(coded) => coded.row(row).dot(coded.bits, x),
        }
    }

    fn widen(&self, row: usize, to: &mut [f32]) {
        let at = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Stored::F32(values) => to.copy_from_slice(&values[at]),
            Stored::F16(values) => widen_with(&values[at], to, f16::to_f32),
            Stored::BF16(values) => {
                widen_with(&values[at], to, |bits| f32::from_bits(u32::from(bits) << 16));
            }
            Stored::Coded(coded) => coded.row(row).widen(coded.bits, to),
        }
    }
}

impl Coded {
    fn row(&self, row: usize) -> CodedRow<'_> {
        let stride = self.group_of.len() * LANES / 8 * usize::from(self.bits);
        let cells = row * self.groups..(row + 1) * self.groups;
        CodedRow {
            codes: &self.codes[row * stride..(row + 1) * stride],
            scales: &self.scales[cells.clone()],
            zeros: &self.zeros[cells],
            group_of: &self.group_of,
        }
    }
}

fn widen_with<T: Copy>(from: &[T], to: &mut [f32], widen: impl Fn(T) -> f32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = widen(from);
    }
}

/// The columns group by group, in their order within each, filled up to whole lanes; and the group of
/// every [`LANES`] of them.
fn by_group(group_of: &[u32], groups: usize) -> (Vec<u32>, Vec<Option<u32>>) {
    let mut members = vec![Vec::new(); groups];
    for (column, &group) in (0..).zip(group_of) {
        members[group as usize].push(Some(column));
    }
    let (mut lanes, mut places) = (Vec::new(), Vec::new());
    for (group, mut columns) in (0..).zip(members) {
        columns.resize(columns.len().next_multiple_of(LANES), None);
        lanes.extend(std::iter::repeat_n(group, columns.len() / LANES));
        places.extend(columns);
    }
    (lanes, places)
}

/// The columns of `x` in a weight's order, 0 where it has none.
fn in_order(x: &Array2<f32>, places: &[Option<u32>]) -> Array2<f32> {
    let mut ordered = Array2::zeros((x.nrows(), places.len()));
    for (row, mut to) in x.rows().into_iter().zip(ordered.rows_mut()) {
        for (to, place) in to.iter_mut().zip(places) {
            *to = place.map_or(0.0, |place| row[place as usize]);
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::testing::largest;

    fn value(i: usize) -> f32 {
        ((i * 2_654_435_761) % 1009) as f32 / 500.0 - 1.0
    }

    fn tokens(count: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_fn((count, cols), |(i, j)| value(3 + i * cols + j))
    }

    /// Products of one token, of few and of many against f64, with and without what was there.
    fn check(weight: &Resident, exact: &Array2<f64>) {
        for count in [1, 3, FEW_TOKENS, FEW_TOKENS + 5] {
            let x = tokens(count, weight.cols);
            let want = x.mapv(f64::from).dot(&exact.t());
            for beta in [0.0, 1.0] {
                let mut out = Array2::from_elem((count, weight.rows), 2.0);
                weight.multiply(&x, beta, &mut out);
                let worst = largest(&(out.mapv(f64::from) - &want - 2.0 * f64::from(beta)));
                assert!(worst < 2e-4, "{count} tokens, beta {beta}: {worst:e}");
            }
        }
    }

    #[test]
    fn stored_weights_of_every_type_match_f64() {
        let (rows, cols) = (70, 45);
        let values: Vec<f32> = (0..rows * cols).map(value).collect();
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let brains: Vec<half::bf16> = values.iter().map(|&v| half::bf16::from_f32(v)).collect();
        for (bytes, dtype) in [
            (bytemuck::cast_slice(&values), FloatType::F32),
            (bytemuck::cast_slice(&halves), FloatType::F16),
            (bytemuck::cast_slice(&brains), FloatType::BF16),
        ] {
            let matrix = HostMatrix::new(bytes, dtype, rows, cols);
            let exact = super::super::rows::upload(matrix).mapv(f64::from);
            check(&Resident::dense(matrix), &exact);
        }
    }

    /// Groups side by side, mixed as after act-order, of every size, and one with a single column.
    #[test]
    fn codes_of_any_grouping_match_f64() {
        let (rows, cols) = (40, 96);
        for bits in [2_u8, 3, 4, 8] {
            let groupings: [(usize, &dyn Fn(usize) -> u32); 5] = [
                (1, &|_| 0),
                (3, &|column| column as u32 / 32),
                (6, &|column| column as u32 / 16),
                (3, &|column| (column * 7 % 3) as u32),
                (2, &|column| u32::from(column == 40)),
            ];
            for (groups, group) in groupings {
                let codes: Vec<u8> =
                    (0..rows * cols).map(|i| (i * 37 % (1 << bits)) as u8).collect();
                let zeros: Vec<u8> = (0..groups * rows).map(|i| (1 + i % 3) as u8).collect();
                let scales: Vec<f16> =
                    (0..groups * rows).map(|i| f16::from_f32(value(i) / 100.0)).collect();
                let group_of: Vec<u32> = (0..cols).map(group).collect();
                let exact = Array2::from_shape_fn((rows, cols), |(row, column)| {
                    let cell = group_of[column] as usize * rows + row;
                    (f64::from(codes[row * cols + column]) - f64::from(zeros[cell]))
                        * f64::from(scales[cell])
                });
                let weight = Resident::coded(CodedMatrix {
                    bits,
                    rows,
                    cols,
                    codes: &codes,
                    zeros: &zeros,
                    scales: &scales,
                    group_of: &group_of,
                });
                check(&weight, &exact);
            }
        }
    }

    /// A token's outputs are the same alone and among few others.
    #[test]
    fn few_tokens_do_not_depend_on_one_another() {
        let values: Vec<f32> = (0..64 * 80).map(value).collect();
        let matrix = HostMatrix::new(bytemuck::cast_slice(&values), FloatType::F32, 64, 80);
        let weight = Resident::dense(matrix);
        let x = tokens(FEW_TOKENS, 80);
        let mut together = Array2::zeros((FEW_TOKENS, 64));
        weight.multiply(&x, 0.0, &mut together);
        for i in 0..FEW_TOKENS {
            let mut alone = Array2::zeros((1, 64));
            weight.multiply(&x.slice(s![i..=i, ..]).to_owned(), 0.0, &mut alone);
            assert_eq!(alone.row(0), together.row(i), "token {i}");
        }
    }
}
