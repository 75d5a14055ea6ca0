//! `gptq inspect`: what a folder holds, checked against what its configuration says.

use std::collections::BTreeMap;

use anyhow::Result;
use gptq_checkpoint::Checkpoint;
use serde::Serialize;

use super::table::{gigabytes, size, table};
use super::{open_checkpoint, print_json, print_result};
use crate::args::InspectArgs;

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    dir: String,
    blocks: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    tied_embeddings: bool,
    file_bytes: u64,
    tensors: usize,
    dtypes: BTreeMap<&'static str, usize>,
    quantization: Option<Quantization>,
}

#[derive(Serialize)]
struct Quantization {
    bits: u8,
    group_size: Option<usize>,
    act_order: bool,
    damp: f64,
    linears: usize,
    linear_bytes: u64,
    bits_per_weight: f64,
}

pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let output = describe(&open_checkpoint(&args.checkpoint)?)?;
    if args.json { print_json(&output) } else { print_result(&text(&output)) }
}

fn describe(checkpoint: &Checkpoint) -> Result<Output> {
    let config = checkpoint.config();
    let mut dtypes = BTreeMap::new();
    let mut tensors = 0;
    for name in checkpoint.names() {
        *dtypes.entry(checkpoint.tensor(name)?.dtype.name()).or_insert(0) += 1;
        tensors += 1;
    }
    Ok(Output {
        dir: checkpoint.dir().display().to_string(),
        blocks: config.num_hidden_layers,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        vocab_size: config.vocab_size,
        tied_embeddings: config.tie_word_embeddings,
        file_bytes: checkpoint.total_bytes(),
        tensors,
        dtypes,
        quantization: quantization(checkpoint)?,
    })
}

/// Reads every quantised linear, so that a wrong shape or group index is found here.
fn quantization(checkpoint: &Checkpoint) -> Result<Option<Quantization>> {
    let Some(quantized) = checkpoint.quantize_config() else { return Ok(None) };
    let config = checkpoint.config();
    let (mut linears, mut weights, mut bytes) = (0, 0_u64, 0_u64);
    for (name, shape) in config.linears() {
        let linear = checkpoint.gptq_linear(&name, &shape)?;
        let words = linear.qweight.len() + linear.qzeros.len() + linear.g_idx.len();
        bytes += 4 * words as u64 + 2 * linear.scales.len() as u64;
        weights += (shape.in_features * shape.out_features) as u64;
        linears += 1;
    }
    Ok(Some(Quantization {
        bits: quantized.bits.get(),
        group_size: quantized.group_size,
        act_order: quantized.desc_act,
        damp: quantized.damp_percent,
        linears,
        linear_bytes: bytes,
        bits_per_weight: 8.0 * bytes as f64 / weights as f64,
    }))
}

fn text(output: &Output) -> String {
    let line = |name: &str, value: String| vec![name.to_owned(), value];
    let dtypes: Vec<String> = output.dtypes.iter().map(|(name, n)| format!("{n} {name}")).collect();
    let mut rows = vec![
        line("folder", output.dir.clone()),
        line("blocks", output.blocks.to_string()),
        line("width", format!("{} hidden, {} MLP", output.hidden_size, output.intermediate_size)),
        line("heads", format!("{} query, {} key/value", output.heads, output.kv_heads)),
        line("vocabulary", output.vocab_size.to_string()),
        line("weights", format!("{} ({} bytes)", size(output.file_bytes), output.file_bytes)),
        line("tensors", format!("{} ({})", output.tensors, dtypes.join(", "))),
    ];
    match &output.quantization {
        None => rows.push(line("quantised", "no".to_owned())),
        Some(q) => {
            let group = super::table::group(q.group_size);
            let act = super::table::yes_no(q.act_order);
            rows.push(line(
                "quantised",
                format!("{} bits, group size {group}, act-order {act}, damp {}", q.bits, q.damp),
            ));
            rows.push(line(
                "linears",
                format!(
                    "{} in {}, {:.3} bits a weight",
                    q.linears,
                    if q.linear_bytes > 1_000_000_000 {
                        gigabytes(q.linear_bytes)
                    } else {
                        size(q.linear_bytes)
                    },
                    q.bits_per_weight
                ),
            ));
        }
    }
    table(&["", ""], 2, &rows).trim_start_matches('\n').to_owned()
}
