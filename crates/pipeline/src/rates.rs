//! Seconds that a run will take, from its operations and the rates of a device.
//!
//! ```text
//! a branch = blocks × Σ operations of a stage / its rate  +  bytes of embedding and head / 0.5 GB/s
//! a run    = start-up + branch        (start-up: 3 s on a GPU, 0.3 s on the CPU)
//! ```
//!
//! Blocks are read and written beside the work, which hides both unless the disk is slower than the
//! device; that, and the head that `best` fits (a tenth of a block or so), are left out. Recipes that
//! do not calibrate have no operations that are counted, and no prediction. Tuning that was not
//! measured (`gptq bench --recipe tuned`) is taken to go at the rate of a forward, and so is learning a
//! rotation, whose reads of a model that the device cannot hold are left out.
//!
//! Rates are, in this order, those that `gptq bench` has measured on the device with a block of about
//! the model's width; those of a table of cards; and those of a benchmark of another width. Whatever
//! was not measured so is an estimate, and says of what: a card scaled by its data sheet, a small
//! model by the rates of a wide one, several devices by the rates of one, and a run whose activations
//! wait in host memory.

use std::path::PathBuf;

use gptq_checkpoint::ModelConfig;
use gptq_compute::Device;
use gptq_compute::cuda::probe;
use gptq_quant::{Clip, QuantSpec};
use serde::Serialize;

use crate::bench::{BlockBench, Width};
use crate::cards::Card;
use crate::error::{Result, with_causes, with_hints};
use crate::memory::Offload;
use crate::operations::{Extras, Operations};
use crate::plan::BranchPlan;
use crate::progress::Progress;
use crate::rates_file::{self, Record};
use crate::recipe_fit::has_experts;
pub use crate::stage_rates::Source;
use crate::stage_rates::{Entry, Rates, Stage};
use crate::work::Work;

/// A block's operations by stage, those of the solver as a recipe solves.
fn by_stage(operations: &Operations, spec: &QuantSpec) -> Vec<(Stage, f64)> {
    let solve = match spec.choices.clip {
        Clip::None => Stage::Solve,
        Clip::Search => Stage::SolveSearch,
        Clip::Solve => Stage::SolveTrial,
    };
    let stages =
        [Stage::Forward, Stage::Gram, Stage::Factor, solve, Stage::Reference, Stage::Shift];
    let tunes = (operations.tune > 0.0).then_some(Stage::Tune);
    let stages = stages.into_iter().chain(tunes);
    // Learning is products of fp16 with f32 sums, as a forward is.
    let learned = |stage| if stage == Stage::Forward { operations.learn } else { 0.0 };
    stages.map(|stage| (stage, operations.of(stage.work()) + learned(stage))).collect()
}

/// What something will take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Wall-clock.
    pub seconds: f64,
    /// What it rests on.
    pub from: Source,
}

impl Prediction {
    /// From the two fields that results hold it in.
    #[must_use]
    pub fn of(seconds: Option<f64>, from: Option<Source>) -> Option<Self> {
        let (seconds, from) = seconds.zip(from)?;
        Some(Self { seconds, from })
    }
}

/// What is known of a device, the best first; nothing by default.
#[derive(Clone, Debug, Default)]
pub struct KnownRates {
    entries: Vec<Entry>,
    /// Devices that make a branch together.
    ranks: usize,
    gpu: bool,
}

/// Widths so far apart have rates that are much alike.
const NEAR: f64 = 2.5;

/// Bytes a second of the embedding and the head, which are checked, hashed and written on one core.
const TABLES_RATE: f64 = 0.5e9;

/// Seconds before the first block, but for downloads: libraries and contexts, tokenizer, windows.
const START_UP_GPU: f64 = 3.0;
const START_UP_CPU: f64 = 0.3;

impl KnownRates {
    /// Of a device, or of `ranks` alike that make a branch together. Earlier benchmarks that cannot be
    /// read are named in a warning and left aside.
    pub fn of_device(device: &Device, ranks: usize, progress: &dyn Progress) -> Self {
        let card = match device {
            Device::Cpu => None,
            Device::Cuda(cuda) => Card::of_device(cuda.name()),
        };
        let gpu = matches!(device, Device::Cuda(_));
        Self { ranks, gpu, entries: entries(&device_key(device), card, progress) }
    }

