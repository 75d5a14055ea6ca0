//! Which choices of a recipe a model allows.
//!
//! A rotation of the residual stream needs norms that commute with it, and linears behind each norm that
//! can take its gain over: RMS norms, and none of what attention or the MLP gives. A shift of o and down
//! needs their products to reach the residual stream as they are, but for a factor. Everything else of a
//! recipe looks at one linear and its inputs, and holds for all. Into the stream of a language model that is
//! a part of a larger one come the outputs of other parts, too, which are carried as they are: it stays in
//! its coordinates.
//!
//! Experts are no obstacle: what routes tokens to them reads what gate reads, and is turned with it. Of a
//! shift their downs have no part, as none of them gives a token all that its MLP does: in blocks with
//! experts o alone makes up for what the stream lacks, which [`fit`] says.

use gptq_checkpoint::{Checkpoint, LinearId, ModelConfig, NormId, NormKind};
use gptq_quant::{Choices, QuantSpec, Rotate, ValueInputs};

use crate::error::{Error, Result};
use crate::learn_rotation::{LOOKS, WIDEST, block_weights};
use crate::tune;

/// Weights in the blocks of the largest model whose rotation is learned where nothing is said: a look reads them all.
const MOST_WEIGHTS: usize = 10_000_000_000;

/// Why the residual stream cannot be rotated; `None` where it can.
#[must_use]
pub fn unrotatable(model: &ModelConfig) -> Option<&'static str> {
    if model.norm == NormKind::Layer {
        return Some("norms take means off");
    }
    if model.wrapper().is_some() {
        return Some("what other parts make of images and sounds enters it as it is");
    }
    norms_results(model).then_some("what attention and the MLP give is normed")
}

/// Why a rotation of the residual stream cannot be learned from the weights, where it can be rotated; `None`
/// where it can.
fn unlearnable(model: &ModelConfig) -> Option<String> {
    let (width, vocabulary) = (model.hidden_size, model.vocab_size);
    if width > WIDEST {
        return Some(format!(
            "no rotation of more than {WIDEST} features is learned, and it has {width}"
        ));
    }
    (vocabulary < 2 * width).then(|| {
        format!(
            "a learned rotation is found again from the embedding, and {vocabulary} rows of {width} features are too \
             few for that"
        )
    })
}

/// Why a rotation is learned only where that is asked for.
fn dear(model: &ModelConfig, arriving: bool) -> Option<String> {
    if arriving {
        return Some(
            "a learned one is learned from all weights, which are not there yet".to_owned(),
        );
    }
    let weights = block_weights(model);
    (weights > MOST_WEIGHTS).then(|| {
        format!(
            "its blocks have {:.0} billion weights, all of which are read {LOOKS} times to learn one; ask for it with \
             --set {}={}",
            weights as f64 / 1e9,
            Rotate::KEY,
            Rotate::Learned.name()
        )
    })
}

/// Why o and down cannot be shifted to make up for what the residual stream lacks; `None` where they
/// can.
#[must_use]
pub fn unshiftable(model: &ModelConfig) -> Option<&'static str> {
    if model.is_parallel() {
        return Some("attention and the MLP are added at once");
    }
    norms_results(model).then_some("what attention and the MLP give is normed")
}

/// Whether some block has experts.
#[must_use]
pub(crate) fn has_experts(model: &ModelConfig) -> bool {
    (0..model.num_hidden_layers).any(|block| model.experts(block).is_some())
}

/// Leaves out what the model does not allow, of a recipe's defaults also what would take too long for it, and of the
/// rest says what holds for a part of it; a sentence on each. Of a model whose shards are `arriving` nothing is
/// looked at before its blocks are.
pub fn fit(model: &ModelConfig, arriving: bool, spec: &mut QuantSpec) -> Vec<String> {
    if !spec.recipe.calibrates() {
        return Vec::new();
    }
    let family = model.wrapper().unwrap_or(model.family);
    let own_rotate = spec.own_rotate;
    let choices = &mut spec.choices;
    let mut notes = Vec::new();
    let asked = choices.rotate;
    if let (true, Some(why)) = (asked.turns_stream(), unrotatable(model)) {
        choices.rotate = Rotate::Heads;
        notes.push(format!(
            "{}={} instead of {}: the residual stream of a {family} model cannot be rotated, as {why}",
            Rotate::KEY,
            Rotate::Heads.name(),
            asked.name()
        ));
    } else if let (Rotate::Learned, Some(why)) =
        (asked, unlearnable(model).or_else(|| dear(model, arriving).filter(|_| !own_rotate)))
    {
        choices.rotate = Rotate::Full;
        notes.push(format!(
            "{}={} instead of {}: {why}",
            Rotate::KEY,
            Rotate::Full.name(),
            asked.name()
        ));
    }
    if let (true, Some(why)) = (choices.residual > 0.0, unshiftable(model)) {
        notes.push(format!(
            "{}=0 instead of {}: o and down of a {family} model cannot make up for what the residual \
             stream lacks, as {why}",
            Choices::RESIDUAL,
            choices.residual
        ));
        choices.residual = 0.0;
    }
    if choices.values == ValueInputs::Attended && fuses_values(model) {
        notes.push(format!(
            "{}=plain instead of attended: v of a {family} model is one linear with q and k, and has no Hessian \
             of its own",
            Choices::VALUES
        ));
        choices.values = ValueInputs::Plain;
    }
    if choices.residual > 0.0 && has_experts(model) {
        notes.push(format!(
            "{}={} holds for o, and for down where there are no experts: no expert gives a token all that \
             the block does",
            Choices::RESIDUAL,
            choices.residual
        ));
    }
    notes
}

