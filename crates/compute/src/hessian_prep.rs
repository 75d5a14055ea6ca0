//! What is asked of the Hessian that a [`Gram`](crate::Gram) becomes, and what its factor says back.

/// How a damped, reordered Hessian is made from a [`Gram`](crate::Gram).
#[derive(Clone, Copy, Debug)]
pub struct HessianPrep<'a> {
    /// Factor on the Gram: 2 / windows in GPTQ.
    pub scale: f32,
    /// Column j of the result is column `order[j]` of the Gram.
    pub order: &'a [u32],
    /// Columns (in the Gram's order) that no token ever used: their diagonal becomes 1.
    pub dead: &'a [bool],
    /// Added to the whole diagonal, after the dead columns are set.
    pub damp: f32,
}

/// How a factor was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As usual: in f64 on the CPU, in f32 on a GPU.
    Usual,
    /// In f64 on a GPU, after f32 met a pivot that was not positive.
    RetriedInF64,
}
