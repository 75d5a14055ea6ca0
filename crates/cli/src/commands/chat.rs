//! `gptq chat`: a conversation, a line at a time.

use std::io::{BufRead, IsTerminal, Write};
use std::string::FromUtf8Error;

use anyhow::{Context, Result};
use gptq_generate::{Engine, Error, Finish, Message, Request};
use gptq_pipeline::progress::Progress;
use serde::Serialize;

use super::text_model::{TextModel, text_devices, warn_of_lost_system};
use super::{print_part, print_result};
use crate::args::{DeviceArgs, SamplingArgs};
use crate::interrupt::Interrupt;
use crate::printer::Printer;

/// Talk with a dense model or a GPTQ checkpoint
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Lines of standard input are what you say; /reset begins anew, /exit or Ctrl-D ends.
Ctrl-C ends an answer.

Examples:
  gptq chat ./SmolLM2-135M-4bit-128g
  gptq chat ./StableBeluga2-4bit-128g --template facts.toml --system 'Answer in one sentence.'
  echo 'What is a quaternion?' | gptq chat ./model --temperature 0 -q"
)]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print each answer as a line of JSON, with its tokens and their log-probabilities
    #[arg(long)]
    json: bool,
}

/// What `--json` prints of an answer.
#[derive(Default, Serialize)]
struct Answer {
    text: String,
    /// Its tokens, the one that ended it among them.
    ids: Vec<u32>,
    /// Natural logarithms of the probabilities that the model gave them.
    logprobs: Vec<f64>,
    /// Absent where Ctrl-C came first.
    finish: Option<Finish>,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let options = &args.sampling;
    let devices = text_devices(&args.device, printer)?;
    let model = TextModel::open(&args.model, options, usize::MAX, printer)?;
    model.note_choice(options, printer);
    let template = model.template(options.template.as_deref())?;
    warn_of_lost_system(&model, &template, options.system.as_deref(), printer)?;
    let context = model.context(options.context);
    let interrupt = Interrupt::listen()?;
    let decoder = model.decoder(&devices, context, printer)?;
    let mut engine = Engine::new(&decoder, &model.tokenizer, 1, context)?;
    engine.heed(interrupt.flag());
    let begin = || -> Vec<Message> {
        options.system.iter().map(|system| Message::new("system", system)).collect()
    };
    let mut messages = begin();
    let asks = !args.json && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let mut said = std::io::stdin().lock();
    loop {
        if asks {
            let mut out = std::io::stdout().lock();
            write!(out, "> ")?;
            out.flush()?;
        }
        let line = match next_line(&mut said).context("Could not read standard input")? {
            None => break,
            Some(Ok(line)) => line,
            Some(Err(_)) => {
                printer.warn("this line is not UTF-8 and is left out");
                continue;
            }
        };
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/reset" => {
                messages = begin();
                continue;
            }
            _ => messages.push(Message::new("user", line)),
        }
        let prompt = model.encode_chat(&template, &messages)?;
        if let Err(error) = model.check_length(&prompt, context) {
            messages.pop();
            if messages.last().is_none_or(|message| message.role == "system") {
                return Err(error);
            }
            printer.warn("this does not fit the context any more; /reset begins anew");
            continue;
        }
        let request = model.request(prompt, false, options);
        let answer = answer(&mut engine, request, &interrupt, |part| match args.json {
            true => Ok(true),
            false => print_part(part),
        })?;
        let Some(answer) = answer else {
            printer.note("interrupted before the answer: what you said is taken back");
            messages.pop();
            continue;
        };
        print_result(&if args.json { serde_json::to_string(&answer)? } else { String::new() })?;
        match answer.finish {
            Some(Finish::ContextFull) => printer.warn("the context is full; /reset begins anew"),
            Some(Finish::MaxTokens) => printer.note("the answer is cut at --max-tokens"),
            _ => {}
        }
        messages.push(Message::new("assistant", answer.text));
    }
    Ok(())
}

/// The next line without its end; `None` where there is no more, and the bytes of one that is no text.
fn next_line(said: &mut impl BufRead) -> std::io::Result<Option<Result<String, FromUtf8Error>>> {
    let mut line = Vec::new();
    if said.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    let end = line.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n'));
    line.truncate(end.map_or(0, |end| end + 1));
    Ok(Some(String::from_utf8(line)))
}

/// Makes an answer, and shows it as it comes; `None` where Ctrl-C came before its first token.
fn answer(
    engine: &mut Engine<'_>,
    request: Request,
    interrupt: &Interrupt,
    show: impl Fn(&str) -> Result<bool>,
) -> Result<Option<Answer>> {
    interrupt.begin();
    let mut answer = Answer::default();
    let mut step = match engine.start(request) {
        Err(Error::Interrupted) => {
            interrupt.end();
            return Ok(None);
        }
        step => step?,
    };
    loop {
        let read_on = show(&step.text)?;
        answer.text.push_str(&step.text);
        answer.ids.push(step.choice.id);
        answer.logprobs.push(step.choice.logprob);
        answer.finish = step.finish;
        if step.finish.is_some() || interrupt.is_pressed() || !read_on {
            break;
        }
        let Some(next) = engine.step()?.pop() else { break };
        step = next;
    }
    let rest = engine.cancel(step.slot)?;
    interrupt.end();
    show(&rest)?;
    answer.text.push_str(&rest);
    Ok(Some(answer))
}
