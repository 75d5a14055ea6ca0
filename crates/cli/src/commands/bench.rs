//! `gptq bench`: what this machine reaches on a block's operations.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use gptq_compute::Device;
use gptq_pipeline::bench::{BlockBench, Measurement, Width, bench_block, bench_products};
use gptq_pipeline::bench_decode::{DecodeBench, Form, bench_decode};
use gptq_pipeline::bench_disk::{Transfer, bench_disk};
use gptq_pipeline::host_memory;
use gptq_pipeline::progress::Progress;
use gptq_pipeline::rates::keep;
use gptq_quant::{QuantSpec, Recipe};
use serde::Serialize;

use super::table::{gigabytes, plural, table};
use super::{print_json, print_result};
use crate::args::DeviceArgs;
use crate::args::values::{parse_calibrated, parse_count};
use crate::printer::Printer;

/// Measure this machine on a synthetic block
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq bench
  gptq bench --width 70b --windows 128 --seq-len 4096 --device cuda --recipe autogptq
  gptq bench --width 7b --blocks=/data
  gptq bench --width 7b --decode")]
pub(crate) struct Args {
    /// Shapes of the block: tiny, smollm2, 7b, 13b or 70b; with experts tiny-moe,
    /// mixtral-8x7b or qwen3-30b-a3b
    #[arg(long, default_value = "smollm2")]
    width: Width,
    /// Calibration windows
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_count)]
    windows: usize,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = parse_count)]
    seq_len: usize,
    /// Solver choices: best, tuned or autogptq; 4 bits, group size 128, act-order
    #[arg(long, value_name = "RECIPE", default_value = "best", value_parser = parse_calibrated)]
    recipe: Recipe,
    /// Change one choice of the recipe, as for gptq quantize; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Also read such a block from a disk, write it quantized and sum what was written: in this
    /// folder, or the current one without a name; the files are gone afterwards
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = ".")]
    blocks: Option<PathBuf>,
    /// Measure instead how fast text is made: a few tokens' products with weights of every width, and
    /// steps of a whole model
    #[arg(long, conflicts_with_all = ["windows", "seq_len", "recipe", "set", "blocks"])]
    decode: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    device: String,
    choices: String,
    block: BlockBench,
    /// Matrix products alone; on the CPU only.
    products: Vec<Measurement>,
    /// Of the disk, with --blocks.
    disk: Vec<Transfer>,
    peak_host_bytes: Option<u64>,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    if let Some(dir) = &args.blocks {
        ensure!(dir.is_dir(), "`{}` is no folder", dir.display());
    }
    if args.decode {
        return decode(args, printer);
    }
    let local_ranks = args.device.open(printer)?;
    let products = match local_ranks.device() {
        Device::Cpu => bench_products(args.width, args.seq_len)?,
        Device::Cuda(_) => Vec::new(),
    };
    let mut spec = QuantSpec::new(4, Some(128), true, args.recipe.damp(), args.recipe);
    spec.set(&args.set)?;
    let (device, opened) = (local_ranks.name(), local_ranks.device().clone());
    let work = (args.windows, args.seq_len);
    let block = local_ranks
        .run(|device, ranks| Ok(bench_block(device, ranks, args.width, work, &spec)?))?;
    let Some(block) = block else { return Ok(()) };
    // Predictions would be better for it, and nothing else depends on it.
    match keep(&opened, &spec, &block) {
        Ok(Some(path)) => printer.note(&format!("rates for predictions: {}", path.display())),
        Ok(None) => {}
        Err(error) => printer.warn(&format!("{:#}", anyhow::Error::new(error))),
    }
    let disk = match &args.blocks {
        Some(dir) => bench_disk(&opened, args.width, &spec, dir)?.to_vec(),
        None => Vec::new(),
    };
    let choices = spec.choices.to_string();
    let peak_host_bytes = host_memory::peak();
    let output = Output { device, choices, block, products, disk, peak_host_bytes };
    if args.json { print_json(&output) } else { print_result(&text(&output)) }
}

/// `--decode`.
fn decode(args: &Args, printer: &Printer) -> Result<()> {
    let device = args.device.open_one(printer, "steps are measured on one, as --device cuda:0")?;
    let found = bench_decode(&device, args.width)?;
    if args.json { print_json(&found) } else { print_result(&decode_text(&found, args.width)) }
}

