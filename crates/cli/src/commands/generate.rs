//! `gptq generate`: text that a model makes of a prompt, or of several at once.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use gptq_checkpoint::read_small_text;
use gptq_compute::Device;
use gptq_compute::cuda::read_rate;
use gptq_generate::{Engine, Error, Finish, Message, Step};
use serde::{Deserialize, Serialize};

use super::text_model::{
    Template, TextModel, check_at_once, conversation, text_devices, warn_of_lost_system,
};
use super::{print_json, print_part, print_result};
use crate::args::values::parse_count;
use crate::args::{DeviceArgs, SamplingArgs, device_names};
use crate::interrupt::Interrupt;
use crate::printer::Printer;

/// New tokens where neither the command line nor a file says how many.
const MAX_TOKENS: usize = 256;

/// Bytes of a prompt's file, which may be a device without end.
const MOST_PROMPT: u64 = 64 << 20;

/// Make text with a dense model or a GPTQ checkpoint
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq generate ./SmolLM2-135M-4bit-128g --prompt 'The capital of France is'
  gptq generate ./SmolLM2-135M-4bit-128g --chat --prompt 'Tell me about AI' --temperature 0.7
  gptq generate ./model --template facts.toml --system 'Be brief.' --prompt question.txt
  gptq generate ./model --prompts questions.jsonl --max-tokens 64 --json")]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// The prompt: a text, a file that holds it, or - for standard input
    #[arg(long, value_name = "TEXT|FILE|-", required_unless_present = "prompts")]
    #[arg(allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Several prompts, a line each: a JSON string, {\"prompt\": …} or {\"messages\": […]}
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// How many of them are gone on with at once, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = parse_count)]
    batch: usize,
    /// Ask through the model's chat template, as --system and --template do, too; without them the
    /// text is gone on with as it is
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON, with tokens and their log-probabilities
    #[arg(long)]
    json: bool,
}

/// A line of `--prompts`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Text(String),
    Prompt(Asked),
    Messages(Said),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    prompt: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    messages: Vec<Message>,
}

/// A text that was made.
#[derive(Serialize)]
struct Written {
    prompt_ids: Vec<u32>,
    /// New tokens, the one that ended the text among them.
    ids: Vec<u32>,
    /// Natural logarithms of the probabilities that the model gave them.
    logprobs: Vec<f64>,
    text: String,
    /// Absent where Ctrl-C came first.
    finish: Option<Finish>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    device: String,
    dtype: &'static str,
    sampling: String,
    seed: u64,
    context: usize,
    texts: Vec<Written>,
    interrupted: bool,
    #[serde(flatten)]
    speed: Speed,
}

/// How fast the texts were made.
#[derive(Serialize)]
struct Speed {
    prompt_tokens: usize,
    new_tokens: usize,
    /// Of the first text, once the weights were there.
    seconds_to_first_token: f64,
    prompt_seconds: f64,
    step_seconds: f64,
    /// Of all texts together, after the first token of each.
    tokens_per_second: Option<f64>,
    /// Weights that a step reads.
    bytes_per_step: usize,
    bytes_per_second: Option<f64>,
    /// Bytes a second at which a GPU reads its memory, and what of them the steps have read.
    memory_bytes_per_second: Option<f64>,
    share_of_memory_speed: Option<f64>,
}

/// What of a GPU's memory is read to know its speed: far more than its caches hold.
const MEASURED_BYTES: usize = 1 << 30;

