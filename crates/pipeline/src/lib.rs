//! Calibration, the block walk, quantisation runs, perplexity, plans and sweeps.
