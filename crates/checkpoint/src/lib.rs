//! Checkpoint folders: reading Hugging Face models, reading and writing AutoGPTQ files.
