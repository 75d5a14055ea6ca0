//! Newton–Schulz iterations by cuBLAS in f64.

use std::sync::Arc;

use ndarray::Array2;

use super::buffer::Buffer;
use super::context::Cuda;
use super::dense::{self, Block, Product};
use crate::error::{Error, Result};
use crate::orthogonal::{NEAREST, OF_DIRECTION, OF_STEP};

const OP: &str = "orthogonal matrices";

/// The orthogonal matrix nearest to one.
pub(crate) fn nearest(cuda: &Arc<Cuda>, matrix: &Array2<f64>) -> Result<Array2<f64>> {
    let order = matrix.nrows();
    let mut room = Room::new(cuda, order)?;
    room.iterated(uploaded(cuda, matrix, 1.0)?, NEAREST)?.read(order)
}

/// The one nearest to scale · r (1 − tangent · F), F being by · direction, flattened.
pub(crate) fn step(
    cuda: &Arc<Cuda>,
    r: &Array2<f64>,
    direction: &Array2<f64>,
    by: f64,
    (tangent, scale): (f64, f64),
) -> Result<Array2<f64>> {
    let order = r.nrows();
    let mut room = Room::new(cuda, order)?;
    let flat = room.iterated(uploaded(cuda, direction, by)?, OF_DIRECTION)?;
    let r = uploaded(cuda, r, 1.0)?;
    let mut turned = cuda.uninit::<f64>(OP, order * order)?;
    let (from, along) = (Block::of(cuda, r.slice(), order), Block::of(cuda, flat.x.slice(), order));
    let target = Block::of_mut(cuda, turned.make_mut()?, order);
    let shape = Product { m: order, n: order, k: order };
    // SAFETY: every block is order × order values of a buffer of its own, freed on the stream of all work, behind
    // this product; the target is no operand.
    unsafe {
        dense::copy(cuda, OP, (order, order), from, target)?;
        dense::multiply(cuda, OP, shape, (-scale * tangent, scale), (from, along, target))?;
    }
    drop((r, flat));
    room.iterated(turned, OF_STEP)?.read(order)
}

/// A host matrix times a factor, on the card.
fn uploaded(cuda: &Arc<Cuda>, matrix: &Array2<f64>, by: f64) -> Result<Buffer<f64>> {
    let values: Vec<f64> = matrix.iter().map(|value| value * by).collect();
    cuda.copied(OP, &values)
}

/// Room for the products of an iteration.
struct Room<'a> {
    cuda: &'a Arc<Cuda>,
    order: usize,
    square: Buffer<f64>,
}

/// A matrix on the card.
struct Done<'a> {
    cuda: &'a Arc<Cuda>,
    x: Buffer<f64>,
}

impl<'a> Room<'a> {
    fn new(cuda: &'a Arc<Cuda>, order: usize) -> Result<Self> {
        Ok(Self { cuda, order, square: cuda.uninit(OP, order * order)? })
    }

    /// X ← (3 X − X Xᵀ X) / 2, so often.
    fn iterated(&mut self, mut x: Buffer<f64>, iterations: usize) -> Result<Done<'a>> {
        let (cuda, order) = (self.cuda, self.order);
        let mut next = cuda.uninit::<f64>(OP, order * order)?;
        let shape = Product { m: order, n: order, k: order };
        let square = Block::of_mut(cuda, self.square.make_mut()?, order);
        for _ in 0..iterations {
            let from = Block::of(cuda, x.slice(), order);
            let to = Block::of_mut(cuda, next.make_mut()?, order);
            // SAFETY: every block is order × order values of a buffer of its own, freed on the stream of all work,
            // behind these products; targets are no operands.
            unsafe {
                dense::multiply_transposed(cuda, OP, shape, (1.0, 0.0), (from, from, square))?;
                dense::copy(cuda, OP, (order, order), from, to)?;
                dense::multiply(cuda, OP, shape, (-0.5, 1.5), (square, from, to))?;
            }
            std::mem::swap(&mut x, &mut next);
        }
        Ok(Done { cuda, x })
    }
}

impl Done<'_> {
    fn read(&self, order: usize) -> Result<Array2<f64>> {
        let sides = (order, order);
        let values = self.cuda.read(OP, self.x.slice(), order * order)?;
        let mismatch = |_| Error::ShapeMismatch { op: OP, left: sides, right: sides };
        Array2::from_shape_vec(sides, values).map_err(mismatch)
    }
}
