//! What lies in a branch's folder beside its weights, and who may write there.
//!
//! A [`branch_report`] says what was made and how good it is; a [`manifest`] lists the files with
//! their sums and what they were made from ([`source_digest`], [`dataset_identity`],
//! [`source_dtype`]); [`tasks`] are results of an evaluation harness. [`locks`] keep the processes of a sweep apart, and an [`atomic_file`] is
//! written whole or not at all.
//!
//! This crate knows checkpoint folders and nothing of how a branch is made, measured or shown: no
//! device, no text, no page.

pub mod atomic_file;
pub mod branch_report;
pub mod dataset_identity;
pub mod digest;
mod error;
pub mod locks;
pub mod manifest;
pub mod source_digest;
pub mod source_dtype;
pub mod tasks;

pub use error::{Error, Result};
