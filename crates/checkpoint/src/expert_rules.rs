//! What distinguishes the mixtures of experts of one family from those of another, and how that is read from
//! config.json.

use serde_json::Value;

use crate::Result;
use crate::experts::{ExpertNames, Experts, Router, Scores, SharedExpert};
use crate::family::Part;
use crate::fields::Fields;

/// More than any model has, and few enough for a number of 16 bits.
const MAX_EXPERTS: u64 = 1 << 12;
/// The most experts of all blocks together, for their linears are listed.
const MAX_IN_ALL: usize = 1 << 17;
const MAX_WIDTH: u64 = 1 << 20;
const MAX_BLOCKS: u64 = 1 << 12;

/// Keys that mean the same, the usual one first, and the value where there is none of them.
pub(crate) type Size = (&'static [&'static str], usize);

/// A family's mixtures.
#[derive(Debug, PartialEq)]
pub(crate) struct ExpertRules {
    /// What their parts are called.
    pub(crate) names: ExpertNames,
    /// How many there are.
    pub(crate) count: Size,
    /// How many a token goes through.
    pub(crate) per_token: usize,
    /// Their width; `None`: that of the MLP in blocks without them.
    pub(crate) width: Option<Size>,
    /// What the products of the router become.
    pub(crate) scores: Scores,
    /// Weights are divided by their sum.
    pub(crate) normalize: Part,
    /// Experts lie in groups, weights are scaled, and choices are corrected by a bias.
    pub(crate) grouped: bool,
    /// The expert that every token goes through.
    pub(crate) shared: SharedRule,
    /// The blocks that have them.
    pub(crate) blocks: BlocksRule,
}

/// The expert that every token goes through.
#[derive(Debug, PartialEq)]
pub(crate) enum SharedRule {
    None,
    /// Of this width, with a gate of its own.
    Gated(Size),
    /// As wide as so many experts.
    Times(Size),
}

/// The blocks that have experts.
#[derive(Debug, PartialEq)]
pub(crate) enum BlocksRule {
    All,
    /// All but the first so many.
    After(Size),
    /// Every so many-th by `decoder_sparse_step`, but those that `mlp_only_layers` lists.
    Unlisted,
}

impl ExpertRules {
    /// Whether a key is one of these rules'.
    pub(crate) fn reads(&self, key: &str) -> bool {
        self.count.0.contains(&key)
    }

    /// The mixture that a config describes; `dense_width` is that of an MLP.
    pub(crate) fn read(
        &'static self,
        fields: &Fields<'_>,
        dense_width: usize,
        blocks: usize,
    ) -> Result<Experts> {
        let (count_key, count) = size(fields, self.count, MAX_EXPERTS)?;
        if count * blocks > MAX_IN_ALL {
            let reason = format!("is {count}, which are too many for each of {blocks} blocks");
            return Err(fields.invalid(count_key, reason));
        }
        let router = self.router(fields, (count_key, count))?;
        const PER_TOKEN: &str = "num_experts_per_tok";
        let per_token = fields.size(PER_TOKEN, Some(self.per_token), MAX_EXPERTS)?;
        let among = count / router.groups * router.groups_per_token;
        if per_token > among {
            let reason = format!("is {per_token}, but a token chooses from {among} experts");
            return Err(fields.invalid(PER_TOKEN, reason));
        }
        let width = match self.width {
            Some(width) => size(fields, width, MAX_WIDTH)?.1,
            None => dense_width,
        };
        Ok(Experts {
            count,
            per_token,
            intermediate_size: width,
            shared: self.shared.read(fields, width)?,
            router,
            names: &self.names,
            blocks: self.blocks.read(fields, blocks)?,
        })
    }

