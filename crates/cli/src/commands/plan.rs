//! `gptq plan`: what every branch will cost.

use std::collections::BTreeMap;

use anyhow::Result;
use gptq_pipeline::config::SweepConfig;
use gptq_pipeline::plan::{BranchPlan, plan_branch};
use serde::Serialize;

use super::source::open_config;
use super::table::{gigabytes, group, table, yes_no};
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
}

pub(crate) fn run(args: &PlanArgs, printer: &Printer) -> Result<()> {
    let config = SweepConfig::open(&args.config)?;
    let model = open_config(&args.model, printer)?;
    let windows = (config.calibration.windows, config.calibration.seq_len);
    let mut rows = Vec::new();
    for branch in &config.branches {
        let plan = plan_branch(
            &model,
            &branch.spec,
            config.source_dtype,
            config.layout,
            &BTreeMap::new(),
            windows,
            args.gpu_memory,
        )?;
        rows.push(Row {
            branch: branch.name.clone(),
            bits: branch.spec.bits,
            group_size: branch.spec.group_size,
            act_order: branch.spec.act_order,
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
        windows.0,
        windows.1,
        config.calibration.dataset,
        gigabytes(args.gpu_memory),
    ))
}

fn cells(row: &Row) -> Vec<String> {
    vec![
        row.branch.clone(),
        row.bits.to_string(),
        group(row.group_size),
        yes_no(row.act_order),
        row.plan.file_bytes.to_string(),
        gigabytes(row.plan.file_bytes),
        gigabytes(row.plan.gpu.device_bytes),
        gigabytes(row.plan.gpu.host_bytes),
        gigabytes(row.plan.cpu_bytes),
        format!("{:.3} PFLOP", row.plan.work.total() / 1e15),
    ]
}
