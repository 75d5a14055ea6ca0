//! A model that makes text, as a command opens it: its checkpoint, its tokenizer, and what the files
//! beside them and the command line say of how it writes.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_generate::{
    ChatTemplate, Error, GenerationConfig, Message, PromptTemplate, Request, Sampling, StopTokens,
    check_length,
};
use gptq_model::{Decoder, context_limit};
use gptq_pipeline::progress::Progress;
use gptq_report::card_facts::CardFacts;
use gptq_text::tokens::TextTokenizer;

use super::source::{open_checkpoint, warn_of};
use crate::args::{DeviceArgs, SamplingArgs};
use crate::hint::advised;
use crate::printer::Printer;

/// Texts that are made at once, at most: as many as a step makes at the price of one.
const MOST_AT_ONCE: usize = 16;
/// Tokens of a text and its prompt where nobody knows how long they will be and the model could hold
/// more.
pub(crate) const CONTEXT: usize = 4096;

/// `max_length` of files that transformers wrote of its own accord.
const OLD_MAX_LENGTH: usize = 20;

/// What is known of a model before its weights are read.
pub(crate) struct TextModel {
    pub(crate) checkpoint: Checkpoint,
    /// Shared with threads that make prompts while others are gone on with.
    pub(crate) tokenizer: Arc<TextTokenizer>,
    /// `generation_config.json`, where there is one.
    pub(crate) generation: Option<GenerationConfig>,
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: usize,
    pub(crate) end: StopTokens,
}

/// What stands around what a person says.
pub(crate) enum Template {
    /// The model's own.
    Chat(Box<ChatTemplate>),
    /// That of a card.
    Card(PromptTemplate),
}

impl TextModel {
    /// Opens a model by folder or Hub id, and says how it will write; texts have up to `max_tokens`
    /// where neither the command line nor a file says how many.
    pub(crate) fn open(
        model: &str,
        args: &SamplingArgs,
        max_tokens: usize,
        printer: &Printer,
    ) -> Result<Self> {
        let checkpoint = open_checkpoint(model, printer)?;
        warn_of(&checkpoint, false, printer)?;
        let folder = checkpoint.dir();
        let tokenizer = Arc::new(TextTokenizer::open(folder, checkpoint.config().vocab_size)?);
        let generation = GenerationConfig::open(folder)?;
        let sampling = Sampling::resolve(&args.options(), generation.as_ref())?;
        let end = StopTokens::find(folder, generation.as_ref(), &tokenizer)?;
        let file_says = generation.as_ref().and_then(|config| config.max_new_tokens);
        let max_tokens = args.max_tokens.or(file_says).unwrap_or(max_tokens);
        for asked in generation.iter().flat_map(|config| &config.not_followed) {
            printer
                .warn(&format!("generation_config.json asks for {asked}, which is not done here"));
        }
        let words = checkpoint.config().vocab_size;
        match end.ids.iter().find(|&&id| id as usize >= words) {
            Some(id) => printer.warn(&format!(
                "{} names {id} as a token that ends a text, and the model has {words}",
                end.file().unwrap_or_default()
            )),
            None if end.ids.is_empty() => {
                printer.warn("no file of the model names a token that ends a text");
            }
            None => {}
        }
        Ok(Self { checkpoint, tokenizer, generation, sampling, max_tokens, end })
    }

    /// Says how tokens are chosen, and of a length that the files ask for and that is not followed.
    pub(crate) fn note_choice(&self, args: &SamplingArgs, printer: &Printer) {
        let file = self.generation.as_ref().filter(|file| file.max_new_tokens.is_none());
        let length = file.and_then(|file| file.max_length).filter(|_| args.max_tokens.is_none());
        // The model's own limit holds anyhow.
        let means = |&length: &usize| length != OLD_MAX_LENGTH && length < self.limit();
        if let Some(length) = length.filter(means) {
            printer.warn(&format!(
                "generation_config.json has max_length {length}, which counts the prompt and is not \
                 followed: --max-tokens says how long an answer may be"
            ));
        }
        let greedy = self.sampling.is_greedy();
        let seed = if greedy { String::new() } else { format!(", seed {}", args.seed) };
        printer.note(&format!("choosing: {}{seed}", self.sampling.describe()));
    }

    /// The template that is to be used: a card's where facts were named.
    pub(crate) fn template(&self, facts: Option<&Path>) -> Result<Template> {
        let Some(path) = facts else {
            return Ok(Template::Chat(Box::new(ChatTemplate::open(self.checkpoint.dir())?)));
        };
        match CardFacts::open(path, None)?.prompt {
            Some(prompt) => Ok(Template::Card(PromptTemplate::new(prompt.template)?)),
            None => Err(advised(
                format!("`{}` has no prompt template", path.display()),
                "add [prompt] with name and template, or leave --template out",
            )),
        }
    }

    /// The most tokens that a text of this model can have, prompt included.
    pub(crate) fn limit(&self) -> usize {
        context_limit(self.checkpoint.config()).0
    }

