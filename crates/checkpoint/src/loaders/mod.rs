//! Which programs load a GPTQ checkpoint, and why the others do not.
//!
//! What a loader requires is data: `LOADERS` in `table.rs` lists for each its rules, and remarks on how
//! it then runs. A rule is a `Need`, which knows how to look at the [`LoaderFacts`] of a checkpoint
//! and the phrase that says why it is not met, and how it was learnt: by running the program on such
//! a file, or by reading its code. A verdict says which.

mod facts;
mod needs;
mod rules;
mod table;

use table::LOADERS;

pub use facts::{Architecture, Bias, GroupIndex, InBlocks, LoaderFacts, asks_for_bfloat16};
pub use rules::{LoaderVerdict, Seen};

/// Every loader's verdict, in the table's order.
#[must_use]
pub fn verdicts(facts: &LoaderFacts) -> Vec<LoaderVerdict> {
    LOADERS.iter().map(|loader| loader.verdict(facts)).collect()
}

#[cfg(test)]
mod tests;
