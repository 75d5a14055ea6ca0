//! `gptq serve`: a model behind OpenAI's HTTP interface.

use std::path::PathBuf;

use crate::args::DeviceArgs;
use crate::args::values::{parse_count, parse_whole};

/// Answer OpenAI's HTTP interface with a dense model or a GPTQ checkpoint
///
/// POST /v1/completions and /v1/chat/completions, whole or streamed, with log-probabilities; GET
/// /v1/models, /health and /metrics. The first line on stdout is the address, printed when requests are
/// answered. Ctrl-C, SIGTERM and SIGHUP (unless it is ignored, as by nohup) let running requests end for a
/// few seconds.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq serve ./SmolLM2-135M-4bit-128g
  gptq serve ./StableBeluga2-4bit-128g --template facts.toml --port 0
  gptq serve ./model --host 0.0.0.0 --api-key-file key.txt --max-batch 16 --context 2048")]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// Address to listen on; any that other machines reach needs a key
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 is any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8080, value_parser = parse_whole::<u16>)]
    port: u16,
    /// File with the key that clients have to show, as Authorization: Bearer KEY
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// How many texts are gone on with at once, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = parse_count)]
    max_batch: usize,
    /// Requests that may wait while all texts are taken; more are told to come again
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_count)]
    queue: usize,
    /// Tokens that a prompt and its text may have together [default: the model's limit, or 4096]
    #[arg(long, value_name = "N", value_parser = parse_count, visible_alias = "ctx-size")]
    context: Option<usize>,
    /// Card facts whose prompt template is used in place of the model's chat template
    #[arg(long, value_name = "FACTS.toml")]
    template: Option<PathBuf>,
    /// End, as by SIGTERM, when stdin does: whoever started this is gone
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[cfg(not(feature = "serve"))]
pub(crate) fn run(_: &Args, _: &crate::printer::Printer) -> anyhow::Result<()> {
    let how = "build it without --no-default-features";
    Err(crate::hint::advised("This build has no server", how))
}
#[cfg(feature = "serve")]
pub(crate) use with_server::run;

#[cfg(feature = "serve")]
mod with_server {
    use std::path::Path;
    use std::sync::Arc;

    use anyhow::Result;
    use gptq_generate::{Engine, Error};
    use gptq_serve::{ApiKey, Chat, Limits, Listener, Served};

    use super::Args;
    use crate::args::SamplingArgs;
    use crate::commands::print_result;
    use crate::commands::text_model::{TextModel, check_at_once, text_devices};
    use crate::interrupt::hangup_is_ignored;
    use crate::printer::Printer;

    pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
        if args.until_stdin_ends {
            end_with_stdin();
        }
        let slots = args.max_batch;
        check_at_once("--max-batch", slots)?;
        let key = args.api_key_file.as_deref().map(ApiKey::read).transpose()?;
        // Before the weights are read: what is wrong with the address is known at once.
        let listener = Listener::bind(&args.host, args.port, key)?;
        let devices = text_devices(&args.device, printer)?;
        let model = TextModel::open(&args.model, &SamplingArgs::default(), usize::MAX, printer)?;
        printer.note(&format!(
            "choosing, where a request says nothing: {}; what is drawn without a seed gets one of \
             its own",
            gptq_serve::default_sampling(model.sampling.clone()).describe()
        ));
        let context = model.context(args.context);
        let served = served(args, &model, context)?;
        let decoder = model.decoder(&devices, context, printer)?;
        let mut engine = Engine::new(&decoder, &model.tokenizer, slots, context)?;
        printer.note(&format!(
            "serving {}: {slots} texts at once of up to {context} tokens, {} requests may wait",
            served.name, args.queue
        ));
        let limits = Limits { slots, queue: args.queue, ends_on_hangup: !hangup_is_ignored() };
        gptq_serve::serve(listener, limits, served, &mut engine, |address| {
            // Whoever closed stdout does not want to know.
            let _ = print_result(&format!("http://{address}"));
        })?;
        Ok(())
    }

    /// Sends this process SIGTERM when stdin ends, which it does however its holder ended. While weights
    /// are read that is the end at once.
    fn end_with_stdin() {
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            let _ = signal_hook::low_level::raise(signal_hook::consts::SIGTERM);
        });
    }

    /// What requests need to know of the model.
    fn served(args: &Args, model: &TextModel, context: usize) -> Result<Served> {
        let typed = args.model.clone();
        let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let base = match Path::new(&typed).canonicalize() {
            Ok(path) => last(&path),
            Err(_) => last(Path::new(&typed)),
        };
        let local = Path::new(&typed).exists();
        let name = base.clone().filter(|_| local).unwrap_or_else(|| typed.clone());
        let chat = match model.template(args.template.as_deref()) {
            Ok(template) => {
                let tokenizer = Arc::clone(&model.tokenizer);
                Ok(Box::new(move |messages: &[_]| template.encode(&tokenizer, messages)) as Chat)
            }
            // The model can go on with texts all the same.
            Err(error) => match error.downcast_ref() {
                Some(Error::NoChatTemplate { .. }) => Err(format!(
                    "The model {name} has no chat template: start the server with --template, or \
                     use /v1/completions"
                )),
                _ => return Err(error),
            },
        };
        Ok(Served {
            aliases: [typed].into_iter().chain(base).collect(),
            name,
            tokenizer: Arc::clone(&model.tokenizer),
            vocabulary: model.checkpoint.config().vocab_size,
            context,
            generation: model.generation.clone(),
            end: model.end.ids.clone(),
            chat,
        })
    }
}
