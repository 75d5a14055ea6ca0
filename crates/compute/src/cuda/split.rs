//! A large Hessian factored by several cards, which all hold it and all get the factor.
//!
//! Cholesky: rows in blocks, dealt out to and fro so that each card has as many long ones as short
//! ones. A step factors one diagonal block on every card, divides each card's rows below it, passes
//! those on, and updates each card's rows to the right. The inverse joins halves (see `factor`);
//! columns of a joint are independent, so each card makes some of them and all are passed on.
//!
//! For n = 28672 on two cards: half of 15.7 TFLOP each, a third of a TFLOP on all, and n² values
//! received: 8 ms at 200 GB/s.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::context::Cuda;
use super::dense::{
    Block, Product, cholesky_room, copy, divide_by_transposed, failed_pivot, multiply_transposed,
    queue_cholesky,
};
use super::nccl::{Communicator, Piece};
use crate::error::Result;

/// Least order of a matrix whose factor is shared: below it a card is as fast alone.
pub(super) const LEAST_ORDER: usize = 12_288;
/// Least order of the first half of a joint whose columns are shared.
pub(super) const LEAST_HALF: usize = 4096;
/// Side of the diagonal blocks that every card factors.
const SIDE: usize = 2048;

const STAGE: &str = "the shared Cholesky factorization";

/// The card that keeps a block of rows up to date: 0 1 1 0 0 1 1 … for two.
fn owner(block: usize, cards: usize) -> usize {
    let place = block % (2 * cards);
    if place < cards { place } else { 2 * cards - 1 - place }
}

/// Replaces the lower triangle of a symmetric `n × n` matrix, the same on every card, by its lower
/// Cholesky factor, and waits for it.
pub(super) fn cholesky(
    cuda: &Arc<Cuda>,
    card: &Communicator,
    a: &mut CudaSlice<f32>,
    n: usize,
) -> Result<()> {
    let blocks = n.div_ceil(SIDE);
    let mut infos = cuda.zeros::<i32>(STAGE, blocks)?;
    let mut panel = cuda.uninit::<f32>(STAGE, n * SIDE)?;
    let matrix = Block::of_mut(cuda, a, n);
    let room = cholesky_room(cuda, matrix, SIDE.min(n))?;
    let mut work = cuda.uninit::<f32>(STAGE, room)?;
    let steps =
        Steps { cuda, card, n, matrix, panel: Block::of_mut(cuda, panel.make_mut()?, SIDE) };
    let work = Block::of_mut(cuda, work.make_mut()?, room);
    let info = Block::of_mut(cuda, infos.make_mut()?, 1);
    for step in 0..blocks {
        let at = steps.rows(step);
        let diagonal = matrix.at(at.start, at.start);
        // SAFETY: the block lies within the matrix, the workspace suffices for the largest one, and
        // there is a place for each block's outcome; all buffers live until the read below has
        // waited for the queue.
        unsafe { queue_cholesky(cuda, diagonal, at.len(), work, info.at(step, 0)) }?;
        if step + 1 < blocks {
            steps.divide(step)?;
            steps.update(step)?;
        }
    }
    // What follows a failure is noise, but ends.
    let infos = cuda.read(STAGE, infos.slice(), blocks)?;
    match infos.iter().position(|&info| info != 0) {
        Some(block) => Err(failed_pivot(cuda, a, n, block * SIDE, infos[block])?),
        None => Ok(()),
    }
}

/// What the steps of a factorization share. The matrix and the panel outlive the queued steps.
struct Steps<'a> {
    cuda: &'a Cuda,
    card: &'a Communicator,
    n: usize,
    matrix: Block<f32>,
    /// The columns of a step, from the matrix's first row on: contiguous, to be passed on.
    panel: Block<f32>,
}