    /// Of the device that a run would use on this machine, which is not opened for it.
    pub fn of_this_machine(progress: &dyn Progress) -> Self {
        match probe().cards.iter().find(|card| card.supported) {
            Some(card) => Self {
                entries: entries(&card.kind(), Card::of_device(&card.name), progress),
                ranks: 1,
                gpu: true,
            },
            None => Self::of_device(&Device::Cpu, 1, progress),
        }
    }

    /// Of a card of the table.
    pub fn of_card(card: &Card) -> Self {
        Self { entries: card.entries(), ranks: 1, gpu: true }
    }

    /// Seconds of a process beside its branches.
    pub fn start_up(&self) -> f64 {
        if self.gpu { START_UP_GPU } else { START_UP_CPU }
    }

    /// What a branch takes once its process has started, if that is known.
    pub fn branch(
        &self,
        model: &ModelConfig,
        spec: &QuantSpec,
        plan: &BranchPlan,
    ) -> Option<Prediction> {
        if !spec.recipe.calibrates() {
            return None;
        }
        let stages = by_stage(&plan.work, spec);
        let blocks = |tuning: Stage| {
            let timed_as = |stage| if stage == Stage::Tune { tuning } else { stage };
            self.best(model, |rates| {
                let seconds =
                    |&(stage, count): &(Stage, f64)| Some(count / rates.get(&timed_as(stage))?);
                stages.iter().filter(|(_, count)| *count > 0.0).map(seconds).sum()
            })
        };
        let (blocks, as_forward) = match blocks(Stage::Tune) {
            Some(blocks) => (blocks, false),
            None => (blocks(Stage::Forward)?, plan.work.tune > 0.0),
        };
        let offloads = self.gpu && plan.gpu.offload != Offload::default();
        let tables = 2.0 * 2.0 * model.vocab_size as f64 * model.hidden_size as f64;
        Some(Prediction {
            seconds: blocks.seconds + tables / TABLES_RATE,
            from: match (offloads, as_forward) {
                (true, _) => blocks.from.max(Source::Offloaded),
                (false, true) => blocks.from.max(Source::ForwardRate),
                (false, false) => blocks.from,
            },
        })
    }

    /// What a command that makes one branch takes.
    pub fn run(
        &self,
        model: &ModelConfig,
        spec: &QuantSpec,
        plan: &BranchPlan,
    ) -> Option<Prediction> {
        let branch = self.branch(model, spec, plan)?;
        Some(Prediction { seconds: self.start_up() + branch.seconds, ..branch })
    }

    /// What so many operations of a forward take.
    pub(crate) fn forward(&self, model: &ModelConfig, operations: f64) -> Option<Prediction> {
        self.best(model, |rates| Some(operations / rates.get(&Stage::Forward)?))
    }

    /// The answer of the best rates that have one.
    fn best(
        &self,
        model: &ModelConfig,
        seconds: impl Fn(&Rates) -> Option<f64>,
    ) -> Option<Prediction> {
        let far = |entry: &Entry| {
            let ratio = entry.hidden as f64 / model.hidden_size as f64;
            ratio.max(1.0 / ratio)
        };
        let answer = |entry: &Entry| {
            let mut from = entry.from;
            let other = entry.experts != has_experts(model);
            if far(entry) > NEAR || other {
                from = from.max(Source::OtherWidth);
            }
            let shared = if entry.ranks == self.ranks { 1 } else { self.ranks };
            if shared > 1 {
                from = from.max(Source::OneDevice);
            }
            Some((from, other, far(entry), seconds(&entry.rates)? / shared as f64))
        };
        // Rates of several devices say nothing of one.
        let usable = |entry: &&Entry| entry.ranks == self.ranks || entry.ranks == 1;
        let answers = self.entries.iter().filter(usable).filter_map(answer);
        // Of estimates, the one from such a block, and then from the nearest width.
        let rank = |from: Source| from.min(Source::OtherWidth);
        type Answer = (Source, bool, f64, f64);
        let better = |a: &Answer, b: &Answer| {
            rank(a.0).cmp(&rank(b.0)).then(a.1.cmp(&b.1)).then(a.2.total_cmp(&b.2))
        };
        let (from, .., seconds) = answers.min_by(better)?;
        Some(Prediction { seconds, from }).filter(|p| p.seconds.is_finite())
    }
}

