//! Every linear against the base's, in the same coordinates.
//!
//! A recipe may have turned the model ([`crate::rotate`]), so the base is turned the same way before
//! weights are compared; which way is found by trying ([`rotation`]). How a linear then sits on its
//! weights, and what distinguishes damage from quantization, is [`Fit`]'s matter.

use std::sync::Arc;

use gptq_checkpoint::{Checkpoint, QuantizeConfig};
use gptq_compute::Device;
use gptq_model::{LinearId, Model, SourcePrecision};
use gptq_quant::{Choices, Recipe, Rotate};
use gptq_records::branch_report::BranchReport;
use serde::Serialize;

use super::base::{check_base, relative};
use super::dense;
use super::findings::{Check, Findings};
use super::fit::{Fit, energies};
use super::head::HeadChange;
use super::learned_stream::{is_embedding_of, learned_stream};
use super::pairs::{Pair, Pairs};
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
    let report = BranchReport::read(checkpoint.dir()).ok();
    let recorded = recorded_choices(checkpoint, report.as_ref());
    let recorded_rotate = recorded.map(|choices| choices.rotate);
    let (rotate, rotations) = rotation(checkpoint, &model, recorded_rotate)?;
    if let Some(choices) = recorded.filter(|choices| choices.rotate != rotate) {
        let message = format!(
            "records {}={}, but the weights have {}",
            Rotate::KEY,
            choices.rotate.name(),
            rotate.name()
        );
        findings.add(Check::Weights, "metadata", message);
    }
    let may_be_fitted = recorded.as_ref().is_none_or(|choices| choices.head > 0.0);
    let recorded_fit = report.and_then(|report| report.head?.fit);
    let head = HeadChange::new(checkpoint, base, rotations.as_ref(), may_be_fitted, recorded_fit)?;
    // Nobody else rotates, and nobody else fits the head: a file that says nothing of how it was made
    // was made by this program's default recipe, or aims at the base's weights as every other program
    // does.
    let choices = recorded.unwrap_or(match rotate {
        Rotate::None if !head.shows_fitting() => Choices::AUTOGPTQ,
        rotate => Choices { rotate, ..Choices::BEST },
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
    Ok(Weights { rotation: rotate.name(), head_change, linears, rotations })
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
fn recorded_choices(checkpoint: &Checkpoint, report: Option<&BranchReport>) -> Option<Choices> {
    let metadata = &checkpoint.weight_files().first()?.metadata;
    let (recipe, choices) = match metadata.get("recipe") {
        Some(recipe) => (recipe.clone(), metadata.get("choices").cloned()),
        None => {
            let report = report?;
            (report.recipe.clone(), report.choices.clone())
        }
    };
    let recipe: Recipe = recipe.parse().ok()?;
    // Choices of files that are not tuned say nothing of it.
    let mut recorded = Choices { tune: 0, ..recipe.choices() };
    for setting in choices.iter().flat_map(|text| text.split(' ')) {
        // A later version's choices may be unknown here; those that are known still hold.
        let _ = recorded.set(setting);
    }
    Some(recorded)
}

/// A rotation of the recipe's choices, and what it folds.
type Folded = (Rotate, Option<FusedRotations>);

/// The rotation under which the model's v, q and o are nearest to the checkpoint's: a full rotation
/// turns all of them, one of the heads v and o. Of rotations that fit alike, as where those weights are
/// all zeros, the recorded one. A learned one is found from the embeddings ([`learned_stream`]), where it is
/// recorded, or where these are not as the nearest other one would leave them.
fn rotation(
    checkpoint: &Checkpoint,
    model: &Model<'_>,
    recorded: Option<Rotate>,
) -> Result<Folded> {
    /// How much nearer a learned rotation has to be than all others where none is recorded.
    const NEARER: f64 = 0.5;
    let (base, rotatable) = (model.checkpoint(), unrotatable(model.config()).is_none());
    let not_found = || Error::RotationNotFound { checkpoint: checkpoint.dir().to_owned() };
    let folded = |rotate| {
        let none = || Err(not_found());
        Ok::<Folded, Error>((rotate, FusedRotations::new(model.config(), rotate, none)?))
    };
    let learned = || {
        let Some(stream) = learned_stream(checkpoint, base)? else { return Ok(None) };
        let rotations = FusedRotations::new(model.config(), Rotate::Learned, || Ok(stream))?;
        // Where the two embeddings are not related by any, it is none.
        let fits = is_embedding_of(checkpoint, base, rotations.as_ref())?;
        Ok::<Option<Folded>, Error>(fits.then_some((Rotate::Learned, rotations)))
    };
    let mut rotations = vec![Rotate::None, Rotate::Heads];
    rotations.extend(rotatable.then_some(Rotate::Full));
    rotations.sort_by_key(|&rotate| Some(rotate) != recorded);
    let mut possible = rotations.into_iter().map(folded).collect::<Result<Vec<_>>>()?;
    let is_recorded = recorded == Some(Rotate::Learned) && rotatable;
    if is_recorded && let Some(learned) = learned()? {
        possible.insert(0, learned);
    }
    let (place, distance) = nearest(checkpoint, model, &possible)?;
    let found = possible.swap_remove(place);
    if is_recorded || !rotatable || is_embedding_of(checkpoint, base, found.1.as_ref())? {
        return Ok(found);
    }
    // An embedding that says nothing of its rotation is compared with the others.
    let learned = match learned() {
        Err(Error::RotationNotFound { .. }) => None,
        learned => learned?,
    };
    let Some(learned) = learned else { return Ok(found) };
    let (_, least) = nearest(checkpoint, model, std::slice::from_ref(&learned))?;
    Ok(if least < NEARER * distance { learned } else { found })
}

/// The place of the rotation under which the linears that rotations turn are nearest to the checkpoint's, and how
/// far they are.
fn nearest(
    checkpoint: &Checkpoint,
    model: &Model<'_>,
    possible: &[Folded],
) -> Result<(usize, f64)> {
    let mut nearest = (0, f64::INFINITY);
    for index in 0..model.config().num_hidden_layers {
        let mut all_known = true;
        nearest.1 = f64::INFINITY;
        for (place, (_, rotations)) in possible.iter().enumerate() {
            let pairs = Pairs { checkpoint, model, rotations: rotations.as_ref() };
            let distance = distance(pairs, index)?;
            all_known &= distance.is_some();
            let distance = distance.unwrap_or(0.0);
            if distance < nearest.1 {
                nearest = (place, distance);
            }
        }
        if all_known {
            break;
        }
    }
    Ok(nearest)
}

/// How far v, q and o of a block are from the base's, turned so: the sum of their relative errors,
/// each at most that of unrelated weights. `None` where v is all zeros, which no rotation changes.
fn distance(pairs: Pairs<'_>, index: usize) -> Result<Option<f64>> {
    const UNRELATED: f64 = 2.0;
    let frame = pairs.model.load_frame(index)?;
    let mut sum = Some(0.0);
    for id in [LinearId::V, LinearId::Q, LinearId::Qkv, LinearId::O] {
        let Some(linear) = frame.linears.iter().find(|linear| linear.id == id) else { continue };
        let pair = pairs.read(linear, &frame.gains)?;
        let (error, energy) = match &pair.packed {
            Some(packed) => energies(packed, &pair.base)?,
            None => dense::energies(pairs.checkpoint, &pair.name, &pair.base)?,
        };
        let error = relative(error, energy).map(|error| error.min(UNRELATED));
        sum = match (sum, error) {
            (Some(sum), Some(error)) => Some(sum + error),
            (_, None) if matches!(id, LinearId::V | LinearId::Qkv) => None,
            (sum, _) => sum,
        };
    }
    Ok(sum)
}