/// Refuses a branch whose scales cannot be tuned as it asks.
///
/// # Errors
/// [`Error::Choice`].
pub fn check_tuning(model: &ModelConfig, spec: &QuantSpec) -> Result<()> {
    tune::check_model(model, spec)
}

/// Refuses choices that [`fit`] would leave out.
pub(crate) fn check(model: &ModelConfig, spec: &QuantSpec) -> Result<()> {
    let mut fitted = spec.clone();
    let note = fit(model, false, &mut fitted).into_iter().next();
    match note.filter(|_| fitted.choices != spec.choices) {
        Some(note) => Err(Error::Choice { note }),
        None => Ok(()),
    }
}

/// Refuses to learn from weights that arrive one shard after the other, and go: they are looked at again and
/// again before the first block.
pub(crate) fn check_source(source: &Checkpoint, spec: &QuantSpec) -> Result<()> {
    let learns = spec.recipe.calibrates() && spec.choices.rotate == Rotate::Learned;
    if !(learns && source.is_arriving()) {
        return Ok(());
    }
    let note = format!(
        "{}={} learns from all weights before the first block, and these arrive while blocks are quantized; use \
         {}, or download the model first",
        Rotate::KEY,
        Rotate::Learned.name(),
        Rotate::Full.name()
    );
    Err(Error::Choice { note })
}

/// Whether q, k and v are one linear.
fn fuses_values(model: &ModelConfig) -> bool {
    let linears = (0..model.num_hidden_layers).flat_map(|block| model.block_linears(block));
    linears.into_iter().any(|linear| linear.id == LinearId::Qkv)
}

