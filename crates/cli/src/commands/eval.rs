//! `gptq eval`: tasks of lm-evaluation-harness, asked of a server of our own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gptq_checkpoint::REPORT_FILE;
use gptq_records::branch_report::{BranchReport, TaskRecord};
use gptq_records::tasks::record_tasks;

use super::lm_eval::measure;
use super::source::locate;
use super::table::table;
use super::text_model::check_at_once;
use super::{print_json, print_result};
use crate::args::DeviceArgs;
use crate::args::values::{parse_count, parse_whole};
use crate::hint::advised;
use crate::interrupt::Interrupt;
use crate::printer::Printer;

/// What installs the harness with all that its client of servers needs.
const INSTALL: &str = "install it with: pip install 'lm_eval[api]' transformers";

/// Measure tasks of lm-evaluation-harness, and keep the results beside perplexity
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq eval ./SmolLM2-135M-4bit-128g --tasks arc_easy,hellaswag --base ./SmolLM2-135M
  gptq eval ./model --tasks facts --include-path ./tasks --limit 100 --json

It runs the installed lm_eval against `gptq serve` of the model, and ends both where Ctrl-C or
another signal ends it.")]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// Tasks of the harness, separated by commas
    #[arg(long, value_name = "TASKS", value_delimiter = ',', required = true)]
    pub(super) tasks: Vec<String>,
    /// Solved questions before each
    #[arg(long, value_name = "N", visible_alias = "num_fewshot", value_parser = parse_whole::<u32>)]
    pub(super) num_fewshot: Option<u32>,
    /// Questions of each task, at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub(super) limit: Option<usize>,
    /// Folder with more tasks
    #[arg(long, value_name = "DIR", visible_alias = "include_path")]
    pub(super) include_path: Option<PathBuf>,
    /// Dense model to compare with
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Texts that are gone on with at once, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = parse_count)]
    pub(super) batch: usize,
    /// Tokens that a question and its answer may have together [default: the model's limit, or 4096]
    #[arg(long, value_name = "N", value_parser = parse_count, visible_alias = "ctx-size")]
    pub(super) context: Option<usize>,
    /// The harness's command, where it is not the first lm_eval of PATH
    #[arg(long, value_name = "COMMAND", default_value = "lm_eval")]
    pub(super) lm_eval: PathBuf,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    check_at_once("--batch", args.batch)?;
    for task in &args.tasks {
        // Words for a command line: the harness reads other things into these.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | '*');
        ensure!(!task.is_empty() && task.chars().all(plain), "`{task}` is no task's name");
        ensure!(!task.starts_with('-'), "`{task}` is no task's name");
    }
    let version = Command::new(&args.lm_eval).arg("--help").output();
    if !version.is_ok_and(|output| output.status.success()) {
        let name = args.lm_eval.display();
        return Err(advised(format!("lm-evaluation-harness, `{name}`, does not run"), INSTALL));
    }
    // What would not be kept is known before hours of questions are asked. A folder is published by
    // its name, which `.` is not.
    let folder = whole_path(&locate(&args.model, printer)?)?;
    let kept = folder.join(REPORT_FILE).is_file();
    if kept {
        BranchReport::read(&folder)?;
    }
    let interrupt = Interrupt::listen_to_the_end()?;
    let mut records = measure(args, &folder, &interrupt, printer)?;
    if let Some(base) = &args.base {
        let base = whole_path(&locate(base, printer)?)?;
        let found = measure(args, &base, &interrupt, printer)?;
        for record in &mut records {
            let same = |r: &&TaskRecord| (&r.task, &r.metric) == (&record.task, &record.metric);
            record.base = found.iter().find(same).map(|r| r.value);
        }
    }
    // The results are printed whatever becomes of the report.
    let saved = if kept { record_tasks(&folder, records.clone()) } else { Ok(()) };
    match &saved {
        Ok(()) if kept => printer.note(&format!("kept in {}", folder.join(REPORT_FILE).display())),
        Ok(()) => printer.note("not kept: the folder has no report of this program"),
        Err(_) => {}
    }
    if args.json { print_json(&records) } else { print_result(&shown(&records)) }?;
    Ok(saved?)
}

fn whole_path(folder: &Path) -> Result<PathBuf> {
    folder.canonicalize().with_context(|| format!("Cannot open `{}`", folder.display()))
}

fn shown(records: &[TaskRecord]) -> String {
    let number = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.4}"));
    let rows: Vec<Vec<String>> = records
        .iter()
        .map(|r| {
            vec![
                r.task.clone(),
                r.metric.clone(),
                number(Some(r.value)),
                number(r.standard_error),
                number(r.base),
                r.samples.map_or_else(String::new, |n| n.to_string()),
            ]
        })
        .collect();
    table(&["task", "metric", "result", "±", "base", "questions"], 2, &rows)
}