impl Steps<'_> {
    fn rows(&self, block: usize) -> Range<usize> {
        block * SIDE..((block + 1) * SIDE).min(self.n)
    }

    fn is_mine(&self, block: usize) -> bool {
        owner(block, self.card.size()) == self.card.rank()
    }

    /// Blocks below a step's diagonal block.
    fn below(&self, step: usize) -> Range<usize> {
        step + 1..self.n.div_ceil(SIDE)
    }

    /// A block of the panel on its way from its owner to all others.
    fn piece(&self, block: usize) -> Piece {
        let rows = self.rows(block);
        Piece {
            owner: owner(block, self.card.size()),
            address: *self.panel.at(rows.start, 0).address(),
            bytes: rows.len() * SIDE * size_of::<f32>(),
        }
    }

    /// The factor's columns below a diagonal block: each card's own, then all.
    fn divide(&self, step: usize) -> Result<()> {
        let column = step * SIDE;
        let triangle = self.matrix.at(column, column);
        for block in self.below(step).filter(|&block| self.is_mine(block)) {
            let rows = self.rows(block);
            let (here, there) = (self.matrix.at(rows.start, column), self.panel.at(rows.start, 0));
            // SAFETY: only the last block of rows is shorter than SIDE, so the panel is SIDE wide;
            // blocks of the matrix and of the panel lie within them and do not overlap.
            unsafe {
                divide_by_transposed(self.cuda, STAGE, (rows.len(), SIDE), triangle, here)?;
                copy(self.cuda, STAGE, (rows.len(), SIDE), here, there)?;
            }
        }
        let pieces: Vec<Piece> = self.below(step).map(|block| self.piece(block)).collect();
        // SAFETY: the pieces part the panel.
        unsafe { self.card.exchange(STAGE, &pieces) }?;
        for block in self.below(step).filter(|&block| !self.is_mine(block)) {
            let rows = self.rows(block);
            let (here, there) = (self.matrix.at(rows.start, column), self.panel.at(rows.start, 0));
            // SAFETY: as above.
            unsafe { copy(self.cuda, STAGE, (rows.len(), SIDE), there, here) }?;
        }
        Ok(())
    }

    /// Takes a step's columns out of each card's rows to their right; the next diagonal block comes
    /// first and goes to all.
    fn update(&self, step: usize) -> Result<()> {
        let next = step + 1;
        if self.is_mine(next) {
            self.subtract(next, self.rows(next))?;
        }
        self.pass_diagonal(next)?;
        let first = self.rows(next).start;
        for block in self.below(step).filter(|&block| block > next && self.is_mine(block)) {
            self.subtract(block, first..self.rows(block).end)?;
        }
        Ok(())
    }

    /// Columns `columns` of a block of rows, less the panel's products.
    fn subtract(&self, block: usize, columns: Range<usize>) -> Result<()> {
        let rows = self.rows(block);
        let shape = Product { m: rows.len(), n: columns.len(), k: SIDE };
        let (left, right) = (self.panel.at(rows.start, 0), self.panel.at(columns.start, 0));
        let target = self.matrix.at(rows.start, columns.start);
        // SAFETY: the blocks lie within the panel and the matrix.
        unsafe { multiply_transposed(self.cuda, STAGE, shape, (-1.0, 1.0), (left, right, target)) }
    }

    /// Gives every card the next diagonal block, through the panel's rows above it: no step needs
    /// those any more.
    fn pass_diagonal(&self, block: usize) -> Result<()> {
        let rows = self.rows(block);
        let shape = (rows.len(), rows.len());
        let here = self.matrix.at(rows.start, rows.start);
        let there = self.panel.with_rows_of(rows.len());
        let bytes = rows.len() * rows.len() * size_of::<f32>();
        let owner = owner(block, self.card.size());
        // SAFETY: the panel's first SIDE rows are above the block's; the rest as above.
        unsafe {
            if self.is_mine(block) {
                copy(self.cuda, STAGE, shape, here, there)?;
            }
            let piece = Piece { owner, address: *there.address(), bytes };
            self.card.exchange(STAGE, &[piece])?;
            if self.is_mine(block) { Ok(()) } else { copy(self.cuda, STAGE, shape, there, here) }
        }
    }
}

/// The columns of each card in a joint of halves of order `half` and `m`: whole panels, with equal
/// work. Column c takes half − c products for B A⁻¹ and m / 2 for C⁻¹ times that.
pub(super) fn columns(half: usize, m: usize, panel: usize, cards: usize) -> Vec<Range<usize>> {
    let work = |c: usize| c as f64 * (half as f64 - c as f64 / 2.0 + m as f64 / 2.0);
    let bound = |card: usize| {
        let wanted = work(half) * card as f64 / cards as f64;
        (0..half).step_by(panel).find(|&c| work(c) >= wanted).unwrap_or(half)
    };
    (0..cards)
        .map(|card| bound(card)..if card + 1 < cards { bound(card + 1) } else { half })
        .collect()
}

/// Gives every card the columns of `below` `[m, half]` that the others have made, through scratch.
///
/// # Safety
/// `below` lies within live device memory, `scratch` has room for as many values, and both stay
/// allocated until the queue has passed.
pub(super) unsafe fn exchange_columns<T>(
    cuda: &Cuda,
    card: &Communicator,
    (m, columns): (usize, &[Range<usize>]),
    below: Block<T>,
    scratch: Block<T>,
) -> Result<()> {
    const STAGE: &str = "the shared triangular inverse";
    // One card's columns after another's, each [m, columns].
    let part =
        |range: &Range<usize>| scratch.with_rows_of(m).at(range.start, 0).with_rows_of(range.len());
    let pieces: Vec<Piece> = columns
        .iter()
        .enumerate()
        .map(|(owner, range)| Piece {
            owner,
            address: *part(range).address(),
            bytes: m * range.len() * size_of::<T>(),
        })
        .collect();
    let mine = &columns[card.rank()];
    // SAFETY: the parts are disjoint and fill scratch's [m, half] values at most; the caller vouches
    // for the rest.
    unsafe {
        copy(cuda, STAGE, (m, mine.len()), below.at(0, mine.start), part(mine))?;
        card.exchange(STAGE, &pieces)?;
        for (_, range) in columns.iter().enumerate().filter(|(rank, _)| *rank != card.rank()) {
            copy(cuda, STAGE, (m, range.len()), part(range), below.at(0, range.start))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_dealt_out_evenly() {
        for cards in [2, 3, 8] {
            let mut work = vec![0; cards];
            for block in 0..6 * cards {
                work[owner(block, cards)] += block;
            }
            assert!(work.iter().all(|&w| w == work[0]), "{work:?}");
        }
    }

    #[test]
    fn columns_are_shared_by_work() {
        for (half, m, cards) in [(16384, 12288, 2), (8192, 8192, 3), (4096, 1, 8), (4096, 4096, 16)]
        {
            let shares = columns(half, m, 512, cards);
            let mut at = 0;
            for range in &shares {
                assert_eq!(range.start, at);
                at = range.end;
            }
            assert_eq!(at, half);
        }
        let two = columns(16384, 12288, 512, 2);
        assert!(two[0].len() < two[1].len(), "{two:?}");
    }
}
