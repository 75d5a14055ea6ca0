//! Every linear against the base's, in the same coordinates.
//!
//! A recipe may have turned the model ([`crate::rotate`]), so the base is turned the same way before
//! weights are compared; which way is found by trying ([`rotation`]). How a linear then sits on its
//! weights, and what distinguishes damage from quantization, is [`Fit`]'s matter.

use std::sync::Arc;

use gptq_checkpoint::{Checkpoint, LinearShape, QuantizeConfig};
use gptq_compute::Device;
use gptq_model::{BlockParts, LinearId, Model, SourcePrecision};
use gptq_quant::{Choices, Columns, Recipe, Rotate};
use gptq_records::branch_report::BranchReport;
use serde::Serialize;

use super::base::{check_base, relative};
use super::dense;
use super::findings::{Check, Findings};
use super::fit::{Fit, energies};
use super::head::HeadChange;
use super::pairs::{Pair, Pairs};
use crate::columns::ColumnFactors;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::recipe_fit::unrotatable;
use crate::rotate::FusedRotations;

/// Comparison with the base.
#[derive(Clone, Debug, Serialize)]
pub struct Weights {
    /// Rotation folded into the checkpoint: `none`, `heads`, `full` or `learned`.
    pub rotation: &'static str,
    /// Change of the head's values, as energy over the base's; `null` where those are all zero.
    pub head_change: Option<f64>,
    /// Every linear.
    pub linears: Vec<LinearError>,
    /// What brings a model of this shape into the checkpoint's coordinates.
    #[serde(skip)]
    pub(super) rotations: Option<Arc<FusedRotations>>,
}

/// How far a linear is from the base's.
#[derive(Clone, Debug, Serialize)]
pub struct LinearError {
    /// Prefix in the checkpoint.
    pub name: String,
    /// Energy of the weights' error over the energy of the weights; `null` where the base's are all
    /// zero.
    pub weight_error: Option<f64>,
    /// Energy of the output error over that of the outputs, on the checkpoint's own activations;
    /// `null` without a text, and where the base's outputs are all zero.
    pub output_error: Option<f64>,
}

/// Compares every tensor with the base's.
pub(super) fn compare(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    stored: &QuantizeConfig,
    findings: &mut Findings,
    progress: &dyn Progress,
) -> Result<Weights> {
    check_base(checkpoint, base)?;
    let model = Model::new(base, Device::Cpu, SourcePrecision::Half, 1)?;
    let recorded = recorded_choices(checkpoint);
    let (folded, rotations) = folded(checkpoint, &model, recorded, progress)?;
    if let Some(choices) = recorded {
        let (rotate, columns) = (folded.rotate, folded.columns);
        for (key, recorded, found) in [
            (Rotate::KEY, choices.rotate.name(), rotate.name()),
            (Columns::KEY, choices.columns.name(), columns.name()),
        ] {
            if recorded != found {
                let message = format!("records {key}={recorded}, but the weights have {found}");
                findings.add(Check::Weights, "metadata", message);
            }
        }
    }
    let may_be_fitted = recorded.as_ref().is_none_or(|choices| choices.head > 0.0);
    let head = HeadChange::new(checkpoint, base, rotations.as_ref(), may_be_fitted)?;
    // Nobody else rotates, and nobody else fits the head: a file that says nothing of how it was made
    // was made by this program's default recipe, or aims at the base's weights as every other program
    // does.
    let choices = recorded.unwrap_or(match folded.rotate {
        Rotate::None if !head.shows_fitting() => Choices::AUTOGPTQ,
        _ => folded,
    });
    progress.begin("compare", base.config().num_hidden_layers);
    let pairs = Pairs { checkpoint, model: &model, rotations: rotations.as_ref() };
    let judged = pairs.each(|pair| Judged::new(pair, checkpoint, &choices), progress)?;
    let linears = judged.into_iter().map(|judged| judged.report(findings)).collect();
    progress.end();
    dense::check(checkpoint, base, (stored, rotations.as_ref()), findings)?;
    head.report(choices.head > 0.0, findings);
    let head_change = head.relative();
    let rotations = rotations.map(Arc::new);
    Ok(Weights { rotation: folded.rotate.name(), head_change, linears, rotations })
}

