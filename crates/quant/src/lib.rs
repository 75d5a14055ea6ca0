//! GPTQ: grids, the solver and its recipes, as functions of weights and Hessians.
//!
//! The data's way: a [`gptq_compute::Gram`] of a linear's inputs becomes a [`Factored`] Hessian
//! ([`factor`]), shared by all linears with the same inputs; [`solve`] turns each weight matrix into
//! a [`Quantized`] one. [`round_to_nearest`] is the baseline without calibration. Nothing here knows
//! models, and of files only what they can say of a linear.

mod choices;
mod error;
mod gpu;
mod grid;
mod hessian;
mod host;
mod learned;
mod rotation;
mod rtn;
mod solved;
mod solver;
mod spec;
mod trial;

pub use choices::{Choices, Clip, GroupWeights, Rotate, ScalePrecision, Signs, ValueInputs};
pub use error::{Error, Result};
pub use hessian::{Factored, factor, factor_in_order};
pub use learned::Learner;
pub use rotation::{Rotation, split_mix};
pub use rtn::{round_to_nearest, rounded_weight};
pub use solved::{Codes, Quantized, Stored};
pub use solver::solve;
pub use spec::{QuantSpec, Recipe};
