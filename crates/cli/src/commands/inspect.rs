//! `gptq inspect`: what a folder holds, checked against what its configuration says.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use gptq_checkpoint::{Checkpoint, RopeScaling, Strays, TensorSpec};
use gptq_records::digest::of_tensors;
use serde::Serialize;

use super::source::{open_checkpoint, warn_of};
use super::table::{gigabytes, plural, size, table};
use super::{print_json, print_result};
use crate::printer::Printer;

/// Show what a checkpoint holds
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq inspect ./SmolLM2-135M-4bit-128g
  gptq inspect ./SmolLM2-135M --checksum")]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    checkpoint: String,
    /// Read every value, and print how fast and their SHA-256: equal for equal tensors, whatever
    /// files hold them
    #[arg(long)]
    checksum: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Tensors that are left out that are listed; `--json` has all.
const SHOWN: usize = 10;

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    dir: String,
    model_type: &'static str,
    /// `model_type` of the whole, of which the language model is a part; `null` where it is all.
    part_of: Option<&'static str>,
    rope: &'static str,
    blocks: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    tied_embeddings: bool,
    head: &'static str,
    file_bytes: u64,
    tensors: usize,
    dtypes: BTreeMap<String, usize>,
    /// Tensors of parts beside the language model.
    other_parts: usize,
    other_parts_bytes: u64,
    /// Tensors that no part of the model uses.
    left_out: Vec<String>,
    /// Values of norms, biases and routers that are no numbers, by tensor.
    not_finite: BTreeMap<String, usize>,
    quantization: Option<Quantization>,
    checksum: Option<Checksum>,
}