/// The speed of a GPU's memory, where there is room to measure it.
fn memory_speed(device: &Device) -> Option<f64> {
    match device {
        Device::Cpu => None,
        Device::Cuda(cuda) => read_rate(cuda, MEASURED_BYTES).ok(),
    }
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    check_at_once("--batch", args.batch)?;
    let devices = text_devices(&args.device, printer)?;
    let model = TextModel::open(&args.model, &args.sampling, MAX_TOKENS, printer)?;
    model.note_choice(&args.sampling, printer);
    let prompts = prompts(args, &model, printer)?;
    let context = context(args, &model, &prompts, printer)?;
    let interrupt = Interrupt::listen()?;
    let decoder = model.decoder(&devices, context, printer)?;
    let slots = args.batch.min(prompts.len());
    // Once the weights are read: from here on Ctrl-C keeps what there is, be it nothing yet.
    interrupt.begin();
    let mut engine = Engine::new(&decoder, &model.tokenizer, slots, context)?;
    engine.heed(interrupt.flag());
    let stream = prompts.len() == 1 && !args.json;

    let start = Instant::now();
    let mut first = None;
    let mut texts: Vec<_> = prompts.into_iter().map(Written::new).collect();
    let (mut next, mut of_slot, mut steps) = (0, vec![0; slots], 0_usize);
    // A text that streams and that nobody reads any more need not be made.
    let mut read_on = true;
    while read_on && (next < texts.len() || engine.active() > 0) && !interrupt.is_pressed() {
        let made = if next < texts.len() && engine.active() < slots {
            let prompt = texts[next].prompt_ids.clone();
            let step = match engine.start(model.request(prompt, true, &args.sampling)) {
                Err(Error::Interrupted) => break,
                step => step?,
            };
            first.get_or_insert_with(|| start.elapsed());
            of_slot[step.slot] = next;
            next += 1;
            vec![step]
        } else {
            steps += 1;
            engine.step()?
        };
        for step in made {
            if stream {
                read_on &= print_part(&step.text)?;
            }
            texts[of_slot[step.slot]].take(step);
        }
    }
    let interrupted = interrupt.end();
    for slot in 0..slots {
        let rest = engine.cancel(slot)?;
        if stream {
            print_part(&rest)?;
        }
        texts[of_slot[slot]].text.push_str(&rest);
    }
    let new_tokens: usize = texts.iter().map(|text| text.ids.len()).sum();
    let [prompt_seconds, step_seconds] = engine.spent().map(|spent| spent.as_secs_f64());
    let per_second = |count: usize| (steps > 0).then(|| count as f64 / step_seconds);
    let bytes_per_second = per_second(steps * decoder.step_bytes());
    let memory_bytes_per_second = bytes_per_second.and_then(|_| memory_speed(&devices[0]));
    let speed = Speed {
        prompt_tokens: texts[..next].iter().map(|text| text.prompt_ids.len()).sum(),
        new_tokens,
        seconds_to_first_token: first.unwrap_or_default().as_secs_f64(),
        prompt_seconds,
        step_seconds,
        tokens_per_second: per_second(new_tokens.saturating_sub(next)),
        bytes_per_step: decoder.step_bytes(),
        bytes_per_second,
        memory_bytes_per_second,
        share_of_memory_speed: bytes_per_second.zip(memory_bytes_per_second).map(|(a, b)| a / b),
    };
    if args.json {
        let output = Output {
            model: &args.model,
            device: device_names(&devices),
            dtype: devices[0].dtype(),
            sampling: model.sampling.describe(),
            seed: args.sampling.seed,
            context,
            texts,
            interrupted,
            speed,
        };
        print_json(&output)?;
    } else {
        print_result(&if stream { String::new() } else { all(&texts) })?;
        say_how(&texts, &speed, interrupted, context, printer);
    }
    if interrupted { interrupt.end_process() } else { Ok(()) }
}

impl Written {
    fn new(prompt_ids: Vec<u32>) -> Self {
        let (ids, logprobs, text, finish) = Default::default();
        Self { prompt_ids, ids, logprobs, text, finish }
    }

    fn take(&mut self, step: Step) {
        self.ids.push(step.choice.id);
        self.logprobs.push(step.choice.logprob);
        self.text.push_str(&step.text);
        self.finish = step.finish;
    }
}

/// The tokens of every prompt.
fn prompts(args: &Args, model: &TextModel, printer: &Printer) -> Result<Vec<Vec<u32>>> {
    let options = &args.sampling;
    let through = args.chat || options.template.is_some() || options.system.is_some();
    let template = match through {
        true => Some(model.template(options.template.as_deref())?),
        false => None,
    };
    let system = options.system.as_deref();
    if let Some(template) = &template {
        warn_of_lost_system(model, template, system, printer)?;
    }
    let of_text = |text: &str| match &template {
        Some(template) => model.encode_chat(template, &conversation(system, text)),
        None => Ok(model.tokenizer.encode(text)?),
    };
    let Some(file) = &args.prompts else {
        let prompt = args.prompt.as_deref().unwrap_or_default();
        return Ok(vec![of_text(&prompt_text(prompt, printer)?)?]);
    };
    let text =
        read_small_text(file).with_context(|| format!("Could not read `{}`", file.display()))?;
    let mut prompts = Vec::new();
    for (number, line) in (1..)
        .zip(text.trim_start_matches('\u{feff}').lines())
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let line = serde_json::from_str(line).ok().with_context(|| {
            let expected =
                "a JSON string, {\"prompt\": TEXT} or {\"messages\": [{\"role\", \"content\"}, …]}";
            format!("Line {number} of `{}` is not {expected}", file.display())
        })?;
        prompts.push(match line {
            Line::Text(text) | Line::Prompt(Asked { prompt: text }) => of_text(&text)?,
            Line::Messages(Said { messages }) => {
                of_messages(model, template.as_ref(), with_system(system, messages))?
            }
        });
    }
    ensure!(!prompts.is_empty(), "`{}` holds no prompts", file.display());
    Ok(prompts)
}

