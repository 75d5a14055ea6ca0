//! `gptq eval`: tasks of lm-evaluation-harness, asked of a server of our own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use gptq_checkpoint::REPORT_FILE;
use gptq_compute::Device;
use gptq_records::branch_report::{BranchReport, TaskRecord};
use gptq_records::tasks::{parse_results, record_tasks};

use super::source::locate;
use super::table::table;
use super::text_model::check_at_once;
use super::{print_json, print_result};
use crate::args::values::parse_count;
use crate::hint::advised;
use crate::printer::Printer;

/// What installs the harness with all that its client of servers needs.
const INSTALL: &str = "install it with: pip install 'lm_eval[api]' transformers";

/// Measure tasks of lm-evaluation-harness, and keep the results beside perplexity
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq eval ./SmolLM2-135M-4bit-128g --tasks arc_easy,hellaswag --base ./SmolLM2-135M
  gptq eval ./model --tasks facts --include-path ./tasks --limit 100 --json

It runs the installed lm_eval against `gptq serve` of the model.")]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// Tasks of the harness, separated by commas
    #[arg(long, value_name = "TASKS", value_delimiter = ',', required = true)]
    tasks: Vec<String>,
    /// Solved questions before each
    #[arg(long, value_name = "N", visible_alias = "num_fewshot")]
    num_fewshot: Option<u32>,
    /// Questions of each task, at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    limit: Option<usize>,
    /// Folder with more tasks
    #[arg(long, value_name = "DIR", visible_alias = "include_path")]
    include_path: Option<PathBuf>,
    /// Dense model to compare with
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Texts that are gone on with at once, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = parse_count)]
    batch: usize,
    /// The harness's command, where it is not the first lm_eval of PATH
    #[arg(long, value_name = "COMMAND", default_value = "lm_eval")]
    lm_eval: PathBuf,
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
    let mut records = measure(args, &folder, printer)?;
    if let Some(base) = &args.base {
        let found = measure(args, &whole_path(&locate(base, printer)?)?, printer)?;
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

/// The tasks' results of a model's folder.
fn measure(args: &Args, folder: &Path, printer: &Printer) -> Result<Vec<TaskRecord>> {
    let path = folder.to_str().filter(|path| !path.contains([',', '=']));
    let path = path.with_context(|| {
        format!("The harness cannot be told of `{}`: a comma or = in its path", folder.display())
    })?;
    let server = Server::start(folder, args.batch)?;
    let out = tempfile::tempdir().context("Cannot create a folder for the harness's results")?;
    let mut harness = Command::new(&args.lm_eval);
    harness.args(["run", "--model", "local-completions", "--batch_size", "1", "--model_args"]).arg(
        format!(
            "model={path},base_url={}/v1/completions,tokenizer={path},tokenizer_backend=huggingface,\
             tokenized_requests=True,num_concurrent={},max_retries=1",
            server.address, args.batch
        ),
    );
    harness.arg("--tasks").arg(args.tasks.join(",")).arg("--output_path").arg(out.path());
    let counts = [("--num_fewshot", args.num_fewshot.map(|n| n as usize)), ("--limit", args.limit)];
    for (option, count) in counts.into_iter().filter_map(|(o, count)| Some((o, count?))) {
        harness.arg(option).arg(count.to_string());
    }
    if let Some(dir) = &args.include_path {
        harness.arg("--include_path").arg(dir);
    }
    printer.note(&format!("lm_eval: {} of {path}", args.tasks.join(", ")));
    let made = harness.stdin(Stdio::null()).output().context("Cannot run lm_eval")?;
    if !made.status.success() {
        // The last words of a Python program are what was wrong.
        let stderr = String::from_utf8_lossy(&made.stderr);
        let last = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
        bail!("lm_eval failed ({}), and said last: {}", made.status, last.trim());
    }
    let results = results_file(out.path())?;
    let text = gptq_checkpoint::read_small(&results)
        .with_context(|| format!("Cannot read `{}`", results.display()))?;
    let records = parse_results(&text, Device::Cpu.dtype())
        .map_err(|reason| anyhow::anyhow!("lm_eval's results make no sense: {reason}"))?;
    ensure!(!records.is_empty(), "lm_eval measured nothing");
    Ok(records)
}

/// `results_….json`, which lies in a folder named after the model.
fn results_file(out: &Path) -> Result<PathBuf> {
    let mut folders = vec![out.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("Cannot read `{}`", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if name.starts_with("results") && name.ends_with(".json") {
                return Ok(path);
            }
        }
    }
    bail!("lm_eval wrote no results")
}

/// `gptq serve` of a model, ended when dropped.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(folder: &Path, batch: usize) -> Result<Self> {
        let program = std::env::current_exe().context("Cannot find this program")?;
        let mut process = Command::new(program)
            .args(["-q", "serve", "--port", "0", "--max-batch", &batch.to_string()])
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("Cannot start gptq serve")?;
        let mut address = String::new();
        if let Some(stdout) = process.stdout.take() {
            BufReader::new(stdout).read_line(&mut address)?;
        }
        let server = Self { process, address: address.trim().to_owned() };
        // What was wrong it has said itself, on stderr.
        ensure!(server.address.starts_with("http://"), "gptq serve did not start");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
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
