//! Values that have a rule of their own: zeros, group indices, scales, and all that is not quantized.

use std::collections::{BTreeMap, BTreeSet};

use gptq_checkpoint::loaders::GroupIndex;
use gptq_checkpoint::{
    Checkpoint, CheckpointFormat, LEAVES, LinearShape, ModelConfig, PackedGrid, QuantizeConfig,
    StoredZeros, unpack_rows,
};
use gptq_model::Reading;
use rayon::prelude::*;

use super::findings::{Check, Findings};

/// What loaders and later checks want to know of the values.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// Columns of some linear lie in another order than their groups.
    pub(super) out_of_order: bool,
    /// Some linear stores its zeros in the other format than the settings say.
    pub(super) other_zeros: bool,
    /// Some zero is 0.
    pub(super) zeros_of_zero: bool,
    /// Some linear has no group index.
    absent_index: bool,
    /// Some linear's group index is a placeholder of zeros.
    placeholder_index: bool,
    /// Linears that are fused have one group index.
    pub(super) shared_order: bool,
    /// Quantized linears have bias tensors that their architecture does not.
    pub(super) biases: bool,
    /// Some of them are not zero.
    pub(super) bias_values: bool,
    /// Some linear has indices, scales or a bias that nothing can be computed with.
    pub(super) unreadable: bool,
}

impl Values {
    pub(super) fn group_index(&self) -> GroupIndex {
        match (self.placeholder_index, self.absent_index) {
            (true, _) => GroupIndex::Placeholder,
            (false, true) => GroupIndex::Absent,
            (false, false) => GroupIndex::Stored,
        }
    }
}

/// What one linear has to report.
#[derive(Default)]
struct LinearFaults {
    list: Vec<(Check, String, String)>,
    out_of_order: bool,
    other_zeros: bool,
    zeros_of_zero: bool,
    placeholder_index: bool,
    unreadable: bool,
}

/// Looks at every value of the checkpoint, block by block.
pub(super) fn check(
    checkpoint: &Checkpoint,
    stored: &QuantizeConfig,
    findings: &mut Findings,
) -> Values {
    let mut values = Values { shared_order: true, ..Values::default() };
    let config = checkpoint.config();
    for block in 0..config.num_hidden_layers {
        let shapes = config.block_linears(block);
        let prefix = ModelConfig::block_prefix(block);
        let name = |shape: &LinearShape| format!("{prefix}.{}", shape.name);
        for shape in shapes.iter().filter(|shape| checkpoint.has_gptq_linear(&name(shape))) {
            values.absent_index |= !checkpoint.contains(&format!("{}.g_idx", name(shape)));
        }
        // Misshapen linears are findings already.
        let read = |shape| checkpoint.packed_grid(&name(shape), shape).ok();
        let linears: Vec<Option<PackedGrid>> = shapes.par_iter().map(read).collect();
        let faults = shapes.par_iter().zip(&linears).filter_map(|(shape, linear)| {
            Some(linear_faults(&name(shape), linear.as_ref()?, stored))
        });
        for faults in faults.collect::<Vec<_>>() {
            for check in [Check::Zeros, Check::GroupIndex, Check::Scales] {
                findings.examine(check, 1);
            }
            values.out_of_order |= faults.out_of_order;
            values.other_zeros |= faults.other_zeros;
            values.zeros_of_zero |= faults.zeros_of_zero;
            values.placeholder_index |= faults.placeholder_index;
            values.unreadable |= faults.unreadable;
            faults
                .list
                .into_iter()
                .for_each(|(check, place, what)| findings.add(check, place, what));
        }
        values.shared_order &= fused_orders(&prefix, &shapes, &linears, findings);
        for shape in &shapes {
            // What the architecture itself has is no addition of AutoGPTQ's.
            if !shape.bias {
                check_bias(checkpoint, &format!("{}.bias", name(shape)), findings, &mut values);
            }
            LEAVES.iter().for_each(|leaf| checkpoint.release(&format!("{}.{leaf}", name(shape))));
        }
    }
    check_dense(checkpoint, findings, &mut values);
    values
}

