//! What can go wrong in a run; everything below is carried with the tensor or block it concerns.

use std::borrow::Cow;
use std::path::PathBuf;

use gptq_quant::{Choices, Rotate};
use gptq_report::units::gigabytes;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A choice of a recipe that the model does not allow.
    #[error("A choice does not fit the model: {note}")]
    Choice {
        /// What would do, and why.
        note: String,
    },
    /// Datasets, tokenizers, calibration recipes.
    #[error(transparent)]
    Text(#[from] gptq_text::Error),
    /// What lies in the folder of a branch.
    #[error(transparent)]
    Records(#[from] gptq_records::Error),
    /// The facts of a card.
    #[error(transparent)]
    Report(#[from] gptq_report::Error),
    /// Reading or writing a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] gptq_checkpoint::Error),
    /// The forward pass.
    #[error(transparent)]
    Model(#[from] gptq_model::Error),
    /// The device.
    #[error(transparent)]
    Compute(#[from] gptq_compute::Error),
    /// The solver, at a linear.
    #[error("Cannot quantize `{linear}`")]
    Solve {
        /// The linear's prefix in the checkpoint.
        linear: String,
        /// What the solver said.
        source: gptq_quant::Error,
    },
    /// A choice of bits, groups or damping that no solver takes.
    #[error(transparent)]
    Spec(gptq_quant::Error),
    /// Activations that are no longer numbers.
    #[error(
        "NaN or infinite activations at the inputs of `{linear}`; the source model is damaged or overflows there"
    )]
    Activations {
        /// The first linear that reads them.
        linear: String,
    },
    /// A rotated table that fp16 cannot hold.
    #[error("`{tensor}` overflows fp16 once it is rotated")]
    Rotated {
        /// The source's tensor.
        tensor: String,
    },
    /// A rotation that cannot be learned from the weights.
    #[error("Cannot learn a rotation of the residual stream")]
    Learn(#[source] gptq_quant::Error),
    /// A learned rotation that the base does not determine.
    #[error(
        "Cannot compare `{}` with the base: it has a learned rotation, and the base's embedding does not span the \
         residual stream, so that it cannot be found from it",
        checkpoint.display()
    )]
    RotationNotFound {
        /// The quantized folder.
        checkpoint: PathBuf,
    },
    /// A fitted head that fp16 cannot hold.
    #[error("`{tensor}` overflows fp16 once it is fitted")]
    Fitted {
        /// The tensor.
        tensor: String,
    },
    /// Branches of a sweep that could not be made or measured, each of which was reported on its way.
    #[error("{failed} of {of} branches failed: {names}")]
    Branches {
        /// How many failed.
        failed: usize,
        /// Of how many.
        of: usize,
        /// Their names.
        names: String,
        /// True if one failed by a fault of this program.
        internal: bool,
    },
    /// Devices whose results differ in the last bits.
    #[error("A sweep's devices have to be of one kind, and these are {one} and {other}")]
    DeviceKinds {
        /// The first one's.
        one: String,
        /// Another's.
        other: String,
    },
    /// What `gptq bench` kept of its measurements, and cannot be read or written.
    #[error("`{}` is no file of measured rates: {message}", path.display())]
    Rates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// What would not fit in host memory.
    #[error(
        "{what} would take {} of host memory, and {} are free",
        gigabytes(*needed),
        gigabytes(*available)
    )]
    HostMemory {
        /// What was asked for.
        what: String,
        /// Bytes that it would take at least.
        needed: u64,
        /// Bytes that this process may still take.
        available: u64,
        /// What to do.
        advice: &'static str,
    },
    /// A quantized model that is larger than the device that should tune it.
    #[error(
        "Tuning the scales of the whole model would take {} of device memory, and it may hold {}",
        gigabytes(*needed),
        gigabytes(*available)
    )]
    TuneMemory {
        /// Bytes that it would take at least.
        needed: u64,
        /// Bytes that may be held.
        available: u64,
    },
    /// A benchmark of more tokens than can be counted with.
    #[error("{windows} windows × {seq_len} tokens are more than 2^40 tokens")]
    TooManyTokens {
        /// Windows asked for.
        windows: usize,
        /// Tokens of a window.
        seq_len: usize,
    },
    /// Steps of a block with experts, which `gptq bench --decode` does not measure.
    #[error("`--decode` measures no blocks with experts, and `{width}` has them")]
    DecodeExperts {
        /// The width asked for.
        width: &'static str,
    },
    /// Damping had to be raised under `--strict`.
    #[error(
        "The Hessian of `{linear}` needed damping {damp:?} instead of {asked:?}, which --strict forbids"
    )]
    Strict {
        /// The linear's prefix.
        linear: String,
        /// Damping that worked.
        damp: f64,
        /// Damping asked for.
        asked: f64,
    },
    /// A Hessian had to be factored in f64 under `--strict`.
    #[error(
        "The Hessian of `{linear}` is not positive definite in f32 at damping {damp:?} and needed f64, which --strict forbids"
    )]
    StrictPrecision {
        /// The linear's prefix.
        linear: String,
        /// Damping of the attempt.
        damp: f64,
    },
    /// An expert that saw too few tokens, under `--strict`.
    #[error(
        "`{linear}` saw {tokens} tokens, fewer than it has inputs, and was calibrated on all tokens of its block, which --strict forbids"
    )]
    StrictTokens {
        /// The linear's prefix.
        linear: String,
        /// Tokens that were routed to it.
        tokens: u64,
    },
    /// What would be a warning about the source, under `--strict`.
    #[error("{0} (--strict)")]
    StrictSource(&'static str),
    /// The source holds quantized linears already.
    #[error("`{}` is a GPTQ checkpoint already", .0.display())]
    AlreadyQuantized(PathBuf),
    /// A base that is quantized itself.
    #[error("`{}` is a GPTQ checkpoint, not a dense model", .0.display())]
    QuantizedBase(PathBuf),
    /// A base of another shape than the checkpoint.
    #[error("`{}` is not what the checkpoint was made from: its {what} is {theirs}, not {mine}", base.display())]
    OtherBase {
        /// The base.
        base: PathBuf,
        /// The key of config.json that differs.
        what: &'static str,
        /// The checkpoint's value.
        mine: usize,
        /// The base's value.
        theirs: usize,
    },
    /// A sweep file that does not say what it should.
    #[error("`{file}` is not a sweep configuration: {message}")]
    Config {
        /// The file, or the name of a built-in configuration.
        file: String,
        /// What is wrong, with the place.
        message: String,
        /// What to do, where something helps.
        advice: Option<String>,
    },
    /// A branch's name is taken by something that no sweep finished.
    #[error("`{}` exists, but no sweep finished it", .0.display())]
    ForeignBranch(PathBuf),
    /// A branch that would be replaced holds something that no sweep made.
    #[error(
        "`{}` is not up to date, but holds `{file}`, which is not the sweep's to delete",
        dir.display()
    )]
    StrayFile {
        /// The branch's folder.
        dir: PathBuf,
        /// The file.
        file: String,
    },
    /// A source that can be read once, and more branches than are made at a time.
    #[error(
        "Shards that are discarded are read once, for {branches} branches here, and {made} are made \
         at the same time"
    )]
    Together {
        /// Branches that are to be made.
        branches: usize,
        /// Branches that are made at the same time.
        made: usize,
        /// Branches of each device that would do.
        together: usize,
    },
    /// A source that can be read once, and an evaluation that would read it more often.
    #[error(
        "Shards that are discarded are read once, so an evaluation has to be of one batch: memory \
         holds the states of {room} tokens beside the models, and the windows have {tokens}"
    )]
    OneBatch {
        /// Tokens of the windows.
        tokens: usize,
        /// Tokens that memory holds.
        room: usize,
    },
    /// A branch whose source is not known before its shards are read.
    #[error(
        "Whether `{}` was made from this source is not known before its shards are read",
        .0.display()
    )]
    UnreadSource(PathBuf),
    /// A branch that a configuration does not have.
    #[error("No branch `{branch}` in `{file}`; it has {known}")]
    UnknownBranch {
        /// The name asked for.
        branch: String,
        /// The configuration.
        file: String,
        /// Names that exist.
        known: String,
    },
    /// Two evaluations that cannot be compared token by token.
    #[error("KL needs two models of one vocabulary, but they have {base} and {other} entries")]
    Vocabulary {
        /// Entries of the base model.
        base: usize,
        /// Entries of the other model.
        other: usize,
    },
    /// A thread ended without saying why.
    #[error("The thread that was {0} the checkpoint ended unexpectedly")]
    Thread(&'static str),
}

