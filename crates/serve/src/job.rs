//! A request as the engine has it: prompts, and a text of each or several.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use gptq_generate::{Request, Sampling};
use tokio::sync::mpsc::UnboundedSender;

use crate::part::{Part, Token};

/// Parts of texts, or what failed. Nobody listens any more where the client has gone.
pub(crate) type Parts = UnboundedSender<Result<Part, String>>;

/// What is to be made of some prompts.
#[derive(Debug)]
pub(crate) struct Job {
    /// Each with the new tokens that it may get.
    pub(crate) prompts: Vec<(Vec<u32>, usize)>,
    /// Texts of each prompt. The ith draws as a request of its own does whose seed is larger by i.
    pub(crate) n: usize,
    pub(crate) sampling: Sampling,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    pub(crate) end: Vec<u32>,
    /// With each token, so many of the likeliest are named.
    pub(crate) top: usize,
    /// Whether the tokens of the prompts are wanted with their log-probabilities, too.
    pub(crate) score: bool,
    pub(crate) parts: Parts,
    /// When the request was read.
    pub(crate) since: Instant,
}

/// What the texts of a job share.
pub(crate) struct Shared {
    pub(crate) parts: Parts,
    pub(crate) since: Instant,
    /// Whether the first token was made.
    pub(crate) begun: Cell<bool>,
    /// The last prompt that was scored, for its other texts.
    pub(crate) scored: RefCell<(usize, Vec<Token>)>,
}

/// A text that waits for a place.
pub(crate) struct Waiting {
    pub(crate) shared: Rc<Shared>,
    pub(crate) index: usize,
    /// The prompt's place.
    pub(crate) prompt: usize,
    pub(crate) request: Request,
    pub(crate) score: bool,
}

impl Job {
    /// How many texts it asks for.
    pub(crate) fn texts_in_all(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// Its texts, in order.
    pub(crate) fn texts(self) -> VecDeque<Waiting> {
        let Self { prompts, n, sampling, seed, stop, end, top, score, parts, since } = self;
        // What can be the same again is, to the bit, whatever was asked before it.
        let whole = seed.is_some() || sampling.is_greedy();
        let scored = RefCell::new((usize::MAX, Vec::new()));
        let shared = Rc::new(Shared { parts, since, begun: Cell::new(false), scored });
        let mut texts = VecDeque::with_capacity(prompts.len() * n);
        for (place, (prompt, max_tokens)) in prompts.into_iter().enumerate() {
            for i in 0..n {
                let request = Request {
                    prompt: prompt.clone(),
                    sampling: sampling.clone(),
                    seed: seed.map_or_else(any_seed, |seed| seed.wrapping_add(i as u64)),
                    max_tokens,
                    end: end.clone(),
                    stop: stop.clone(),
                    top,
                    whole,
                };
                texts.push_back(Waiting {
                    shared: Rc::clone(&shared),
                    index: place * n + i,
                    prompt: place,
                    request,
                    score,
                });
            }
        }
        texts
    }
}

/// A seed of which nothing is known.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}