/// Messages make sense through a template alone, asked for or not.
fn of_messages(
    model: &TextModel,
    template: Option<&Template>,
    messages: Vec<Message>,
) -> Result<Vec<u32>> {
    match template {
        Some(template) => model.encode_chat(template, &messages),
        None => model.encode_chat(&model.template(None)?, &messages),
    }
}

/// Messages that begin with `--system`, unless they have a system message of their own.
fn with_system(system: Option<&str>, mut messages: Vec<Message>) -> Vec<Message> {
    let system = system.filter(|_| messages.iter().all(|message| message.role != "system"));
    if let Some(system) = system {
        messages.insert(0, Message::new("system", system));
    }
    messages
}

/// `--prompt`: a text, a file's, or what standard input has.
fn prompt_text(prompt: &str, printer: &Printer) -> Result<String> {
    if prompt == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("Could not read standard input")?;
        return Ok(text);
    }
    let path = Path::new(prompt);
    if !path.exists() {
        return Ok(prompt.to_owned());
    }
    // A pipe too, as shells make of `<(command)`.
    printer.note(&format!("prompt: what {prompt} holds"));
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MOST_PROMPT).read_to_string(&mut text));
    let size = read.with_context(|| format!("Could not read `{prompt}`"))?;
    ensure!((size as u64) < MOST_PROMPT, "`{prompt}` holds more than any model reads");
    Ok(text)
}

/// Tokens that a text may have: what was asked for, or what the longest prompt needs.
fn context(
    args: &Args,
    model: &TextModel,
    prompts: &[Vec<u32>],
    printer: &Printer,
) -> Result<usize> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let needed = longest.saturating_add(model.max_tokens);
    let limit = model.limit();
    let context = args.sampling.context.unwrap_or(needed.min(limit));
    for (prompt, number) in prompts.iter().zip(1..) {
        let fits = model.check_length(prompt, context);
        if prompts.len() == 1 {
            fits?;
        } else {
            fits.with_context(|| format!("Prompt {number} of {} does not fit", prompts.len()))?;
        }
    }
    if context < needed {
        printer.note(&format!(
            "a context of {context} tokens has room for {} new ones after the longest prompt",
            context - longest
        ));
    }
    Ok(context)
}

/// Several texts, one after the other.
fn all(texts: &[Written]) -> String {
    let numbered = texts.iter().zip(1..);
    numbered.map(|(text, number)| format!("=== {number}\n{}\n", text.text)).collect()
}

/// Why the texts ended, where that is not the usual, and how fast they were made.
fn say_how(texts: &[Written], speed: &Speed, interrupted: bool, context: usize, printer: &Printer) {
    let full = texts.iter().filter(|text| text.finish == Some(Finish::ContextFull)).count();
    if full > 0 {
        let which = if texts.len() == 1 { String::new() } else { format!("{full} texts: ") };
        printer.note(&format!("{which}the context of {context} tokens is full"));
    }
    if interrupted {
        printer.note("interrupted");
    }
    let rate = speed.tokens_per_second.map_or_else(String::new, |rate| {
        let bytes = speed.bytes_per_second.unwrap_or_default() / 1e9;
        let share = speed.share_of_memory_speed.map_or_else(String::new, |share| {
            format!(" ({:.0} % of the memory's speed)", 100.0 * share)
        });
        format!(", {rate:.1} tokens/s, {bytes:.1} GB/s of weights{share}")
    });
    printer.note(&format!(
        "prompt {} tokens in {:.2} s, {} new tokens{rate}",
        speed.prompt_tokens, speed.prompt_seconds, speed.new_tokens
    ));
}
