//! The Llama forward pass on a compute device, block by block, in stages.