fn decode_text(found: &DecodeBench, width: Width) -> String {
    let mut text = format!(
        "groups of 128, as {} has it; memory is read at {:.1} GB/s\n\n",
        width.name,
        found.read_rate / 1e9
    );
    let order = |form: Form| match (form.bits, form.act_order) {
        (16, _) => "",
        (_, true) => "yes",
        (_, false) => "no",
    };
    let header = ["linears", "shape", "bits", "act-order", "tokens", "µs", "GB/s", "of reading"];
    let rows: Vec<Vec<String>> = found
        .products
        .iter()
        .map(|r| {
            vec![
                r.linears.to_owned(),
                format!("{} × {}", r.shape[0], r.shape[1]),
                r.form.bits.to_string(),
                order(r.form).to_owned(),
                r.tokens.to_string(),
                format!("{:.1}", r.seconds * 1e6),
                format!("{:.2}", r.rate / 1e9),
                percent(Some(r.fraction)),
            ]
        })
        .collect();
    text.push_str(&table(&header, 2, &rows));
    let header = ["whole model", "act-order", "context", "blocks run", "tokens/s"];
    let rows: Vec<Vec<String>> = found
        .steps
        .iter()
        .map(|s| {
            vec![
                format!("{} bits", s.form.bits),
                order(s.form).to_owned(),
                s.context.to_string(),
                format!("{} of {}", s.measured_blocks, s.blocks),
                format!("{:.2}", s.tokens_per_second),
            ]
        })
        .collect();
    text.push('\n');
    text.push_str(&table(&header, 1, &rows));
    text
}

fn text(output: &Output) -> String {
    let block = &output.block;
    let mut text = format!(
        "one {} block, {} × {}, 4-bit 128g act-order: {:.3} s on {}\n{}\n",
        block.width.name,
        plural(block.windows, "window"),
        block.seq_len,
        block.seconds,
        output.device,
        output.choices
    );
    if let Some(peak) = block.peak_device_bytes {
        text.push_str(&format!("peak device memory {}\n", gigabytes(peak as u64)));
    }
    let yardstick = if block.peak_device_bytes.is_some() { "of the H100 floor" } else { "" };
    let header = ["stage", "seconds", "TFLOP", "TFLOP/s", yardstick];
    let rows: Vec<Vec<String>> = block
        .stages
        .iter()
        .map(|m| {
            let counted = m.operations > 0.0;
            let number =
                |v: f64, digits| if counted { format!("{v:.digits$}") } else { String::new() };
            vec![
                m.operation.clone(),
                format!("{:.4}", m.seconds),
                number(m.operations / 1e12, 3),
                number(m.rate / 1e12, 3),
                percent(m.fraction),
            ]
        })
        .collect();
    text.push('\n');
    text.push_str(&table(&header, 1, &rows));
    if !output.products.is_empty() {
        let header = ["product", "shape", "seconds", "GFLOP/s", "of matrixmultiply × threads"];
        let rows: Vec<Vec<String>> = output.products.iter().map(product).collect();
        text.push('\n');
        text.push_str(&table(&header, 2, &rows));
    }
    if !output.disk.is_empty() {
        let header = ["disk", "GB", "seconds", "GB/s", "floor, GB/s", "of the floor"];
        let rows: Vec<Vec<String>> = output.disk.iter().map(transfer).collect();
        text.push('\n');
        text.push_str(&table(&header, 1, &rows));
        text.push_str(
            "floors: one plain read or write of the same bytes in the same folder, a hash of memory on all cores\n",
        );
    }
    text
}

fn transfer(t: &Transfer) -> Vec<String> {
    vec![
        t.operation.to_owned(),
        format!("{:.3}", t.bytes as f64 / 1e9),
        format!("{:.4}", t.seconds),
        format!("{:.3}", t.rate / 1e9),
        format!("{:.3}", t.floor_rate / 1e9),
        percent(Some(t.fraction)),
    ]
}

fn product(m: &Measurement) -> Vec<String> {
    vec![
        m.operation.clone(),
        m.shape.clone(),
        format!("{:.4}", m.seconds),
        format!("{:.1}", m.rate / 1e9),
        percent(m.fraction),
    ]
}

fn percent(fraction: Option<f64>) -> String {
    fraction.map_or_else(String::new, |f| format!("{:.0} %", f * 100.0))
}
