//! The thread that has the engine.

use std::collections::VecDeque;
use std::rc::Rc;

use gptq_generate::{Engine, Finish};

use crate::job::{Shared, Waiting};
use crate::metrics::Metrics;
use crate::part::{Part, scored_tokens};
use crate::queue::{Queue, Taken};

/// A text that is being made.
struct Running {
    shared: Rc<Shared>,
    index: usize,
}

/// Makes texts until the queue is closed and empty, or aborted.
pub(crate) fn run(engine: &mut Engine<'_>, slots: usize, queue: &Queue, metrics: &Metrics) {
    let mut desk = Desk {
        engine,
        metrics,
        running: (0..slots).map(|_| None).collect(),
        waiting: VecDeque::new(),
    };
    while !queue.is_aborted() {
        desk.forget_the_gone();
        let active = desk.engine.active();
        // Before the wait for a request, which may be a long one.
        metrics.counts().active = active;
        queue.set_free(slots.saturating_sub(active + desk.waiting.len()));
        if active < slots {
            if desk.waiting.is_empty() {
                match queue.take(active == 0) {
                    Taken::Job(job) => desk.waiting = job.texts(),
                    Taken::Nothing => {}
                    Taken::Over if active == 0 => break,
                    Taken::Over => {}
                }
            }
            // One at a time: those that run go on between two prompts.
            if let Some(text) = desk.waiting.pop_front() {
                desk.start(text);
            }
        }
        desk.step();
        let mut counts = metrics.counts();
        (counts.active, counts.spent) = (desk.engine.active(), desk.engine.spent());
    }
    desk.metrics.counts().active = 0;
}

struct Desk<'e, 'm> {
    engine: &'e mut Engine<'m>,
    metrics: &'e Metrics,
    /// By slot.
    running: Vec<Option<Running>>,
    /// Texts of one request that found no place yet.
    waiting: VecDeque<Waiting>,
}

impl Desk<'_, '_> {
    /// Frees the places of those whose clients went away.
    fn forget_the_gone(&mut self) {
        for (slot, running) in self.running.iter_mut().enumerate() {
            if running.take_if(|running| running.shared.parts.is_closed()).is_some() {
                // What was held back interests nobody.
                let _ = self.engine.cancel(slot);
                self.metrics.counts().cancelled += 1;
            }
        }
        let waiting = self.waiting.len();
        self.waiting.retain(|text| !text.shared.parts.is_closed());
        self.metrics.counts().cancelled += (waiting - self.waiting.len()) as u64;
    }

    fn start(&mut self, text: Waiting) {
        if let Err(error) = self.try_start(&text) {
            send(&text.shared, Err(error.to_string()));
        }
    }

    fn try_start(&mut self, text: &Waiting) -> gptq_generate::Result<()> {
        let Waiting { shared, index, prompt, request, score } = text;
        let (known, top) = (shared.scored.borrow().0 == *prompt, request.top);
        let to_score = *score && !known;
        if request.max_tokens > 0 || to_score {
            self.metrics.counts().prompt_tokens += request.prompt.len() as u64;
        }
        let (scored, step) = match (to_score, request.max_tokens) {
            (true, 0) => (Some(self.engine.score(&request.prompt, top)?), None),
            (true, _) => {
                let (scored, step) = self.engine.start_scored(request.clone(), top)?;
                (Some(scored), Some(step))
            }
            (false, 0) => (None, None),
            (false, _) => (None, Some(self.engine.start(request.clone())?)),
        };
        if let Some(scored) = scored {
            *shared.scored.borrow_mut() = (*prompt, scored_tokens(&request.prompt, scored));
        }
        if *score {
            let tokens = shared.scored.borrow().1.clone();
            send(shared, Ok(Part::of_prompt(*index, tokens)));
        }
        let Some(step) = step else {
            let finish = Some(Finish::MaxTokens);
            send(shared, Ok(Part { finish, ..Part::new(*index) }));
            return Ok(());
        };
        if step.finish.is_none() {
            let shared = Rc::clone(shared);
            self.running[step.slot] = Some(Running { shared, index: *index });
        }
        self.say(shared, Part::of_step(*index, step));
        Ok(())
    }

    /// A token of every text.
    fn step(&mut self) {
        if self.engine.active() == 0 {
            return;
        }
        self.metrics.counts().steps += 1;
        match self.engine.step() {
            Ok(steps) => {
                for step in steps {
                    let (slot, ended) = (step.slot, step.finish.is_some());
                    if let Some(Running { shared, index }) = &self.running[slot] {
                        self.say(shared, Part::of_step(*index, step));
                    }
                    if ended {
                        self.running[slot] = None;
                    }
                }
            }
            // All were in it.
            Err(error) => {
                for (slot, running) in self.running.iter_mut().enumerate() {
                    if let Some(running) = running.take() {
                        send(&running.shared, Err(error.to_string()));
                        let _ = self.engine.cancel(slot);
                    }
                }
            }
        }
    }

    /// Counts a token, and sends it.
    fn say(&self, shared: &Shared, part: Part) {
        let mut counts = self.metrics.counts();
        counts.completion_tokens += part.made as u64;
        if !shared.begun.replace(true) {
            counts.first_tokens += 1;
            counts.first_token_seconds += shared.since.elapsed().as_secs_f64();
        }
        drop(counts);
        send(shared, Ok(part));
    }
}

/// That nobody listens is seen before the next step.
fn send(shared: &Shared, part: Result<Part, String>) {
    let _ = shared.parts.send(part);
}
