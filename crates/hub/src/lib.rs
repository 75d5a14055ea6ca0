//! The Hugging Face Hub: downloads into the standard cache, and uploads of branches.
//!
//! - [`fetch`] brings the files that this project reads of a model or of a dataset's split, checks
//!   what arrives by size and hash, on request what is there as well, and goes on where an earlier
//!   run stopped.
//! - [`Stream`] brings a model's shards a few ahead of a reader that deletes them.
//! - [`plan_push`] says which file of a folder goes to which branch, and [`push`] takes it there.
//!
//! Large files are uploaded by git-lfs's batch protocol, which the Hub takes besides its Xet protocol
//! (its Python client speaks it where hf-xet is not installed) and other servers take alone. Chunks
//! that are there already are sent again, which Xet would save; quantized weights share few. No other
//! library for the Hub is used: hf-hub 1.0 checks no hash of a download, starts a broken file again,
//! and puts weights into git itself where a server has no Xet.
//!
//! This crate knows nothing of how models are made or of the command line; how the files of a model
//! are called it asks `gptq-checkpoint`. Progress is shown through [`Progress`]. Without the feature
//! `client` it is empty.

#![cfg(feature = "client")]

mod api;
mod cache;
mod commit;
mod download;
mod error;
mod fetch;
mod hash;
mod http;
mod hub;
mod lfs;
mod listing;
mod lock;
mod needed;
mod offline;
mod plan;
mod progress;
mod push;
mod retry;
mod revision;
mod send;
mod stop;
mod stream;
mod tree;

pub use error::{Error, Result};
pub use fetch::{Fetched, Source, fetch};
pub use hash::Digest;
pub use hub::Hub;
pub use listing::{Listing, RemoteFile};
pub use plan::{BranchPlan, PlannedFile, plan_push};
pub use progress::Progress;
pub use push::{PushRequest, Pushed, push};
pub use stream::Stream;
