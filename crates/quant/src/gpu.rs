//! The GPTQ solver on a GPU: the recipe's choices handed to the kernels, their results as a file
//! needs them.

use gptq_compute::Tensor;
use gptq_compute::cuda::{self, ClipSearch, SolveOptions};

use crate::choices::{Clip, GroupWeights, ScalePrecision};
use crate::error::{Error, Result};
use crate::grid::signed_ratios;
use crate::hessian::Factored;
use crate::solved::{Codes, Quantized, Stored, group_index, stored_scales};
use crate::spec::QuantSpec;

/// Quantizes `weight` `[out, in]` in device memory; see [`crate::solve`].
pub(crate) fn solve(weight: &Tensor, factored: &Factored, spec: &QuantSpec) -> Result<Quantized> {
    let choices = &spec.choices;
    let ratios = signed_ratios(spec.signs());
    let by_solving = choices.clip == Clip::Solve;
    let search = ClipSearch { ratios: &ratios, importance: &factored.importance, by_solving };
    let options = SolveOptions {
        bits: spec.bits,
        group_size: spec.group_size,
        fresh: choices.group_weights == GroupWeights::Fresh,
        half_scales: choices.scales == ScalePrecision::Half,
        search: (choices.clip != Clip::None).then_some(search),
    };
    let solved = cuda::solve(weight, &factored.upper, &factored.order, &factored.dead, &options)?;
    let (rows, n) = weight.shape();
    let scales = stored_scales(&solved.scales, rows)?;
    if !solved.loss.is_finite() {
        return Err(Error::NotFinite { what: "The weight" });
    }
    let group = spec.group_columns(n);
    let groups = n.div_ceil(group);
    Ok(Quantized {
        stored: Stored {
            out_features: rows,
            in_features: n,
            codes: Codes::Packed(solved.pack()?),
            scales,
            groups,
            g_idx: group_index(&factored.order, group),
        },
        loss: Some(solved.loss),
        weight: solved.weight,
    })
}