    fn router(&self, fields: &Fields<'_>, (count_key, count): (&str, usize)) -> Result<Router> {
        let mut router = Router {
            scores: self.scores,
            normalize: self.normalize.read(fields)?,
            scale: 1.0,
            groups: 1,
            groups_per_token: 1,
            corrected: self.grouped,
        };
        if !self.grouped {
            return Ok(router);
        }
        router.groups = fields.size("n_group", Some(1), MAX_EXPERTS)?;
        router.groups_per_token = fields.size("topk_group", Some(1), MAX_EXPERTS)?;
        // A group is worth its two best experts.
        if !count.is_multiple_of(router.groups) || count / router.groups < 2 {
            let groups = router.groups;
            let reason = format!("is {count}, which are no {groups} groups of 2 or more");
            return Err(fields.invalid(count_key, reason));
        }
        if router.groups_per_token > router.groups {
            let reason = format!("is {}, of {} groups", router.groups_per_token, router.groups);
            return Err(fields.invalid("topk_group", reason));
        }
        const SCALE: &str = "routed_scaling_factor";
        router.scale = fields.positive(SCALE)?.unwrap_or(1.0) as f32;
        if !router.scale.is_normal() {
            return Err(fields.invalid(SCALE, "is out of range".to_owned()));
        }
        Ok(router)
    }
}

impl SharedRule {
    fn read(&self, fields: &Fields<'_>, width: usize) -> Result<Option<SharedExpert>> {
        match *self {
            Self::None => Ok(None),
            Self::Gated(own) => {
                let (_, intermediate_size) = size(fields, own, MAX_WIDTH)?;
                Ok(Some(SharedExpert { intermediate_size, gated: true }))
            }
            Self::Times(times) => {
                let (key, times) = size(fields, times, MAX_EXPERTS)?;
                let intermediate_size = width * times;
                if intermediate_size as u64 > MAX_WIDTH {
                    let reason = format!("is {times}, with experts of {width} features");
                    return Err(fields.invalid(key, reason));
                }
                Ok(Some(SharedExpert { intermediate_size, gated: false }))
            }
        }
    }
}

impl BlocksRule {
    /// Whether each block has experts.
    fn read(&self, fields: &Fields<'_>, blocks: usize) -> Result<Vec<bool>> {
        match *self {
            Self::All => Ok(vec![true; blocks]),
            Self::After((keys, default)) => {
                let first = count(fields, keys, default)?;
                Ok((0..blocks).map(|block| block >= first).collect())
            }
            Self::Unlisted => {
                const LIST: &str = "mlp_only_layers";
                let step = fields.size("decoder_sparse_step", Some(1), MAX_BLOCKS)?;
                let mut have: Vec<bool> =
                    (0..blocks).map(|block| (block + 1).is_multiple_of(step)).collect();
                let Some(value) = fields.get(LIST) else { return Ok(have) };
                let listed: Option<Vec<u64>> =
                    value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
                let listed = listed.ok_or_else(|| {
                    fields.invalid(LIST, format!("is `{value}`, expected a list of blocks"))
                })?;
                for block in listed {
                    let place = usize::try_from(block).ok().and_then(|block| have.get_mut(block));
                    place.into_iter().for_each(|has| *has = false);
                }
                Ok(have)
            }
        }
    }
}

/// The first of the keys that is there, and its value.
fn size(fields: &Fields<'_>, (keys, default): Size, max: u64) -> Result<(&'static str, usize)> {
    let key = key(fields, keys);
    Ok((key, fields.size(key, Some(default), max)?))
}

/// As [`size`], where 0 is a value, too.
fn count(fields: &Fields<'_>, keys: &'static [&'static str], default: usize) -> Result<usize> {
    let key = key(fields, keys);
    match fields.get(key) {
        Some(value) if value.as_u64() == Some(0) => Ok(0),
        _ => fields.size(key, Some(default), MAX_BLOCKS),
    }
}

fn key(fields: &Fields<'_>, keys: &'static [&'static str]) -> &'static str {
    let there = keys.iter().find(|key| fields.get(key).is_some());
    there.or(keys.first()).copied().unwrap_or_default()
}