/// What reading every value gave.
#[derive(Serialize)]
struct Checksum {
    sha256: String,
    bytes: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct Quantization {
    bits: u8,
    group_size: Option<usize>,
    act_order: bool,
    damp: f64,
    linears: usize,
    dense_linears: usize,
    linear_bytes: u64,
    bits_per_weight: f64,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let checkpoint = open_checkpoint(&args.checkpoint, printer)?;
    warn_of(&checkpoint, false, printer)?;
    let mut output = describe(&checkpoint)?;
    if args.checksum {
        output.checksum = Some(checksum(&checkpoint)?);
    }
    if args.json { print_json(&output) } else { print_result(&text(&output)) }
}

fn describe(checkpoint: &Checkpoint) -> Result<Output> {
    checkpoint.check_tensors()?;
    let config = checkpoint.config();
    let Strays { beyond, prediction, dense, others } = checkpoint.strays();
    let carried = config.carried().unwrap_or_default();
    let mut dtypes = BTreeMap::new();
    let mut tensors = 0;
    for name in checkpoint.names() {
        if let Some(dtype) = checkpoint.stored_type(name) {
            *dtypes.entry(dtype.to_string()).or_insert(0) += 1;
        }
        tensors += 1;
    }
    Ok(Output {
        dir: checkpoint.dir().display().to_string(),
        model_type: config.family,
        part_of: config.wrapper(),
        rope: match &config.rope.scaling {
            RopeScaling::None => "default",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Dynamic { .. } => "dynamic",
            RopeScaling::Llama3 { .. } => "llama3",
            RopeScaling::Yarn(_) => "yarn",
            RopeScaling::LongRope(_) => "longrope",
        },
        blocks: config.num_hidden_layers,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        vocab_size: config.vocab_size,
        tied_embeddings: config.tie_word_embeddings,
        head: checkpoint.head()?.describe(),
        file_bytes: checkpoint.total_bytes(),
        tensors,
        dtypes,
        other_parts: carried.len(),
        other_parts_bytes: carried.iter().map(TensorSpec::bytes).sum(),
        left_out: [beyond, prediction, dense, others].concat(),
        not_finite: not_finite(checkpoint)?,
        quantization: quantization(checkpoint)?,
        checksum: None,
    })
}

/// Values that are infinite or no numbers in what is small enough to be read at once: norms, biases, and what
/// routes tokens to experts.
fn not_finite(checkpoint: &Checkpoint) -> Result<BTreeMap<String, usize>> {
    let config = checkpoint.config();
    let mut found = BTreeMap::new();
    for (name, shape) in config.dense_tensors() {
        if shape.len() > 1 && config.dense_named(&name).is_none() {
            continue;
        }
        let tensor = checkpoint.tensor(&name)?;
        let count = tensor.to_f32().iter().filter(|value| !value.is_finite()).count();
        if count > 0 {
            found.insert(tensor.name.to_owned(), count);
        }
    }
    Ok(found)
}

/// Reads every value.
fn checksum(checkpoint: &Checkpoint) -> Result<Checksum> {
    let start = Instant::now();
    let (bytes, sha256) = of_tensors(checkpoint)?;
    Ok(Checksum { sha256, bytes, seconds: start.elapsed().as_secs_f64() })
}

/// Checks every quantized linear, so that a wrong shape or group index is found here.
fn quantization(checkpoint: &Checkpoint) -> Result<Option<Quantization>> {
    let Some(quantized) = checkpoint.quantize_config() else { return Ok(None) };
    let config = checkpoint.config();
    let (mut linears, mut dense_linears, mut weights, mut bytes) = (0, 0, 0_u64, 0_u64);
    for (name, shape) in config.linears() {
        if !checkpoint.has_gptq_linear(&name) {
            dense_linears += 1;
            continue;
        }
        bytes += checkpoint.check_gptq_linear(&name, &shape)?;
        weights += (shape.in_features * shape.out_features) as u64;
        linears += 1;
    }
    Ok(Some(Quantization {
        bits: quantized.bits.get(),
        group_size: quantized.group_size,
        act_order: quantized.desc_act,
        damp: quantized.damp_percent,
        linears,
        dense_linears,
        linear_bytes: bytes,
        bits_per_weight: 8.0 * bytes as f64 / weights.max(1) as f64,
    }))
}

fn text(output: &Output) -> String {
    let line = |name: &str, value: String| vec![name.to_owned(), value];
    let dtypes: Vec<String> = output.dtypes.iter().map(|(name, n)| format!("{n} {name}")).collect();
    let model = match output.part_of {
        None => output.model_type.to_owned(),
        Some(whole) => format!("{} in {whole}", output.model_type),
    };
    let model = format!("{model}, rotary scaling {}", output.rope);
    let mut rows = vec![
        line("folder", output.dir.clone()),
        line("model", model),
        line("blocks", output.blocks.to_string()),
        line("width", format!("{} hidden, {} MLP", output.hidden_size, output.intermediate_size)),
        line("heads", format!("{} query, {} key/value", output.heads, output.kv_heads)),
        line("vocabulary", output.vocab_size.to_string()),
        line("head", output.head.to_owned()),
        line("weights", format!("{} ({} bytes)", size(output.file_bytes), output.file_bytes)),
        line("tensors", format!("{} ({})", output.tensors, dtypes.join(", "))),
    ];
    if output.part_of.is_some() {
        let (count, bytes) = (output.other_parts, size(output.other_parts_bytes));
        rows.push(line("other parts", format!("{} ({bytes})", plural(count, "tensor"))));
    }
    for (index, name) in output.left_out.iter().take(SHOWN).enumerate() {
        rows.push(line(if index == 0 { "left out" } else { "" }, name.clone()));
    }
    if let Some(more) = output.left_out.len().checked_sub(SHOWN).filter(|&more| more > 0) {
        rows.push(line("", format!("and {more} more, see --json")));
    }
    for (index, (name, count)) in output.not_finite.iter().take(SHOWN).enumerate() {
        let first = if index == 0 { "not finite" } else { "" };
        rows.push(line(first, format!("{} of {name}", plural(*count, "value"))));
    }
    if let Some(more) = output.not_finite.len().checked_sub(SHOWN).filter(|&more| more > 0) {
        rows.push(line("", format!("and in {} more, see --json", plural(more, "tensor"))));
    }
    match &output.quantization {
        None => rows.push(line("quantized", "no".to_owned())),
        Some(q) => {
            let group = super::table::group(q.group_size);
            let act = super::table::yes_no(q.act_order);
            rows.push(line(
                "quantized",
                format!("{} bits, group size {group}, act-order {act}, damp {}", q.bits, q.damp),
            ));
            rows.push(line(
                "linears",
                format!(
                    "{} in {}, {:.3} bits a weight{}",
                    q.linears,
                    if q.linear_bytes > 1_000_000_000 {
                        gigabytes(q.linear_bytes)
                    } else {
                        size(q.linear_bytes)
                    },
                    q.bits_per_weight,
                    match q.dense_linears {
                        0 => String::new(),
                        count => format!("; {count} more are dense"),
                    }
                ),
            ));
        }
    }
    if let Some(c) = &output.checksum {
        let (read, speed) = (size(c.bytes), size((c.bytes as f64 / c.seconds) as u64));
        rows.push(line("read", format!("{read} in {:.1} s, {speed} a second", c.seconds)));
        rows.push(line("SHA-256", c.sha256.clone()));
    }
    table(&["", ""], 2, &rows).trim_start_matches('\n').to_owned()
}