/// What was found of a linear, which is little beside the linear.
struct Judged {
    linear: LinearError,
    /// What is wrong, with its place; `None` of one that was left dense: that its values are the base's
    /// is checked with all else that is dense.
    faults: Option<Vec<(String, String)>>,
}

impl Judged {
    fn new(pair: &Pair<'_>, checkpoint: &Checkpoint, choices: &Choices) -> Result<Self> {
        let (faults, error, energy) = match &pair.packed {
            None => {
                let (error, energy) = dense::energies(checkpoint, &pair.name, &pair.base)?;
                (None, error, energy)
            }
            Some(packed) => {
                let fit = Fit::new(packed, &pair.base)?;
                // Those of experts are not shifted.
                let moves = matches!(pair.id, LinearId::O | LinearId::Down);
                let faults = fit.faults(&pair.name, moves && choices.residual > 0.0);
                (Some(faults), fit.error, fit.energy)
            }
        };
        let (name, weight_error) = (pair.name.clone(), relative(error, energy));
        Ok(Self { linear: LinearError { name, weight_error, output_error: None }, faults })
    }

    fn report(self, findings: &mut Findings) -> LinearError {
        if let Some(faults) = self.faults {
            findings.examine(Check::Weights, 1);
            for (place, what) in faults {
                findings.add(Check::Weights, place, what);
            }
        }
        self.linear
    }
}

/// Choices that the metadata records, or else the report: the card layout has no metadata.
fn recorded_choices(checkpoint: &Checkpoint) -> Option<Choices> {
    let metadata = &checkpoint.weight_files().first()?.metadata;
    let (recipe, choices) = match metadata.get("recipe") {
        Some(recipe) => (recipe.clone(), metadata.get("choices").cloned()),
        None => {
            let report = BranchReport::read(checkpoint.dir()).ok()?;
            (report.recipe, report.choices)
        }
    };
    let recipe: Recipe = recipe.parse().ok()?;
    // Choices of files that are not tuned say nothing of it, nor do those of before there were factors of
    // columns.
    let mut recorded = Choices { tune: 0, columns: Columns::Own, ..recipe.choices() };
    for setting in choices.iter().flat_map(|text| text.split(' ')) {
        // A later version's choices may be unknown here; those that are known still hold.
        let _ = recorded.set(setting);
    }
    Some(recorded)
}

/// Choices that are `best`'s but for what they fold into weights, and that.
type Folded = (Choices, Option<FusedRotations>);