fn linear_faults(name: &str, linear: &PackedGrid, stored: &QuantizeConfig) -> LinearFaults {
    let placeholder_index = linear.has_placeholder_index();
    let mut faults = LinearFaults {
        zeros_of_zero: !stored.sym && has_zero_of_zero(linear, stored.checkpoint_format),
        placeholder_index,
        unreadable: placeholder_index && stored.order_is_stored(linear.in_features),
        ..LinearFaults::default()
    };
    zeros(name, linear, stored, &mut faults);
    group_index(name, linear, stored, &mut faults);
    scales(name, linear, &mut faults);
    faults
}

/// Whether some zero is 0, which a symmetric grid has not.
fn has_zero_of_zero(linear: &PackedGrid, format: CheckpointFormat) -> bool {
    let found = unpack_rows(linear.bits, &linear.qzeros, linear.groups, linear.out_features);
    let zero_of_zero = match format {
        CheckpointFormat::Gptq => linear.bits.max_code(),
        CheckpointFormat::GptqV2 => 0,
    };
    found.is_ok_and(|zeros| zeros.contains(&zero_of_zero))
}

/// A symmetric grid has one zero, stored as the settings say: the same words in every row.
fn zeros(name: &str, linear: &PackedGrid, stored: &QuantizeConfig, faults: &mut LinearFaults) {
    let (bits, format) = (linear.bits, stored.checkpoint_format);
    let kept = format.stored_middle(bits);
    let place = format!("{name}.qzeros");
    match stored.stored_zeros(&linear.qzeros, linear.out_features) {
        Ok(StoredZeros::OffMiddle) => {}
        Ok(StoredZeros::OtherFormat) => {
            let (how, other) = match format {
                CheckpointFormat::Gptq => ("without the minus one", format.other()),
                CheckpointFormat::GptqV2 => ("minus one", format.other()),
            };
            let (other, middle) = (other.stored_middle(bits), bits.symmetric_zero());
            let message =
                format!("stores its zeros {how} ({other} instead of {kept} for {middle})");
            faults.other_zeros = true;
            faults.list.push((Check::Zeros, place, message));
            return;
        }
        Ok(StoredZeros::AsDeclared) | Err(_) => return,
    }
    let found = unpack_rows(linear.bits, &linear.qzeros, linear.groups, linear.out_features);
    let found = found.unwrap_or_default();
    let wrong = found.iter().filter(|&&zero| zero != kept).count();
    let first = found.iter().position(|&zero| zero != kept).unwrap_or_default();
    let (group, output) = (first / linear.out_features, first % linear.out_features);
    let message = format!(
        "holds {} at group {group}, output {output}, where a symmetric grid stores {kept} ({wrong} such)",
        found.get(first).copied().unwrap_or_default()
    );
    faults.list.push((Check::Zeros, place, message));
}

/// Every group exists, has exactly its columns (the last one may have fewer), and lies in order
/// unless act-order is declared.
fn group_index(
    name: &str,
    linear: &PackedGrid,
    stored: &QuantizeConfig,
    faults: &mut LinearFaults,
) {
    let place = format!("{name}.g_idx");
    let mut fault = |message| faults.list.push((Check::GroupIndex, place.clone(), message));
    let (columns, groups) = (linear.in_features, linear.groups);
    let size = stored.group_size.unwrap_or(columns);
    let in_order = linear.g_idx.iter().enumerate().all(|(j, &g)| g as usize == j / size);
    faults.out_of_order = !in_order;
    if in_order {
        return;
    }
    let outside = |&g: &u32| g as usize >= groups;
    if let Some(column) = linear.g_idx.iter().position(outside) {
        faults.unreadable = true;
        let count = linear.g_idx.iter().filter(|g| outside(g)).count();
        let group = linear.g_idx[column] as i32;
        fault(format!("puts column {column} into group {group} of {groups} ({count} such)"));
        return;
    }
    let mut members = vec![0; groups];
    linear.g_idx.iter().for_each(|&g| members[g as usize] += 1);
    let wanted = |group: usize| size.min(columns - (group * size).min(columns));
    if let Some(group) = (0..groups).find(|&group| members[group] != wanted(group)) {
        fault(format!(
            "gives group {group} {} columns, expected {}",
            members[group],
            wanted(group)
        ));
    }
    if !stored.desc_act {
        let column = linear.g_idx.iter().enumerate().position(|(j, &g)| g as usize != j / size);
        fault(format!(
            "is out of order from column {} on, but the configuration says desc_act false",
            column.unwrap_or_default()
        ));
    }
}

