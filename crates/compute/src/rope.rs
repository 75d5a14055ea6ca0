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
    /// Angles `position · theta^(−2i/head_dim)` for `positions` positions (RoFormer, arXiv
    /// 2104.09864, in the half-rotation layout of Hugging Face checkpoints). Frequencies are
    /// rounded to f32 before they are multiplied, as PyTorch loaders do.
    pub fn new(theta: f64, head_dim: usize, positions: usize) -> Self {
        let half = head_dim / 2;
        let frequency: Vec<f32> = inverse_frequencies(theta, head_dim);
        let mut cos = Vec::with_capacity(positions * half);
        let mut sin = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for f in &frequency {
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

/// `theta^(−2i/head_dim)` for i in 0..head_dim/2, as f32.
fn inverse_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32).collect()
}