/// What is folded into the checkpoint's weights: that under which the model's are nearest to them. The
/// rotation shows in v, q and o: a full one turns all of them, one of the heads v and o; then the factors of
/// columns in the first linears that they would change. A rotation is learned only where it is recorded, or
/// where nothing is and no other fits.
fn folded(
    checkpoint: &Checkpoint,
    model: &Model<'_>,
    recorded: Option<Choices>,
    progress: &dyn Progress,
) -> Result<Folded> {
    /// Of v and q, or of the one that makes both, unrelated weights have 4 or 2 with o's.
    const STRANGE: f64 = 1.5;
    let (source, config) = (model.checkpoint(), model.config());
    let of = |rotate, columns| Choices { rotate, columns, ..Choices::BEST };
    let turned = |rotate| {
        let choices = of(rotate, Columns::Own);
        Ok::<Folded, Error>((choices, FusedRotations::new(source, &choices, progress)?))
    };
    let turned_by = |block: &BlockParts<LinearShape>| {
        let ids = [LinearId::V, LinearId::Q, LinearId::Qkv, LinearId::O];
        ids.into_iter().filter(|id| block.linears.iter().any(|l| l.id == *id)).collect()
    };
    let rotatable = unrotatable(config).is_none();
    let was = |rotate| recorded.is_some_and(|choices| choices.rotate == rotate);
    let mut rotations = vec![Rotate::None, Rotate::Heads];
    rotations.extend(rotatable.then_some(Rotate::Full));
    rotations.extend((rotatable && was(Rotate::Learned)).then_some(Rotate::Learned));
    rotations.sort_by_key(|&rotate| !was(rotate));
    let possible = rotations.into_iter().map(turned).collect::<Result<Vec<_>>>()?;
    let (mut found, distance) = nearest(checkpoint, model, possible, &turned_by)?;
    if recorded.is_none() && rotatable && distance > STRANGE {
        let possible = vec![found, turned(Rotate::Learned)?];
        (found, _) = nearest(checkpoint, model, possible, &turned_by)?;
    }
    let (Choices { rotate, .. }, rotations) = found;
    let mut columns = vec![Columns::Own, Columns::Even];
    columns.sort_by_key(|&columns| recorded.is_none_or(|choices| choices.columns != columns));
    let possible = columns.into_iter().map(|columns| {
        let choices = of(rotate, columns);
        (choices, FusedRotations::with_columns(rotations.as_ref(), config, &choices))
    });
    let scaled_by = |block: &BlockParts<LinearShape>| {
        let ids = block.linears.iter().map(|linear| linear.id);
        ids.filter(|&id| ColumnFactors::pair_of(id, block).is_some()).take(2).collect()
    };
    Ok(nearest(checkpoint, model, possible.collect(), &scaled_by)?.0)
}

/// Those of `possible` under which the linears that `ids` names are nearest to the checkpoint's, and how far
/// these are; the first of those that fit alike, as where weights are all zeros.
fn nearest(
    checkpoint: &Checkpoint,
    model: &Model<'_>,
    mut possible: Vec<Folded>,
    ids: &dyn Fn(&BlockParts<LinearShape>) -> Vec<LinearId>,
) -> Result<(Folded, f64)> {
    let mut nearest = (f64::INFINITY, 0);
    for index in 0..model.config().num_hidden_layers {
        let frame = model.load_frame(index)?;
        let mut all_known = true;
        nearest.0 = f64::INFINITY;
        for (place, (_, rotations)) in possible.iter().enumerate() {
            let pairs = Pairs { checkpoint, model, rotations: rotations.as_ref() };
            let distance = distance(pairs, &frame, &ids(&frame))?;
            all_known &= distance.is_some();
            let distance = distance.unwrap_or(0.0);
            if distance < nearest.0 {
                nearest = (distance, place);
            }
        }
        if all_known {
            break;
        }
    }
    Ok((possible.swap_remove(nearest.1), nearest.0))
}

/// How far these linears of a block are from the base's: the sum of their relative errors, each at most that
/// of unrelated weights. `None` where the first is all zeros, which nothing changes.
fn distance(
    pairs: Pairs<'_>,
    frame: &BlockParts<LinearShape>,
    ids: &[LinearId],
) -> Result<Option<f64>> {
    const UNRELATED: f64 = 2.0;
    let mut sum = Some(0.0);
    for id in ids {
        let Some(linear) = frame.linears.iter().find(|linear| linear.id == *id) else { continue };
        let pair = pairs.read(linear, frame)?;
        let (error, energy) = match &pair.packed {
            Some(packed) => energies(packed, &pair.base)?,
            None => dense::energies(pairs.checkpoint, &pair.name, &pair.base)?,
        };
        let error = relative(error, energy).map(|error| error.min(UNRELATED));
        sum = match (sum, error) {
            (Some(sum), Some(error)) => Some(sum + error),
            (_, None) if Some(id) == ids.first() => None,
            (sum, _) => sum,
        };
    }
    Ok(sum)
}