/// Benchmarks of a device, and the table's entry of its card.
fn entries(key: &str, card: Option<&Card>, progress: &dyn Progress) -> Vec<Entry> {
    let records = match rates_file::path().map(|path| rates_file::read(&path)) {
        Some(Ok(records)) => records,
        Some(Err(error)) => {
            let warning = format!("{}; it is ignored", with_causes(&error));
            progress.warn(&with_hints(warning, &error));
            Vec::new()
        }
        None => Vec::new(),
    };
    let measured = records.into_iter().filter(|record| record.device == key).map(|record| {
        let Record { hidden, ranks, rates, width, .. } = record;
        let experts = width.parse().is_ok_and(Width::has_experts);
        Entry { hidden, experts, ranks, rates, from: Source::Bench }
    });
    measured.chain(card.into_iter().flat_map(Card::entries)).collect()
}

/// What rates depend on: the card, or the CPU and the number of its threads.
fn device_key(device: &Device) -> String {
    match device {
        Device::Cuda(_) => device.kind(),
        Device::Cpu => {
            let threads = rayon::current_num_threads();
            format!("{}, {}{threads} threads", device.kind(), processor())
        }
    }
}

/// The processor's name and a comma, where the system gives it: machines that share a home, and with
/// it the file of rates, may differ in nothing else.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|line| line.starts_with("model name"));
    let name = name.and_then(|line| line.split_once(':')).map_or("", |(_, name)| name.trim());
    let name: String = name.chars().take(MOST_NAME).collect();
    if name.is_empty() { name } else { format!("{name}, ") }
}

/// Letters of a processor's name that tell it from others.
const MOST_NAME: usize = 64;

/// Fewer tokens than a real run has in a chunk say nothing of one.
const LEAST_TOKENS: usize = 1024;

/// Keeps the rates of a benchmark for predictions; the file that has them now, or `None` where there is
/// no cache, or where the benchmark is not like a run: of few tokens, or with activations that wait in
/// host memory.
///
/// # Errors
/// A file that cannot be written.
pub fn keep(device: &Device, spec: &QuantSpec, bench: &BlockBench) -> Result<Option<PathBuf>> {
    let Some(path) = rates_file::path() else { return Ok(None) };
    let few = bench.windows.saturating_mul(bench.seq_len) < LEAST_TOKENS;
    if few || bench.offload != Offload::default() {
        return Ok(None);
    }
    rates_file::keep(&path, measured(device_key(device), spec, bench))?;
    Ok(Some(path))
}

/// The record of a benchmark.
fn measured(device: String, spec: &QuantSpec, bench: &BlockBench) -> Record {
    let extras = Extras::of(&spec.choices);
    let operations =
        Operations::of_block(&bench.width.kind(), (bench.windows, bench.seq_len), extras);
    let counted = bench.stages.iter().filter(|stage| stage.operations > 0.0);
    let counted: f64 = counted.map(|stage| stage.seconds).sum();
    // Packing and exchanges, which have no operations, are spread over what has.
    let beside = counted / bench.seconds.max(counted);
    let rate = |(stage, count): (Stage, f64)| {
        let name = stage.work().name();
        let measured = bench.stages.iter().find(|m| m.operation == name && m.operations > 0.0)?;
        Some((stage, count / measured.seconds * beside))
    };
    let tune = bench.stages.iter().find(|m| m.operation == Work::Tune.name());
    let operations = Operations { tune: tune.map_or(0.0, |m| m.operations), ..operations };
    Record {
        device,
        width: bench.width.name.to_owned(),
        hidden: bench.width.hidden(),
        ranks: bench.ranks,
        date: rates_file::today(),
        rates: by_stage(&operations, spec).into_iter().filter_map(rate).collect(),
    }
}

/// How far a prediction was off, for a person.
#[must_use]
pub fn compared(Prediction { seconds, from }: Prediction, took: f64) -> String {
    let digits = usize::from(seconds.min(took) < 10.0);
    let off = (took / seconds - 1.0) * 100.0;
    let how = from.name();
    format!("predicted {seconds:.digits$} s, {how}; took {took:.digits$} s ({off:+.0} %)")
}

#[cfg(test)]
#[path = "rates_tests.rs"]
mod tests;
