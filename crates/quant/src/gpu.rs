//! The GPTQ solver on a GPU: the recipe's choices handed to the kernels, their results as a file
//! needs them.

use gptq_compute::Tensor;
use gptq_compute::cuda::{self, GroupWeights, SolveOptions};

use crate::error::{Error, Result};
use crate::hessian::Factored;
use crate::solver::{Codes, Quantised, Stored, group_index, stored_scales};
use crate::spec::QuantSpec;

/// Quantises `weight` `[out, in]` in device memory; see [`crate::solve`].
pub(crate) fn solve(weight: &Tensor, factored: &Factored, spec: &QuantSpec) -> Result<Quantised> {
    // AutoGPTQ: scales in f32 from weights as they were at the last block's end.
    let options = SolveOptions {
        bits: spec.bits,
        group_size: spec.group_size,
        group_weights: GroupWeights::Stale,
        half_scales: false,
        half_values: false,
        search: None,
        asymmetric: None,
    };
    let solved = cuda::solve(weight, &factored.upper, &factored.order, &factored.dead, &options)?;
    if !solved.loss.is_finite() {
        return Err(Error::NotFinite { what: "The weight" });
    }
    let (rows, n) = weight.shape();
    let group = spec.group_columns(n);
    let groups = n.div_ceil(group);
    Ok(Quantised {
        stored: Stored {
            out_features: rows,
            in_features: n,
            codes: Codes::Packed(solved.pack()?),
            scales: stored_scales(&solved.scales, rows)?,
            groups,
            g_idx: group_index(&factored.order, group),
        },
        loss: Some(solved.loss),
        weight: solved.weight,
    })
}
