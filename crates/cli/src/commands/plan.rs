//! `gptq plan`: what every branch will cost.

use anyhow::Result;
use gptq_pipeline::cards::Card;
use gptq_pipeline::plan::{BranchPlan, Setting, plan_branch};
use gptq_pipeline::rates::{KnownRates, Prediction, Source};
use gptq_pipeline::sweep::config::ANY_MODEL;
use gptq_pipeline::write::planned_metadata;
use serde::Serialize;

use super::source::{open_config, open_sweep};
use super::table::{gigabytes, group, operations, plural, size, table, time, times_from, yes_no};
use super::{print_json, print_result};
use crate::args::values::parse_bytes;
use crate::printer::Printer;

/// Predict sizes, memory, work and time of every branch from config.json alone
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq plan HuggingFaceTB/SmolLM2-135M
  gptq plan stabilityai/StableBeluga2 --config stablebeluga2 --card H100

Without --card, the time is that of the first GPU, or of the CPU without one, by what gptq bench
measured on it.")]
pub(crate) struct Args {
    /// Folder that holds config.json, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// Sweep configuration: a file, or nine (the published table's settings, for any model) or
    /// stablebeluga2, which are built in
    #[arg(long, value_name = "FILE", default_value = ANY_MODEL)]
    config: String,
    /// GPU memory to plan for [default: the card's, or 80GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    gpu_memory: Option<u64>,
    /// Predict the time on this card instead of this machine's device: H100 or H200, as measured, or
    /// A100, L40S, RTX4090 or RTX3090, as estimated
    #[arg(long, value_name = "NAME")]
    card: Option<Card>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Bytes of the card that is planned for where none is named.
const DEFAULT_MEMORY: u64 = 80_000_000_000;

/// What `--json` prints for a branch.
#[derive(Serialize)]
struct Row {
    branch: String,
    bits: u8,
    group_size: Option<usize>,
    act_order: bool,
    #[serde(flatten)]
    plan: BranchPlan,
    /// Whether the tensors of parts beside the language model are known, where it has some.
    whole: bool,
    /// Of `gptq quantize`; `null` where nothing is known of the device.
    seconds: Option<f64>,
    seconds_from: Option<Source>,
    /// Whether the card has the memory.
    fits: bool,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let mut config = open_sweep(&args.config)?;
    let model = open_config(&args.model, printer)?;
    config.fit(&model, false).iter().for_each(|note| printer.note(note));
    let rates = match &args.card {
        Some(card) => KnownRates::of_card(card),
        None => KnownRates::of_this_machine(printer),
    };
    let of_card = args.card.map_or(DEFAULT_MEMORY, |card| card.memory);
    let gpu_memory = args.gpu_memory.unwrap_or(of_card);
    let setting = Setting {
        windows: config.calibration.windows(),
        seq_len: config.calibration.seq_len,
        shared_grams: config.shared_grams(),
        together: 1,
        gpu_memory,
    };
    let mut rows = Vec::new();
    for branch in &config.branches {
        let plan = plan_branch(
            &model,
            &branch.spec,
            config.source_dtype,
            config.layout,
            &planned_metadata(&branch.spec, config.source_dtype, &config.calibration),
            setting,
        )?;
        let predicted = rates.run(&model, &branch.spec, &plan);
        rows.push(Row {
            branch: branch.name.clone(),
            bits: branch.spec.bits,
            group_size: branch.spec.group_size,
            act_order: branch.spec.act_order,
            seconds: predicted.map(|p| p.seconds),
            seconds_from: predicted.map(|p| p.from),
            whole: model.carried().is_some(),
            fits: plan.gpu.device_bytes <= gpu_memory,
            plan,
        });
    }
    if let (Some(whole), None) = (model.wrapper(), model.carried()) {
        printer.note(&format!(
            "sizes are of the language model in a {whole} model: the weights, which say what else is carried, \
             are not here"
        ));
    }
    if args.json {
        return print_json(&rows);
    }
    let header = [
        "branch",
        "bits",
        "group",
        "act-order",
        "bytes",
        "size",
        "GPU",
        "host",
        "CPU run",
        "text",
        "work",
        "time",
    ];
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    let note = format!(
        "{} × {} tokens of {}. GPU and host: peak memory of a run on a card of {};\nCPU run: peak host memory without one; text: memory of a card that makes one of {} tokens.\n{}\n",
        plural(setting.windows, "window"),
        setting.seq_len,
        config.calibration.unread().name,
        gigabytes(gpu_memory),
        rows.first().map_or(0, |row| row.plan.text.context),
        explained(args.card.as_ref(), &rows),
    );
    print_result(&format!("{}\n{note}", table(&header, 1, &cells)))?;
    printer.note(&format!("Make them: gptq sweep {} --model {}", args.config, args.model));
    Ok(())
}

/// What the times are of, and where they come from.
fn explained(card: Option<&Card>, rows: &[Row]) -> String {
    let device = card.map_or("this machine's device", |card| card.name);
    let from = times_from(rows.iter().map(Row::predicted));
    let advice =
        if rows.iter().all(|row| row.seconds.is_none()) { ", or give a --card" } else { "" };
    format!("Time: of gptq quantize on {device}, {from}{advice}.")
}

impl Row {
    fn predicted(&self) -> Option<Prediction> {
        Prediction::of(self.seconds, self.seconds_from)
    }
}

/// Gigabytes, as cards and model cards give them, unless there is none.
fn amount(bytes: u64) -> String {
    if bytes < 100_000_000 { size(bytes) } else { gigabytes(bytes) }
}

fn cells(row: &Row) -> Vec<String> {
    vec![
        row.branch.clone(),
        row.bits.to_string(),
        group(row.group_size),
        yes_no(row.act_order),
        row.plan.file_bytes.to_string(),
        amount(row.plan.file_bytes),
        amount(row.plan.gpu.device_bytes) + if row.fits { "" } else { " (too much)" },
        amount(row.plan.gpu.host_bytes),
        amount(row.plan.cpu_bytes),
        amount(row.plan.text.total()),
        operations(row.plan.work.total()),
        time(row.predicted()),
    ]
}
