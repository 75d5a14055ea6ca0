//! What a sweep gave, for people: shown, published, held against accepted values.
//!
//! Everything comes from the reports in the checkpoints' folders, so that any [`collect`]ion of them
//! can be shown. [`compare`] puts together what was measured alike; [`markdown`] and [`page`] draw
//! it. [`card`] writes the model card of every branch from the same numbers and what a person knows
//! of the model ([`card_facts`]); [`check`] holds a report against a baseline.
//!
//! This crate knows checkpoint folders and their records, and nothing of how they are made: no device,
//! no text, no recipe.

mod accepted;
mod axis;
mod blocks;
pub mod card;
pub mod card_facts;
mod card_loaders;
pub mod check;
pub mod collect;
pub mod compare;
mod error;
pub mod markdown;
pub mod page;
#[cfg(test)]
mod samples;
mod scatter;
mod summary;
mod task_table;
pub mod units;
mod verdict;

pub use collect::Report;
pub use error::{Error, Result};
