//! Stored tensors that are no part of the model that config.json describes.
//!
//! Folders hold more than their model: rotary frequencies that old versions saved, heads of a
//! training run, adapters that were never merged, blocks that somebody cut off in config.json alone.
//! Loaders leave all of it out, mostly in silence. Here what may change what the model computes is
//! refused, and the rest is said.

use crate::names::{BLOCKS, EMBEDDING, FINAL_NORM, HEAD, LEAVES};
use crate::stored_names::likely_plain;
use crate::{Error, ModelConfig, Result};

/// What a tensor's name says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A part of the model.
    Part,
    /// Of another part of a multimodal model, as it is.
    Carried,
    /// Of the language model of a multimodal one under a name that its others do not have: some reader would
    /// take it in place of the one that is named as they are.
    Alias,
    /// Rotary frequencies: every loader computes its own.
    Frequencies,
    /// Of a block that config.json does not count.
    Beyond,
    /// Of a layer behind the blocks that predicts one more token, as config.json counts them.
    Prediction,
    /// All experts of a block in one tensor.
    Fused,
    /// A weight inside of a block that no linear or norm of the family uses: the model would
    /// compute with it.
    Weight,
    /// The dense weight of a linear that is packed as well: loaders read one of them.
    Dense,
    /// Anything else.
    Other,
}

/// Stored tensors that no part of the model uses and that are left out, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strays {
    /// Those of blocks beyond `num_hidden_layers`.
    pub beyond: Vec<String>,
    /// Those of layers behind the blocks that predict one more token (`num_nextn_predict_layers`).
    pub prediction: Vec<String>,
    /// Dense weights of linears that are packed as well.
    pub dense: Vec<String>,
    /// All others but rotary frequencies.
    pub others: Vec<String>,
}

impl Strays {
    /// A sentence for each kind that is there; `config` is the model's.
    pub(crate) fn warnings(&self, config: &ModelConfig) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(first) = self.beyond.first() {
            warnings.push(format!(
                "config.json has num_hidden_layers {}, but the weights hold {} of blocks beyond, such \
                 as `{first}`: they are left out, so the model is cut short",
                config.num_hidden_layers,
                tensors(self.beyond.len())
            ));
        }
        if let Some(first) = self.prediction.first() {
            warnings.push(format!(
                "the weights hold {} of layers that predict further tokens, such as `{first}`: they are \
                 left out, as nothing that the model says needs them",
                tensors(self.prediction.len())
            ));
        }
        if let Some(first) = self.dense.first() {
            warnings.push(format!(
                "the weights hold {} of linears that are packed as well, such as `{first}`: they are \
                 left out, and the packed ones read",
                match self.dense.len() {
                    1 => "1 dense tensor".to_owned(),
                    count => format!("{count} dense tensors"),
                }
            ));
        }
        if let Some(first) = self.others.first() {
            let count = tensors(self.others.len());
            let family = config.family;
            let mut text = format!("{count} no part of a `{family}` model and left out: `{first}`");
            if self.others.len() > 1 {
                text.push_str(" and others");
            }
            if let Some(adapter) = self.others.iter().find(|name| is_adapter(name)) {
                text.push_str(&format!("; `{adapter}` is of an adapter that was not merged"));
            }
            warnings.push(text);
        }
        warnings
    }
}

pub(crate) fn tensors(count: usize) -> String {
    format!("{count} tensor{}", if count == 1 { "" } else { "s" })
}

/// The stored tensors of a model, told apart by their names.
pub(crate) struct Stored<'a> {
    /// The model's.
    pub(crate) config: &'a ModelConfig,
    /// Whether a linear, by its full name, is packed.
    pub(crate) packed: &'a dyn Fn(&str) -> bool,
}

impl Stored<'_> {
    /// Tensors that are left out, whatever is done with the model.
    pub(crate) fn strays<'n>(&self, names: impl Iterator<Item = &'n str>) -> Strays {
        let mut strays = Strays::default();
        for name in names {
            match self.role_of_stored(name) {
                Role::Part | Role::Frequencies | Role::Carried => {}
                // Not left out: the model is refused.
                Role::Weight | Role::Fused | Role::Alias => {}
                Role::Beyond => strays.beyond.push(name.to_owned()),
                Role::Prediction => strays.prediction.push(name.to_owned()),
                Role::Dense => strays.dense.push(name.to_owned()),
                Role::Other => strays.others.push(name.to_owned()),
            }
        }
        strays
    }

    /// Refuses weights of blocks that the family does not have, and experts that are stored as one.
    pub(crate) fn check<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<()> {
        let mut unknown = None;
        for name in names {
            match self.role_of_stored(name) {
                Role::Fused => return Err(Error::FusedExperts { tensor: name.to_owned() }),
                Role::Alias => {
                    let plain = likely_plain(name).unwrap_or_default();
                    let own = self.config.stored_name(&plain).into_owned();
                    return Err(Error::Alias { tensor: name.to_owned(), own });
                }
                Role::Weight if unknown.is_none() => unknown = Some(name.to_owned()),
                _ => {}
            }
        }
        let Some(tensor) = unknown else { return Ok(()) };
        if is_adapter(&tensor) {
            return Err(Error::Adapter { tensor });
        }
        Err(Error::UnknownWeight { tensor, family: self.config.family })
    }

    /// The role of a tensor by the name that it is stored under.
    fn role_of_stored(&self, name: &str) -> Role {
        match self.config.plain_name(name) {
            Some(plain) => self.role(&plain),
            None if self.config.wrapper().is_none() => self.role(name),
            None if likely_plain(name).is_some() => Role::Alias,
            None => Role::Carried,
        }
    }

    fn role(&self, name: &str) -> Role {
        if [EMBEDDING, FINAL_NORM, HEAD].contains(&name) {
            return Role::Part;
        }
        if name.ends_with("rotary_emb.inv_freq") {
            return Role::Frequencies;
        }
        let block = name.strip_prefix(BLOCKS).and_then(|rest| rest.split_once('.'));
        let Some((block, part)) = block else { return Role::Other };
        let Ok(block) = block.parse::<usize>() else { return Role::Other };
        let config = self.config;
        if block >= config.num_hidden_layers {
            let predicts = block - config.num_hidden_layers < config.prediction_layers();
            return if predicts { Role::Prediction } else { Role::Beyond };
        }
        let fused = [".experts.gate_up_proj", ".experts.down_proj"];
        if config.experts(block).is_some() && fused.iter().any(|end| part.ends_with(end)) {
            return Role::Fused;
        }
        let Some((module, leaf)) = part.rsplit_once('.') else { return Role::Other };
        if config.block_dense(block).iter().any(|dense| dense.name == part) {
            return Role::Part;
        }
        let linear = config.block_linear(block, module).is_some();
        let norm = config.block_norms(block).iter().any(|norm| norm.name == module);
        let packed = || {
            let full = name.rsplit_once('.').map_or(name, |(full, _)| full);
            linear && (self.packed)(full)
        };
        match leaf {
            "weight" if packed() => Role::Dense,
            "weight" if linear || norm => Role::Part,
            "weight" => Role::Weight,
            "bias" if linear => Role::Part,
            _ if LEAVES.contains(&leaf) && packed() => Role::Part,
            _ => Role::Other,
        }
    }
}

/// Whether the name is that of a low-rank adapter, as PEFT gives it.
fn is_adapter(name: &str) -> bool {
    name.contains("lora_")
}
