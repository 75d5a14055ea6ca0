//! The copy of rotary angles that a card keeps.

use std::sync::{OnceLock, Weak};

use super::buffer::Buffer;
use super::context::Cuda;

/// Cosines and sines on the card that used the table first.
#[derive(Clone, Debug)]
pub(crate) struct DeviceTable {
    pub(super) cuda: Weak<Cuda>,
    pub(super) cos: Buffer<f32>,
    pub(super) sin: Buffer<f32>,
}

/// Where a [`RopeTable`](crate::RopeTable) keeps its copy on a card.
pub(crate) type DeviceTableCell = OnceLock<DeviceTable>;