impl Error {
    /// What to do about it, where the message does not make that plain. What only hands on the error
    /// of another library has that one's: it is no link of the chain of its own.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::Text(error) => return error.hint(),
            Self::Records(error) => return error.hint(),
            Self::Report(error) => return error.hint(),
            Self::Checkpoint(error) => return error.hint(),
            Self::Model(error) => return error.hint(),
            Self::Compute(error) => return error.hint(),
            Self::Spec(error) => return error.hint(),
            Self::Rotated { .. } => {
                format!("use --set {}={}", Rotate::KEY, Rotate::Heads.name()).into()
            }
            Self::Fitted { .. } => format!("use --set {}=0", Choices::HEAD).into(),
            Self::TuneMemory { .. } => {
                "use the recipe best, larger groups, or a card with more memory".into()
            }
            Self::HostMemory { advice, .. } => (*advice).into(),
            Self::TooManyTokens { .. } => "use fewer windows, or shorter ones".into(),
            Self::DecodeExperts { .. } => "use another --width".into(),
            Self::Strict { .. } | Self::StrictPrecision { .. } => {
                "raise --damp or calibrate on more windows".into()
            }
            Self::StrictTokens { .. } => "calibrate on more windows".into(),
            Self::AlreadyQuantized(_) => "quantize the dense model that it was made from".into(),
            Self::QuantizedBase(_) => "give --base the dense model that was quantized".into(),
            Self::Config { advice, .. } => advice.as_deref()?.into(),
            Self::Rates { .. } => "delete it, and run gptq bench again".into(),
            Self::ForeignBranch(_) => "move it away or choose another --out".into(),
            Self::StrayFile { .. } => "move it away".into(),
            Self::Together { together, .. } => {
                format!("use --together {together}, or leave out --discard-shards").into()
            }
            Self::OneBatch { .. } => {
                "set max_windows in the configuration, or leave out --discard-shards".into()
            }
            Self::UnreadSource(_) => "leave out --discard-shards, or choose another --out".into(),
            _ => return None,
        })
    }

    /// True for a fault of this program, which no input should cause.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        match self {
            Self::Compute(error) => error.is_internal(),
            Self::Model(error) => error.is_internal(),
            Self::Spec(error) | Self::Learn(error) | Self::Solve { source: error, .. } => {
                error.is_internal()
            }
            Self::Branches { internal, .. } => *internal,
            _ => false,
        }
    }
}

