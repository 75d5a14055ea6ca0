//! `gptq plan`: what every branch will cost.

use anyhow::Result;
use gptq_pipeline::plan::{BranchPlan, Setting, plan_branch};
use gptq_pipeline::sweep::config::SweepConfig;
use gptq_pipeline::write::planned_metadata;
use serde::Serialize;

use super::source::open_config;
use super::table::{gigabytes, group, operations, size, table, yes_no};
use super::{print_json, print_result};
use crate::args::PlanArgs;
use crate::printer::Printer;

/// What `--json` prints for a branch.
#[derive(Serialize)]
struct Row {
    branch: String,
    bits: u8,
    group_size: Option<usize>,
    act_order: bool,
    #[serde(flatten)]
    plan: BranchPlan,
    /// Whether the card has the memory.
    fits: bool,
}

pub(crate) fn run(args: &PlanArgs, printer: &Printer) -> Result<()> {
    let config = SweepConfig::open(&args.config)?;
    let model = open_config(&args.model, printer)?;
    let setting = Setting {
        windows: config.calibration.windows,
        seq_len: config.calibration.seq_len,
        shared_grams: config.shared_grams(),
        together: 1,
        gpu_memory: args.gpu_memory,
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
        rows.push(Row {
            branch: branch.name.clone(),
            bits: branch.spec.bits,
            group_size: branch.spec.group_size,
            act_order: branch.spec.act_order,
            fits: plan.gpu.device_bytes <= args.gpu_memory,
            plan,
        });
    }
    if args.json {
        return print_json(&rows);
    }
    let header =
        ["branch", "bits", "group", "act-order", "bytes", "size", "GPU", "host", "CPU run", "work"];
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    print_result(&format!(
        "{}\n{} windows × {} tokens of {}. GPU and host: peak memory of a run on a card of {};\nCPU run: peak host memory without one.\n",
        table(&header, 1, &cells),
        setting.windows,
        setting.seq_len,
        config.calibration.dataset,
        gigabytes(args.gpu_memory),
    ))
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
        operations(row.plan.work.total()),
    ]
}
