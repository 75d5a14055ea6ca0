//! Rotary position embedding tables.

use std::sync::OnceLock;

use crate::cuda::DeviceTableCell;
use crate::error::{Result, ensure_shape};

/// Which two features of a head an angle turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeLayout {
    /// i and i + half of the rotated ones, as in Hugging Face checkpoints of Llama.
    #[default]
    Half,
    /// 2i and 2i + 1, as in the paper (GLM, Cohere).
    Interleaved,
}

/// Cosines and sines of the rotary angles, one row a position, one column a frequency, and what they turn.
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) half: usize,
    /// Features of a head, of which the first 2 · half are rotated.
    pub(crate) head_dim: usize,
    pub(crate) layout: RopeLayout,
    /// The copy of the first GPU that used the table.
    pub(crate) on_cuda: DeviceTableCell,
    /// The same with every angle's sign turned, made when it is first asked for.
    pub(crate) back: OnceLock<Box<RopeTable>>,
}

impl RopeTable {
    /// Angles `position · frequency` for `positions` positions and the `head_dim / 2` frequencies of
    /// a head (RoFormer, arXiv 2104.09864, in the half-rotation layout of Hugging Face
    /// checkpoints). The product is rounded to f32, as in PyTorch loaders.
    pub fn new(frequencies: &[f32], positions: usize) -> Self {
        Self::with(frequencies, positions, 2 * frequencies.len(), RopeLayout::Half, 1.0)
    }

    /// As [`Self::new`], of heads of `head_dim` features, of which the first `2 · frequencies.len()` are
    /// rotated in this layout. Cosines and sines are multiplied by `factor`, the attention factor of YaRN
    /// (arXiv 2309.00071, section 3.4) and LongRoPE (arXiv 2402.13753).
    pub fn with(
        frequencies: &[f32],
        positions: usize,
        head_dim: usize,
        layout: RopeLayout,
        factor: f32,
    ) -> Self {
        let half = frequencies.len();
        let mut cos = Vec::with_capacity(positions * half);
        let mut sin = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for f in frequencies {
                let angle = f64::from(position as f32 * f);
                cos.push(angle.cos() as f32 * factor);
                sin.push(angle.sin() as f32 * factor);
            }
        }
        let (on_cuda, back) = (DeviceTableCell::new(), OnceLock::new());
        Self { cos, sin, half, head_dim, layout, on_cuda, back }
    }

    /// Number of positions covered.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// The transposed rotations, by which gradients go back.
    pub(crate) fn reversed(&self) -> &Self {
        self.back.get_or_init(|| {
            let sin = self.sin.iter().map(|sin| -sin).collect();
            let (on_cuda, back) = (DeviceTableCell::new(), OnceLock::new());
            Box::new(Self { sin, cos: self.cos.clone(), on_cuda, back, ..*self })
        })
    }

    /// True when all of a head is rotated by halves: Llama's way.
    pub(crate) fn is_plain(&self) -> bool {
        self.layout == RopeLayout::Half && 2 * self.half == self.head_dim
    }

    /// That `cols` columns are whole heads which have what is rotated.
    pub(crate) fn ensure_heads(&self, op: &'static str, shape: (usize, usize)) -> Result<()> {
        let rotated = 2 * self.half;
        let fits = (1..=self.head_dim).contains(&rotated) && shape.1.is_multiple_of(self.head_dim);
        ensure_shape(fits, op, shape, (rotated, self.head_dim))
    }
}