/// What one link of a chain says to do, whichever of the libraries it comes from.
#[must_use]
pub fn hint_of<'a>(link: &'a (dyn std::error::Error + 'static)) -> Option<Cow<'a, str>> {
    macro_rules! of_library {
        ($($error:ty),*) => {
            $(if let Some(error) = link.downcast_ref::<$error>() {
                return error.hint();
            })*
        };
    }
    of_library!(
        Error,
        gptq_checkpoint::Error,
        gptq_compute::Error,
        gptq_model::Error,
        gptq_quant::Error,
        gptq_records::Error,
        gptq_report::Error,
        gptq_text::Error
    );
    Some(link.downcast_ref::<gptq_text::home::HomeError>()?.hint().into())
}

/// What an error and its causes say to do, each once, the outermost first.
fn hints(error: &Error) -> Vec<Cow<'_, str>> {
    let first: &(dyn std::error::Error + 'static) = error;
    let mut hints = Vec::new();
    for hint in std::iter::successors(Some(first), |link| link.source()).filter_map(hint_of) {
        if !hints.contains(&hint) {
            hints.push(hint);
        }
    }
    hints
}

/// An error and its causes in one line, for warnings and findings.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

/// `text` about an error, with what to do about it on lines of its own.
pub(crate) fn with_hints(mut text: String, error: &Error) -> String {
    for hint in hints(error) {
        text.push_str(&format!("\nhint: {hint}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error = Error::Fitted { tensor: "lm_head.weight".to_owned() };
        assert_eq!(error.to_string(), "`lm_head.weight` overflows fp16 once it is fitted");
        assert_eq!(error.hint().unwrap(), "use --set head=0");
        let below = gptq_quant::Error::Bits { bits: 5 };
        assert_eq!(Error::Spec(below).hint().unwrap(), "use 2, 3, 4 or 8");
        assert_eq!(Error::Thread("reading").hint(), None);
        // A cause's own, which the error that names the linear does not have.
        let source = gptq_quant::Error::Bits { bits: 5 };
        let error = Error::Solve { linear: "q_proj".to_owned(), source };
        assert_eq!(error.hint(), None);
        assert_eq!(hints(&error), ["use 2, 3, 4 or 8"]);
    }
}
