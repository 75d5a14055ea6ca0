//! What a gated MLP does to its gate.

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^(−x)).
    Silu,
    /// x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), which stands for x · Φ(x) (arXiv 1606.08415).
    GeluTanh,
}
