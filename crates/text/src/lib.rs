//! From a dataset's name to windows of tokens.
//!
//! A [`dataset`] is named by one string and read from the Hub's cache or a file, as texts or as
//! conversations ([`chat`]); [`tokens`] encode them; [`calibration`] draws windows from them by a recipe, [`protocol`] cuts it into those that a
//! perplexity is defined on, and [`evaluation`] does all of it for a checkpoint. [`home`] is where `~`
//! is. The other way, [`token_stream`] gives the text of tokens while a model makes them.
//!
//! This crate knows checkpoints by their tokenizers and the records of what a branch has seen, and
//! nothing of weights or devices.

#[cfg(test)]
#[path = "../../../tests/util/needs.rs"]
mod needs;
#[cfg(test)]
#[path = "../../../tests/util/split_mix.rs"]
mod split_mix;

mod bos;
pub mod calibration;
pub mod chat;
mod chat_files;
pub mod dataset;
mod error;
pub mod evaluation;
pub mod evaluation_sets;
pub mod home;
mod pieces;
pub mod protocol;
pub mod python_random;
mod recipe;
mod text_files;
pub mod token_stream;
pub mod tokens;

pub use error::{Error, Result};
