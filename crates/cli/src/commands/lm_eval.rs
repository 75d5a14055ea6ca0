//! A run of lm-evaluation-harness against a server of our own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{TryRecvError, channel};

use anyhow::{Context, Result, bail, ensure};
use gptq_checkpoint::ModelConfig;
use gptq_model::context_limit;
use gptq_pipeline::progress::Progress;
use gptq_records::branch_report::TaskRecord;
use gptq_records::tasks::parse_results;

use super::eval::Args;
use super::text_model;
use crate::child::{INTERRUPTED, LastLine, Running, pause};
use crate::interrupt::Interrupt;
use crate::printer::{Printer, write_stderr};

/// Folders in each other that results are looked for in: the harness makes one named after the model.
const MOST_DEPTH: usize = 4;

/// The tasks' results of a model's folder. A signal ends the harness and the server, and then this
/// process.
pub(super) fn measure(
    args: &Args,
    folder: &Path,
    interrupt: &Interrupt,
    printer: &Printer,
) -> Result<Vec<TaskRecord>> {
    interrupt.begin();
    let measured = ask_server(args, folder, interrupt, printer);
    // Until here signals only end what was started, which is over by now.
    if interrupt.end() {
        write_stderr(&format!("error: {INTERRUPTED}"));
        interrupt.end_process()?;
    }
    measured
}

/// Nothing that this starts is there when it is done.
fn ask_server(
    args: &Args,
    folder: &Path,
    interrupt: &Interrupt,
    printer: &Printer,
) -> Result<Vec<TaskRecord>> {
    let path = folder.to_str().filter(|path| !path.contains([',', '=']));
    let path = path.with_context(|| {
        format!("The harness cannot be told of `{}`: a comma or = in its path", folder.display())
    })?;
    let config = ModelConfig::load(folder)?;
    let (limit, why) = context_limit(&config);
    let context = args.context.unwrap_or(text_model::CONTEXT.min(limit));
    ensure!(context <= limit, "--context {context} is above the {limit} that {why}");
    if context < limit {
        printer.warn(&format!(
            "the model's context is {limit} tokens, of which {context} are used: the harness cuts \
             off the beginnings of longer questions; --context says how many"
        ));
    }
    let (device, dtype) = args.device.for_child()?;
    let mut serve = vec![format!("--max-batch={}", args.batch), format!("--context={context}")];
    serve.extend(device);
    let server = Server::start(folder, &serve, interrupt)?;
    let out = tempfile::tempdir().context("Cannot create a folder for the harness's results")?;
    printer.note(&format!("lm_eval: {} of {path}", args.tasks.join(", ")));
    let mut harness = command(args, path, (&server.address, context), out.path());
    ask(&mut harness, interrupt, printer)?;
    drop(server);
    let results = results_file(out.path())?;
    let text = gptq_checkpoint::read_small(&results)
        .with_context(|| format!("Cannot read `{}`", results.display()))?;
    let records = parse_results(&text, dtype)
        .map_err(|reason| anyhow::anyhow!("lm_eval's results make no sense: {reason}"))?;
    ensure!(!records.is_empty(), "lm_eval measured nothing");
    Ok(records)
}

/// The harness's command line. Its client of servers takes 2048 tokens for every model's context, and
/// leaves out the token that texts of some begin with, where its own backend does neither: without it a
/// Llama is asked what it was never trained on.
fn command(args: &Args, path: &str, (address, context): (&str, usize), out: &Path) -> Command {
    let mut harness = Command::new(&args.lm_eval);
    harness.args(["run", "--model", "local-completions", "--batch_size", "1", "--model_args"]).arg(
        format!(
            "model={path},base_url={address}/v1/completions,tokenizer={path},\
             tokenizer_backend=huggingface,tokenized_requests=True,add_bos_token=True,\
             max_length={context},num_concurrent={},max_retries=1",
            args.batch
        ),
    );
    harness.arg("--tasks").arg(args.tasks.join(",")).arg("--output_path").arg(out);
    let counts = [("--num_fewshot", args.num_fewshot.map(|n| n as usize)), ("--limit", args.limit)];
    for (option, count) in counts.into_iter().filter_map(|(o, count)| Some((o, count?))) {
        harness.arg(option).arg(count.to_string());
    }
    if let Some(dir) = &args.include_path {
        harness.arg("--include_path").arg(dir);
    }
    harness
}

/// Runs the harness to its end. What it says of its progress a terminal shows.
fn ask(harness: &mut Command, interrupt: &Interrupt, printer: &Printer) -> Result<()> {
    harness.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut running = Running::start(harness, interrupt).context("Cannot run lm_eval")?;
    let status = printer.status("lm_eval");
    let stderr = running.child().stderr.take();
    let said = stderr.map(|pipe| LastLine::of(pipe, status.shows()));
    let made = running.wait(interrupt)?;
    // The last words of a Python program are what was wrong.
    let last = said.map(LastLine::get).filter(|last| !last.is_empty());
    let last = last.as_deref().unwrap_or("nothing");
    ensure!(made.success(), "lm_eval failed ({made}), and said last: {last}");
    Ok(())
}

/// `results_….json`, which lies in a folder named after the model. Links are not followed: they may lead
/// round in a circle.
fn results_file(out: &Path) -> Result<PathBuf> {
    let mut folders = vec![(out.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let failed = || format!("Cannot read `{}`", folder.display());
        for entry in std::fs::read_dir(&folder).with_context(failed)? {
            let entry = entry.with_context(failed)?;
            let (kind, path) = (entry.file_type().with_context(failed)?, entry.path());
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind.is_dir() && depth < MOST_DEPTH {
                folders.push((path, depth + 1));
            } else if kind.is_file() && name.starts_with("results") && name.ends_with(".json") {
                return Ok(path);
            }
        }
    }
    bail!("lm_eval wrote no results")
}

/// `gptq serve` of a model, ended when dropped.
struct Server {
    /// Held for its end, and for its stdin.
    _running: Running,
    address: String,
}

impl Server {
    fn start(folder: &Path, options: &[String], interrupt: &Interrupt) -> Result<Self> {
        let program = std::env::current_exe().context("Cannot find this program")?;
        let mut command = Command::new(program);
        command
            .args(["-q", "serve", "--port", "0", "--until-stdin-ends"])
            .args(options)
            .arg(folder)
            // Held open by this process, and closed by whatever ends it.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut running =
            Running::start(&mut command, interrupt).context("Cannot start gptq serve")?;
        let stdout = running.child().stdout.take().context("Cannot hear gptq serve")?;
        // In a thread: reading the weights takes minutes, in which a signal may come.
        let (said, address) = channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = said.send(line);
        });
        let address = loop {
            match address.try_recv() {
                Err(TryRecvError::Empty) => pause(interrupt)?,
                other => break other.unwrap_or_default().trim().to_owned(),
            }
        };
        // What was wrong it has said itself, on stderr.
        ensure!(address.starts_with("http://"), "gptq serve did not start");
        Ok(Self { _running: running, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_and_circles_are_not_walked() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        std::os::unix::fs::symlink(dir.path(), folder.join("again")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", folder.join("results_0.json")).unwrap();
        assert!(results_file(dir.path()).unwrap_err().to_string().contains("no results"));
        std::fs::write(folder.join("results_1.json"), "{}").unwrap();
        assert_eq!(results_file(dir.path()).unwrap(), folder.join("results_1.json"));
    }
}
