//! Why a shard did not come, as errors carry it.

use std::ops::Deref;
use std::sync::Arc;

/// Why a shard did not come: one cause for all who wait for it.
#[derive(Clone, Debug)]
pub struct Cause(pub(crate) Arc<dyn std::error::Error + Send + Sync>);

// No error itself, so that the cause is the next link of a chain.
impl Deref for Cause {
    type Target = dyn std::error::Error + Send + Sync;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}