/// Whether some block norms what is added to the residual stream.
fn norms_results(model: &ModelConfig) -> bool {
    let after = |id| matches!(id, NormId::AfterAttention | NormId::AfterMlp);
    let blocks = 0..model.num_hidden_layers;
    blocks.flat_map(|block| model.block_norms(block)).any(|norm| after(norm.id))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use gptq_quant::Recipe;

    use super::*;

    fn fitted(family: &str, recipe: Recipe) -> (Choices, Vec<String>) {
        let text = format!(
            r#"{{"model_type":"{family}","hidden_size":64,"intermediate_size":64,"vocab_size":128,
            "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16}}"#
        );
        let model = ModelConfig::parse(&text, Path::new("config.json")).unwrap();
        let mut spec = QuantSpec::new(4, None, true, 0.01, recipe);
        let asked = spec.clone();
        let notes = fit(&model, false, &mut spec);
        assert_eq!(check(&model, &asked).is_err(), asked.choices != spec.choices, "{family}");
        check(&model, &spec).unwrap();
        (spec.choices, notes)
    }

    /// What is left of `rotate=learned` for a model of this width and vocabulary.
    fn learned(family: &str, (width, vocabulary): (usize, usize)) -> (Rotate, Vec<String>) {
        let text = format!(
            r#"{{"model_type":"{family}","hidden_size":{width},"intermediate_size":64,"vocab_size":{vocabulary},
            "num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16}}"#
        );
        let model = ModelConfig::parse(&text, Path::new("config.json")).unwrap();
        let mut spec = QuantSpec::new(4, None, true, 0.01, Recipe::Best);
        spec.choices.rotate = Rotate::Learned;
        let asked = spec.clone();
        let notes = fit(&model, false, &mut spec);
        assert_eq!(check(&model, &asked).is_err(), spec.choices.rotate != Rotate::Learned);
        (spec.choices.rotate, notes)
    }

    #[test]
    fn a_rotation_is_learned_where_it_can_be_folded_and_found_again() {
        assert_eq!(learned("llama", (64, 128)), (Rotate::Learned, vec![]));
        assert_eq!(learned("mixtral", (64, 128)).0, Rotate::Learned);
        let (rotate, notes) = learned("gemma2", (64, 128));
        assert_eq!(rotate, Rotate::Heads);
        assert!(notes[0].starts_with("rotate=heads instead of learned: the residual"), "{notes:?}");
        for (sides, why) in [
            ((64, 127), "rotate=full instead of learned: a learned rotation is found again"),
            ((16_448, 20_000), "rotate=full instead of learned: no rotation of more than 16384"),
        ] {
            let (rotate, notes) = learned("llama", sides);
            assert_eq!(rotate, Rotate::Full);
            assert!(notes[0].starts_with(why), "{notes:?}");
        }
    }

    /// By default only where a look is cheap; what was asked for by name stays.
    #[test]
    fn large_models_and_those_that_arrive_keep_the_common_rotation_unless_asked() {
        let large = crate::operations::tests::llama_70b();
        let small = r#"{"model_type":"llama","hidden_size":4096,"intermediate_size":14336,"vocab_size":128256,
            "num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8}"#;
        let small = ModelConfig::parse(small, Path::new("config.json")).unwrap();
        for recipe in [Recipe::Best, Recipe::Tuned] {
            for (model, arriving, asks, rotate, said) in [
                (&small, false, false, Rotate::Learned, None),
                (&small, true, false, Rotate::Full, Some("which are not there yet")),
                (
                    &large,
                    false,
                    false,
                    Rotate::Full,
                    Some("have 68 billion weights, all of which are read 12 times"),
                ),
                (&large, false, true, Rotate::Learned, None),
                (&small, true, true, Rotate::Learned, None),
            ] {
                let mut spec = QuantSpec::new(4, None, true, 0.03, recipe);
                if asks {
                    spec.set(&["rotate=learned".to_owned()]).unwrap();
                }
                let notes = fit(model, arriving, &mut spec);
                assert_eq!(spec.choices.rotate, rotate, "{notes:?}");
                assert_eq!(notes.len(), usize::from(said.is_some()), "{notes:?}");
                assert!(said.is_none_or(|said| notes[0].contains(said)), "{notes:?}");
                // What was fitted is not refused, what would have been changed is.
                check(model, &spec).unwrap();
            }
        }
        assert!(check(&large, &QuantSpec::new(4, None, true, 0.03, Recipe::Best)).is_err());
    }

    #[test]
    fn what_a_model_does_not_allow_is_left_out_and_said() {
        let best = Choices::BEST;
        for family in ["llama", "gemma", "phi3", "granite", "glm", "smollm3"] {
            assert_eq!(fitted(family, Recipe::Best), (best, vec![]), "{family}");
        }
        for (family, why) in [
            ("gemma2", "is normed"),
            ("olmo3", "is normed"),
            ("glm4", "is normed"),
            ("cohere", "norms take means off"),
            ("cohere2", "added at once"),
        ] {
            let (choices, notes) = fitted(family, Recipe::Best);
            let without = Choices { rotate: Rotate::Heads, residual: 0.0, ..best };
            assert_eq!((choices, notes.len()), (without, 2), "{family}");
            assert!(notes.iter().any(|note| note.contains(why)), "{family}: {notes:?}");
            assert!(notes[0].starts_with("rotate=heads instead of learned"), "{notes:?}");
            for recipe in [Recipe::AutoGptq, Recipe::Rtn] {
                assert_eq!(fitted(family, recipe), (Choices::AUTOGPTQ, vec![]), "{family}");
            }
        }
    }

    #[test]
    fn a_fused_v_has_no_hessian_of_its_own() {
        for (family, fused) in [("llama", false), ("gemma3_text", false), ("phi3", true)] {
            let text = format!(
                r#"{{"model_type":"{family}","hidden_size":64,"intermediate_size":64,"vocab_size":128,
                "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16}}"#
            );
            let model = ModelConfig::parse(&text, Path::new("config.json")).unwrap();
            let mut spec = QuantSpec::new(4, None, true, 0.01, Recipe::AutoGptq);
            spec.set(&["values=attended".to_owned()]).unwrap();
            assert_eq!(check(&model, &spec).is_err(), fused, "{family}");
            let notes = fit(&model, false, &mut spec);
            assert_eq!(notes.len(), usize::from(fused), "{family}: {notes:?}");
            assert_eq!(spec.choices.values == ValueInputs::Plain, fused, "{family}");
            check(&model, &spec).unwrap();
        }
    }

    /// The choices stay, and whom they are for is said.
    #[test]
    fn experts_take_everything_but_the_shift_of_down() {
        for family in ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"] {
            let (choices, notes) = fitted(family, Recipe::Best);
            assert_eq!((choices, notes.len()), (Choices::BEST, 1), "{family}: {notes:?}");
            assert!(notes[0].starts_with("residual=") && notes[0].contains("experts"), "{notes:?}");
            assert_eq!(fitted(family, Recipe::AutoGptq), (Choices::AUTOGPTQ, vec![]), "{family}");
        }
    }
}