    /// That a prompt leaves room for a token in a context, and in the model's own limit, which says why
    /// it is one.
    pub(crate) fn check_length(&self, prompt: &[u32], context: usize) -> Result<()> {
        let (limit, why) = context_limit(self.checkpoint.config());
        match check_length(prompt, 1, context.min(limit)) {
            Err(Error::PromptTooLong { tokens, capacity }) if capacity == limit => {
                let message = format!(
                    "The prompt has {tokens} tokens, and with one more it exceeds the {limit} that {why}"
                );
                Err(advised(message, "shorten it"))
            }
            other => Ok(other?),
        }
    }

    /// Tokens of texts of which nobody knows how long they will be: what was asked for, or what fits.
    pub(crate) fn context(&self, asked: Option<usize>) -> usize {
        asked.unwrap_or(CONTEXT.min(self.limit()))
    }

    /// Reads the weights, for texts of up to `context` tokens.
    pub(crate) fn decoder(
        &self,
        devices: &[Device],
        context: usize,
        printer: &Printer,
    ) -> Result<Decoder<'_>> {
        printer.begin("load", self.checkpoint.config().num_hidden_layers);
        let decoder = Decoder::load(&self.checkpoint, devices, context, |_| printer.step());
        printer.end();
        decoder.map_err(|error| match &error {
            gptq_model::Error::Compute(gptq_compute::Error::OutOfMemory { .. }) => advised(
                error.to_string(),
                "share the model between several GPUs, as --device cuda:all, or use --device cpu",
            ),
            _ => error.into(),
        })
    }

    /// What is to be made of a prompt.
    ///
    /// Read `whole`, a prompt's text is the same to the bit whatever was read before; otherwise what a
    /// conversation's last turn left is gone on with.
    pub(crate) fn request(&self, prompt: Vec<u32>, whole: bool, args: &SamplingArgs) -> Request {
        Request {
            prompt,
            sampling: self.sampling.clone(),
            seed: args.seed,
            max_tokens: self.max_tokens,
            end: self.end.ids.clone(),
            stop: args.stop.clone(),
            top: 0,
            whole,
        }
    }

    /// The tokens of a conversation through a template.
    pub(crate) fn encode_chat(
        &self,
        template: &Template,
        messages: &[Message],
    ) -> Result<Vec<u32>> {
        Ok(template.encode(&self.tokenizer, messages)?)
    }
}

impl Template {
    /// The tokens of a conversation.
    pub(crate) fn encode(
        &self,
        tokenizer: &TextTokenizer,
        messages: &[Message],
    ) -> Result<Vec<u32>, Error> {
        Ok(match self {
            Self::Chat(chat) => tokenizer.encode_chat(&chat.render(messages, true)?)?,
            // Texts of special tokens are no part of a card's template; a BOS is what the tokenizer
            // puts before any text.
            Self::Card(card) => tokenizer.encode(&card_text(card, messages)?)?,
        })
    }
}

/// A conversation in a card's template, turn after turn.
fn card_text(card: &PromptTemplate, messages: &[Message]) -> Result<String, Error> {
    let mut text = String::new();
    let mut system = None;
    for message in messages {
        match message.role.as_str() {
            "system" => system = Some(message.content.as_str()),
            "user" => text.push_str(&card.render(&message.content, system)),
            "assistant" => {
                text.push_str(&message.content);
                text.push_str("\n\n");
            }
            other => return Err(Error::UnknownRole { role: other.to_owned() }),
        }
    }
    Ok(text)
}

/// That so many texts can be made at once; `option` asked for them.
pub(crate) fn check_at_once(option: &str, texts: usize) -> Result<()> {
    ensure!(texts <= MOST_AT_ONCE, "{option} {texts} is above {MOST_AT_ONCE}");
    Ok(())
}

/// Where text is made: one device, which holds the whole model, or several, each of which holds a part.
pub(crate) fn text_devices(args: &DeviceArgs, printer: &Printer) -> Result<Vec<Device>> {
    args.open_each(printer, "start it once, and name the GPUs: --device cuda:0,1")
}

/// Warns of a `--system` that a template has no place for.
pub(crate) fn warn_of_lost_system(
    model: &TextModel,
    template: &Template,
    system: Option<&str>,
    printer: &Printer,
) -> Result<()> {
    let Some(system) = system.filter(|system| !system.is_empty()) else { return Ok(()) };
    let with = model.encode_chat(template, &conversation(Some(system), "x"))?;
    if with == model.encode_chat(template, &conversation(None, "x"))? {
        printer.warn("the template has no place for --system: the model is not told of it");
    }
    Ok(())
}

/// A conversation of one prompt.
pub(crate) fn conversation(system: Option<&str>, prompt: &str) -> Vec<Message> {
    let system = system.map(|system| Message::new("system", system));
    system.into_iter().chain([Message::new("user", prompt)]).collect()
}
