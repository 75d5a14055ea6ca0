//! What distinguishes a block's attention from that of other blocks: how far it reaches, and how it is
//! rotated.

use serde_json::Value;

use crate::Result;
use crate::family::{Family, Rotates, Window};
use crate::fields::Fields;

/// Larger than any window.
const MAX_WINDOW: u64 = 1 << 40;
const LAYER_TYPES: &str = "layer_types";
const KINDS: &str = "a list of `full_attention` and `sliding_attention`, one a block";

/// Attention of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockAttention {
    /// Tokens that a token attends to at most, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// How queries and keys are rotated; `None`: they are not.
    pub rope: Option<RopeKind>,
}

/// Which of a model's rotary settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeKind {
    /// Those of blocks that attend to everything, and of all where there are no others.
    Global,
    /// Those of blocks whose attention slides.
    Local,
}

/// The attention of every block.
pub(crate) fn read(
    fields: &Fields<'_>,
    family: &Family,
    blocks: usize,
) -> Result<Vec<BlockAttention>> {
    let rotated = rotated(fields, family, blocks)?;
    let listed = layer_types(fields, blocks)?;
    let slides = slides(fields, family, &rotated, listed.clone())?;
    let window = window(fields, family)?;
    // transformers fails then, takes a window that is switched off, or keeps no more than one in its cache.
    let has_window = |block: usize| slides[block] && window.is_some();
    let mut listed = listed.iter().flatten().enumerate();
    if let Some(block) = listed.position(|(block, &slides)| slides && !has_window(block)) {
        let reason = format!(
            "says that block {block} slides, but in this `{}` model it has no window",
            family.name
        );
        return Err(fields.invalid(LAYER_TYPES, reason));
    }
    let block = |(rotates, slides): (bool, bool)| {
        let rotates = match family.rotates {
            Rotates::Sliding => slides,
            Rotates::All | Rotates::Listed => rotates,
        };
        let local = slides && family.local_rope.is_some();
        BlockAttention {
            window: window.filter(|_| slides),
            rope: rotates.then_some(if local { RopeKind::Local } else { RopeKind::Global }),
        }
    };
    Ok(rotated.into_iter().zip(slides).map(block).collect())
}

/// The window of the blocks that slide.
fn window(fields: &Fields<'_>, family: &Family) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    if family.window == Window::None {
        return Ok(None);
    }
    if family.window.is_optional() && !fields.flag("use_sliding_window")? {
        return Ok(None);
    }
    match fields.raw.get(KEY) {
        None => Ok(family.window.default()),
        Some(Value::Null) => Ok(None),
        Some(_) => fields.size(KEY, None, MAX_WINDOW).map(Some),
    }
}

/// Which blocks slide, if the model has a window.
fn slides(
    fields: &Fields<'_>,
    family: &Family,
    rotated: &[bool],
    listed: Option<Vec<bool>>,
) -> Result<Vec<bool>> {
    let blocks = rotated.len();
    let default = match family.window {
        // The list says nothing else: these families have one kind of attention.
        Window::None => return Ok(vec![false; blocks]),
        Window::All { .. } | Window::AllIf { .. } => return Ok(vec![true; blocks]),
        Window::AllUnlisted { .. } => vec![true; blocks],
        Window::From { first, .. } => {
            let first = max_window_layers(fields, first);
            (0..blocks).map(|block| block >= first).collect()
        }
        Window::OddBefore { .. } => {
            let end = max_window_layers(fields, 28);
            (0..blocks).map(|block| block.is_multiple_of(2) && block < end).collect()
        }
        Window::Pattern { every, .. } => {
            let every = fields.size("sliding_window_pattern", Some(every), MAX_WINDOW)?;
            (0..blocks).map(|block| !(block + 1).is_multiple_of(every)).collect()
        }
        Window::Unrotated => rotated.iter().map(|rotates| !rotates).collect(),
    };
    Ok(listed.unwrap_or(default))
}

/// Qwen's number of blocks on one side of which attention slides.
fn max_window_layers(fields: &Fields<'_>, default: usize) -> usize {
    let blocks = fields.raw.get("max_window_layers").and_then(Value::as_u64);
    blocks.map_or(default, |blocks| blocks as usize)
}

/// Which blocks rotate queries and keys, by the config's list or by the family's default.
fn rotated(fields: &Fields<'_>, family: &Family, blocks: usize) -> Result<Vec<bool>> {
    const KEY: &str = "no_rope_layers";
    if family.rotates != Rotates::Listed {
        return Ok(vec![true; blocks]);
    }
    let Some(value) = fields.get(KEY) else {
        let every = fields.size("no_rope_layer_interval", Some(4), MAX_WINDOW)?;
        return Ok((0..blocks).map(|block| !(block + 1).is_multiple_of(every)).collect());
    };
    // Despite its name the list has a 1 for every block that rotates.
    let flags: Option<Vec<bool>> = value.as_array().and_then(|list| {
        list.iter().map(|flag| flag.as_u64().filter(|&f| f < 2).map(|f| f == 1)).collect()
    });
    flags.filter(|flags| flags.len() == blocks).ok_or_else(|| {
        fields.invalid(KEY, format!("is `{value}`, expected 0 or 1 for each of {blocks} blocks"))
    })
}

/// Whether each block slides, where the config lists kinds of attention. A list that is too short, as
/// older files have one, leaves the other blocks full.
fn layer_types(fields: &Fields<'_>, blocks: usize) -> Result<Option<Vec<bool>>> {
    let Some(value) = fields.get(LAYER_TYPES) else { return Ok(None) };
    let Some(kinds) = value.as_array() else {
        return Err(fields.unsupported(LAYER_TYPES, value, KINDS));
    };
    let known = |kind: &Value| kind == "full_attention" || kind == "sliding_attention";
    if let Some(kind) = kinds.iter().find(|kind| !known(kind)) {
        return Err(fields.unsupported(LAYER_TYPES, kind, KINDS));
    }
    let slides = |block| kinds.get(block).is_some_and(|kind: &Value| kind == "sliding_attention");
    Ok(Some((0..blocks).map(slides).collect()))
}
