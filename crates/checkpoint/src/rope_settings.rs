//! Rotary settings of config.json, in all their forms.
//!
//! The rules are those of transformers (`modeling_rope_utils.py`, and the configurations that have
//! their own).

use serde_json::{Map, Value};

use crate::Result;
use crate::family::{Family, LocalRope, Mrope};
use crate::fields::Fields;
use crate::rope::{LongRope, Rope, RopeScaling, Yarn};

const TYPES: &str =
    "one of the types `default`, `linear`, `dynamic`, `llama3`, `yarn` and `longrope`";
const BY_KIND: &str = "an object for each of `full_attention` and `sliding_attention`";
const MAX_CONTEXT: u64 = 1 << 40;
const ORIGINAL: &str = "original_max_position_embeddings";
const PARTIAL: &str = "partial_rotary_factor";
const SECTIONS: &str = "mrope_section";

/// What settings are read against.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    pub(crate) fields: &'a Fields<'a>,
    pub(crate) family: &'a Family,
    /// `max_position_embeddings`.
    pub(crate) context: usize,
    /// Features of a head.
    pub(crate) head_dim: usize,
}

impl Reader<'_> {
    /// The settings of blocks that attend to everything, and those of blocks that slide where these are
    /// others: the older form (`rope_theta`, `rope_scaling`) and that of transformers 5
    /// (`rope_parameters`).
    pub(crate) fn read(self) -> Result<(Rope, Option<Rope>)> {
        match self.family.local_rope {
            None => Ok((self.shared()?, None)),
            Some(local) => self.by_kind(local).map(|(global, local)| (global, Some(local))),
        }
    }

    /// Settings of all blocks.
    fn shared(self) -> Result<Rope> {
        let older = self.theta(None)?;
        // transformers takes the older key where a file has both.
        for (key, within) in
            [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
        {
            let Some(value) = self.fields.get(key) else { continue };
            let Some(map) = value.as_object() else {
                return Err(self.fields.unsupported(key, value, "an object"));
            };
            if map.is_empty() {
                continue;
            }
            let nested = Fields { raw: map, file: self.fields.file, within };
            // The older key is there to change the frequencies; the newer one holds all settings, and
            // those without one are plain.
            if key == "rope_scaling" && kind(map).is_none() {
                return Err(self.fields.unsupported(key, value, TYPES));
            }
            let theta = nested.positive("rope_theta")?.unwrap_or(older);
            return self.settings(theta, Some(&nested));
        }
        self.settings(older, None)
    }

    /// Settings of either kind of block.
    fn by_kind(self, local: LocalRope) -> Result<(Rope, Rope)> {
        let object = |key| match self.fields.get(key) {
            None => Ok(None),
            Some(value) => match value.as_object() {
                Some(map) => Ok(Some(map).filter(|map| !map.is_empty())),
                None => Err(self.fields.unsupported(key, value, "an object")),
            },
        };
        let (older, newer) = (object("rope_scaling")?, object("rope_parameters")?);
        let of_kind = |kind: &str, within| {
            let Some(value) = newer.and_then(|map| map.get(kind)).filter(|v| !v.is_null()) else {
                return Ok(None);
            };
            match value.as_object() {
                Some(raw) => Ok(Some(Fields { raw, file: self.fields.file, within })),
                None => Err(self.fields.unsupported("rope_parameters", value, BY_KIND)),
            }
        };
        let full = of_kind("full_attention", "rope_parameters.full_attention.")?;
        let sliding = of_kind("sliding_attention", "rope_parameters.sliding_attention.")?;
        if newer.is_some() && full.is_none() && sliding.is_none() {
            let value = self.fields.raw.get("rope_parameters").unwrap_or(&Value::Null);
            return Err(self.fields.unsupported("rope_parameters", value, BY_KIND));
        }
        let older =
            older.map(|raw| Fields { raw, file: self.fields.file, within: "rope_scaling." });
        if let Some(older) = &older {
            refuse_ambiguous(older, full.as_ref().map(|full| full.raw), newer.is_some())?;
        }
        let full = full.or(older);
        let global = self.settings(self.theta(full.as_ref())?, full.as_ref())?;
        let theta = match (local, &sliding) {
            (_, Some(nested)) if nested.get("rope_theta").is_some() => {
                nested.required("rope_theta")?
            }
            (LocalRope::Base(key, default), _) => self.fields.positive(key)?.unwrap_or(default),
            (LocalRope::Unscaled, _) => self.unscaled_theta()?,
        };
        Ok((global, self.settings(theta, sliding.as_ref())?))
    }

    /// The base of blocks that slide in a family of one base, where their own settings say none: what
    /// transformers 5 takes, unless versions before it took another.
    fn unscaled_theta(self) -> Result<f64> {
        const KEY: &str = "rope_theta";
        let default = self.family.theta;
        match self.fields.positive(KEY)? {
            Some(theta) if theta != default => Err(self.fields.invalid(
                KEY,
                format!(
                    "is `{theta}`, which versions of transformers take for all blocks or for those that do \
                     not slide; say the base of either kind in `rope_parameters`"
                ),
            )),
            _ => Ok(default),
        }
    }

    /// The base, of nested settings or beside them.
    fn theta(self, nested: Option<&Fields<'_>>) -> Result<f64> {
        if let Some(theta) = nested.map(|f| f.positive("rope_theta")).transpose()?.flatten() {
            return Ok(theta);
        }
        Ok(self.fields.positive("rope_theta")?.unwrap_or(self.family.theta))
    }

    fn settings(self, theta: f64, nested: Option<&Fields<'_>>) -> Result<Rope> {
        let dims = self.dims(nested)?;
        if let Some(mrope) = self.family.mrope {
            self.check_sections(mrope, nested, dims / 2)?;
        }
        let scaling = match nested {
            Some(nested) => self.scaling(nested, dims)?,
            None => RopeScaling::None,
        };
        Ok(Rope { theta, dims, scaling })
    }

    /// Features of a head that are rotated.
    fn dims(self, nested: Option<&Fields<'_>>) -> Result<usize> {
        let Some(default) = self.family.partial else { return Ok(self.head_dim) };
        let nested = nested.map(|f| f.positive(PARTIAL)).transpose()?.flatten();
        let share = match nested {
            Some(share) => share,
            None => self.fields.positive(PARTIAL)?.unwrap_or(default),
        };
        let dims = (self.head_dim as f64 * share) as usize;
        // Pairs of features are turned.
        if share > 1.0 || dims == 0 || !dims.is_multiple_of(2) {
            let reason = format!(
                "is {share}, which rotates {dims} of {} features, expected an even number of them",
                self.head_dim
            );
            return Err(self.fields.invalid(PARTIAL, reason));
        }
        Ok(dims)
    }

    /// Positions in three parts are equal for text, so that it does not matter which pairs of features turn
    /// by which: unless they do not add up.
    fn check_sections(self, mrope: Mrope, nested: Option<&Fields<'_>>, pairs: usize) -> Result<()> {
        let stated = nested.and_then(|nested| Some((nested, nested.raw.get(SECTIONS)?)));
        let (reason, fields) = match (stated, mrope) {
            (None, Mrope::Interleaved) => return Ok(()),
            (None, Mrope::Beside(usual)) if usual.iter().sum::<usize>() == pairs => return Ok(()),
            (None, Mrope::Beside(usual)) => {
                (format!("is missing; {usual:?}, which is usual, does"), nested)
            }
            (Some((nested, value)), _) => {
                let size = |value: &Value| value.as_u64().filter(|&size| size <= pairs as u64);
                let sizes = value.as_array().and_then(|list| list.iter().map(size).collect());
                let three = sizes.filter(|sizes: &Vec<u64>| sizes.len() == 3);
                if three.is_some_and(|sizes| sizes.iter().sum::<u64>() == pairs as u64) {
                    return Ok(());
                }
                (format!("is `{value}`, which does"), Some(nested))
            }
        };
        let reason = format!("{reason} not share {pairs} pairs of features among three positions");
        Err(fields.unwrap_or(self.fields).invalid(SECTIONS, reason))
    }

    /// How frequencies are stretched.
    fn scaling(self, nested: &Fields<'_>, dims: usize) -> Result<RopeScaling> {
        let Some(value) = kind(nested.raw) else {
            // One object of settings for each kind of layer would also come here.
            return match nested.raw.values().find(|v| v.is_object()) {
                Some(inner) => Err(self.fields.unsupported("rope_parameters", inner, TYPES)),
                None => Ok(RopeScaling::None),
            };
        };
        let factor = || match nested.required("factor")? {
            factor if factor >= 1.0 => Ok(factor),
            factor => Err(nested.invalid("factor", format!("is `{factor}`, expected 1 or more"))),
        };
        match value.as_str() {
            Some("default") => Ok(RopeScaling::None),
            Some("mrope") if matches!(self.family.mrope, Some(Mrope::Beside(_))) => {
                Ok(RopeScaling::None)
            }
            Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
            Some("dynamic") => {
                Ok(RopeScaling::Dynamic { factor: factor()?, context: self.context })
            }
            Some("llama3") => self.llama3(nested, factor()?),
            Some("longrope" | "su") => self.longrope(nested, dims),
            Some("yarn") if self.family.yarn_is_longrope => self.longrope(nested, dims),
            Some("yarn") => self.yarn(nested),
            _ => Err(nested.unsupported("rope_type", value, TYPES)),
        }
    }

    /// Tokens of the first training. A key beside the settings wins in transformers.
    fn original_context(self, nested: &Fields<'_>) -> Result<usize> {
        if self.fields.get(ORIGINAL).is_some() {
            return self.fields.size(ORIGINAL, None, MAX_CONTEXT);
        }
        let default = self.family.original_context.unwrap_or(self.context);
        nested.size(ORIGINAL, Some(default), MAX_CONTEXT)
    }

    fn llama3(self, nested: &Fields<'_>, factor: f64) -> Result<RopeScaling> {
        let original_context = self.original_context(nested)?;
        let low_freq_factor = nested.required("low_freq_factor")?;
        let high_freq_factor = nested.required("high_freq_factor")?;
        if high_freq_factor <= low_freq_factor {
            let reason = format!("is `{high_freq_factor}`, expected more than low_freq_factor");
            return Err(nested.invalid("high_freq_factor", reason));
        }
        Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
    }

    /// The factor, by default how much longer the context is than the original one.
    fn factor(self, nested: &Fields<'_>, original_context: usize) -> Result<f64> {
        let default = self.context as f64 / original_context as f64;
        Ok(nested.positive("factor")?.unwrap_or(default))
    }

    fn yarn(self, nested: &Fields<'_>) -> Result<RopeScaling> {
        let original_context = self.original_context(nested)?;
        let factor = self.factor(nested, original_context)?;
        let scale = |weight: f64| match factor {
            factor if factor <= 1.0 => 1.0,
            factor => 0.1 * weight * factor.ln() + 1.0,
        };
        let own = nested.positive("attention_factor")?;
        let weights = (nested.positive("mscale")?, nested.positive("mscale_all_dim")?);
        let attention_factor = match (own, weights) {
            (Some(own), _) => own,
            (None, (Some(one), Some(all))) => scale(one) / scale(all),
            (None, _) => scale(1.0),
        };
        Ok(RopeScaling::Yarn(Yarn {
            factor,
            beta_fast: nested.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: nested.positive("beta_slow")?.unwrap_or(1.0),
            original_context,
            truncate: nested.get("truncate").is_none() || nested.flag("truncate")?,
            attention_factor,
        }))
    }

    fn longrope(self, nested: &Fields<'_>, dims: usize) -> Result<RopeScaling> {
        let original_context = self.original_context(nested)?;
        let factor = self.factor(nested, original_context)?;
        let attention_factor = match nested.positive("attention_factor")? {
            Some(own) => own,
            None if factor <= 1.0 || original_context < 2 => 1.0,
            None => (1.0 + factor.ln() / (original_context as f64).ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope(LongRope {
            short_factor: factors(nested, "short_factor", dims / 2)?,
            long_factor: factors(nested, "long_factor", dims / 2)?,
            original_context,
            attention_factor,
        }))
    }
}

/// Refuses older settings beside those of each kind of block, where versions of transformers do not take
/// them for the same. Version 5 puts them over `full`, which has a `rope_type` by default, so that it does
/// not look at `type`.
fn refuse_ambiguous(
    older: &Fields<'_>,
    full: Option<&Map<String, Value>>,
    newer: bool,
) -> Result<()> {
    if older.get("rope_type").is_none() {
        let reason = match older.get("type") {
            None => "is missing".to_owned(),
            Some(kind) => format!(
                "is missing; `type`, which is `{kind}`, says the same to some versions of transformers and \
                 nothing to others"
            ),
        };
        return Err(older.invalid("rope_type", reason));
    }
    let said = |(key, value)| full.is_some_and(|full| full.get(key) == Some(value));
    match older.raw.iter().find(|pair| newer && !said(*pair)) {
        None => Ok(()),
        Some((key, value)) => {
            let reason = format!(
                "is `{value}`, which `rope_parameters.full_attention` does not say as well"
            );
            Err(older.invalid(key, reason))
        }
    }
}

/// A list of so many positive numbers.
fn factors(nested: &Fields<'_>, key: &str, count: usize) -> Result<Vec<f64>> {
    let Some(value) = nested.get(key) else {
        return Err(nested.invalid(key, "is missing".to_owned()));
    };
    let positive = |v: &Value| v.as_f64().filter(|v| v.is_finite() && *v > 0.0);
    let numbers = value.as_array().and_then(|list| list.iter().map(positive).collect());
    numbers.filter(|numbers: &Vec<f64>| numbers.len() == count).ok_or_else(|| {
        nested.invalid(
            key,
            format!("is not a list of {count} positive numbers, one a pair of features"),
        )
    })
}

/// `rope_type`, or `type` as it was called first.
fn kind(map: &Map<String, Value>) -> Option<&Value> {
    ["rope_type", "type"].iter().find_map(|key| map.get(*key)).filter(|kind| !kind.is_null())
}
