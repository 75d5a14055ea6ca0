//! The Hugging Face Hub: downloads into the standard cache, and uploads of branches.
//!
//! - [`fetch`] brings the files that this project reads of a model or of a dataset's split, checks
//!   what arrives by size and hash, on request what is there as well, and goes on where an earlier
//!   run stopped.
//! - [`Stream`] brings a model's shards a few ahead of a reader that deletes them.
//! - [`plan_push`] says which file of a folder goes to which branch, and [`push`] takes it there.
//!
//! Uploads go through hf-hub, which speaks the Hub's Xet protocol. Downloads are this crate's own
//! HTTP: hf-hub 1.0 checks no hash (it drops the SHA-256 from listings), starts a broken file
//! again, and files an error page as if it were the file.
//!
//! This crate knows nothing of models, quantisation or the command line; progress is told through
//! [`Progress`]. Without the feature `client` it is empty.

#![cfg(feature = "client")]

mod api;
mod cache;
mod download;
mod error;
mod fetch;
mod hash;
mod hub;
mod needed;
mod progress;
mod push;
mod stop;
mod stream;

pub use error::{Error, Result};
pub use fetch::{Fetched, Source, fetch};
pub use hub::Hub;
pub use progress::Progress;
pub use push::{BranchPlan, PlannedFile, PushRequest, Pushed, plan_push, push};
pub use stream::Stream;
