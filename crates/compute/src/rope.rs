//! Rotary position embedding tables.

use crate::cuda::DeviceTableCell;

/// Cosines and sines of the rotary angles, one row a position, `head_dim / 2` columns.
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) half: usize,
    /// The copy of the first GPU that used the table.
    pub(crate) on_cuda: DeviceTableCell,
}

impl RopeTable {
    /// Angles `position · frequency` for `positions` positions and the `head_dim / 2` frequencies of
    /// a head (RoFormer, arXiv 2104.09864, in the half-rotation layout of Hugging Face
    /// checkpoints). The product is rounded to f32, as in PyTorch loaders.
    pub fn new(frequencies: &[f32], positions: usize) -> Self {
        let half = frequencies.len();
        let mut cos = Vec::with_capacity(positions * half);
        let mut sin = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for f in frequencies {
                let angle = f64::from(position as f32 * f);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        Self { cos, sin, half, on_cuda: DeviceTableCell::new() }
    }

    /// Number of positions covered.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }
}