/// Of scales with a choice of sign, about half are negative: fewer than this share of a linear's are
/// faults in a file of positive ones.
const SIGNED: f64 = 1.0 / 16.0;

fn scales(name: &str, linear: &PackedGrid, faults: &mut LinearFaults) {
    let negative = linear.scales.iter().filter(|scale| scale.to_f32() < 0.0).count();
    let signed = negative as f64 >= SIGNED * linear.scales.len() as f64;
    let sound = |scale: &half::f16| {
        let value = scale.to_f32();
        value.is_finite() && value != 0.0 && (signed || value > 0.0)
    };
    let wrong = linear.scales.iter().filter(|scale| !sound(scale)).count();
    let Some(first) = linear.scales.iter().position(|scale| !sound(scale)) else { return };
    faults.unreadable |= linear.scales.iter().any(|scale| !scale.is_finite());
    let (group, output) = (first / linear.out_features, first % linear.out_features);
    let what = if signed { "not 0" } else { "positive" };
    let message = format!(
        "holds {} at group {group}, output {output}; scales are finite and {what} ({wrong} such)",
        linear.scales[first]
    );
    faults.list.push((Check::Scales, format!("{name}.scales"), message));
}

/// q, k and v, and gate and up, are fused by some loaders, which keep one group index; those of an expert
/// are such a pair of their own.
fn fused_orders(
    prefix: &str,
    shapes: &[LinearShape],
    linears: &[Option<PackedGrid>],
    findings: &mut Findings,
) -> bool {
    let mut shared = true;
    let mut readers: BTreeMap<Reading, Vec<(&LinearShape, &Option<PackedGrid>)>> = BTreeMap::new();
    for (shape, linear) in shapes.iter().zip(linears) {
        readers.entry(Reading::of(shape.id)).or_default().push((shape, linear));
    }
    for fused in readers.into_values() {
        let mut fused = fused.into_iter();
        let Some((of_first, Some(first))) = fused.next() else { continue };
        for (shape, other) in fused {
            let Some(other) = other else { continue };
            findings.examine(Check::FusedOrder, 1);
            let differ = first.g_idx.iter().zip(&other.g_idx).position(|(a, b)| a != b);
            if let Some(column) = differ {
                shared = false;
                let place = format!("{prefix}.{}.g_idx", shape.name);
                let message = format!(
                    "differs from that of {} at column {column}: loaders that fuse them keep one",
                    of_first.name
                );
                findings.add(Check::FusedOrder, place, message);
            }
        }
    }
    shared
}

/// AutoGPTQ writes a bias of zeros for every linear.
fn check_bias(checkpoint: &Checkpoint, name: &str, findings: &mut Findings, values: &mut Values) {
    let Ok(bias) = checkpoint.tensor(name) else { return };
    findings.examine(Check::Dense, 1);
    values.biases = true;
    let wrong = bias.to_f32().iter().filter(|&&v| v != 0.0).count();
    if wrong > 0 {
        (values.bias_values, values.unreadable) = (true, true);
        findings.add(Check::Dense, name, format!("holds {wrong} values that are not zero"));
    }
}

/// All that is not part of a quantized linear, and the biases that the architecture itself has.
fn check_dense(checkpoint: &Checkpoint, findings: &mut Findings, values: &mut Values) {
    let linears = checkpoint.config().linears();
    let added = linears.filter(|(_, shape)| !shape.bias).map(|(name, _)| format!("{name}.bias"));
    let added: BTreeSet<String> = added.collect();
    let of_linear = |name: &&str| {
        let leaf = name.rsplit('.').next().unwrap_or_default();
        let plain = checkpoint.config().plain_name(name);
        plain.is_some_and(|plain| LEAVES.contains(&leaf) || added.contains(&*plain))
    };
    // What is carried of other parts, such as masks, may hold anything.
    let looked_at = |name: &&str| !of_linear(name) && !checkpoint.config().is_carried(name);
    for name in checkpoint.names().filter(looked_at) {
        let Ok(tensor) = checkpoint.tensor(name) else { continue };
        findings.examine(Check::Dense, 1);
        if let Err(error) = tensor.check_finite() {
            // No linear is read without its bias.
            values.unreadable |= name.ends_with(".bias");
            findings.add_error(Check::Dense, name, error);
        }
        checkpoint.release(name);
    }
}
