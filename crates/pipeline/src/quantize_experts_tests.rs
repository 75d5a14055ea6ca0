//! Experts are calibrated on the tokens that are routed to them, and what the file gives is what was walked.

use std::collections::BTreeMap;

use gptq_checkpoint::Expert;
use gptq_model::{Block, Stage};
use gptq_quant::ScalePrecision;
use ndarray::{Array2, Axis};

use super::*;

const FAMILIES: [&str; 5] = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "glm4-moe"];

/// The recipe, with scales as the file holds them.
fn spec(recipe: Recipe) -> QuantSpec {
    let mut spec = QuantSpec::new(4, Some(32), true, recipe.damp(), recipe);
    spec.choices.scales = ScalePrecision::Half;
    spec
}

/// Of several chunks, and of so few tokens that some experts see less than they have inputs.
#[test]
fn the_file_gives_the_states_that_experts_propagated() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        family_models::assemble(folder.path(), name);
        let source = Checkpoint::open(folder.path()).unwrap();
        for (windows, recipe) in [(90, Recipe::AutoGptq), (90, Recipe::Best), (2, Recipe::Best)] {
            let spec = spec(recipe);
            let out = folder.path().join(format!("{recipe:?}{windows}"));
            let calibration = calibration(windows);
            let job = job(&source, &calibration, spec, &out);
            assert_walked_alike(&QuantizeJob { strict: false, ..job });
        }
    }
}

/// What was recorded of a linear, or what should have been.
#[derive(Debug, PartialEq)]
struct Seen {
    tokens: Option<u64>,
    few_tokens: bool,
}

/// Errors and token counts of a block's experts by the definition, in f64: the Hessian of an expert is that
/// of the tokens whose largest router products are its own, or of all where those are fewer than inputs.
struct Reference<'a> {
    source: &'a Checkpoint,
    /// The quantized block.
    block: &'a Block,
    /// What gate and up read, `[tokens, hidden]`.
    inputs: Array2<f64>,
    damp: f64,
}

fn wide(values: &Array2<f32>) -> Array2<f64> {
    values.mapv(f64::from)
}

impl Reference<'_> {
    fn source_weight(&self, name: &str, shape: (usize, usize)) -> Array2<f64> {
        let tensor = self.source.tensor(name).unwrap();
        wide(&Array2::from_shape_vec(shape, tensor.to_f32()).unwrap())
    }

    /// Rows of each routed expert.
    fn routes(&self) -> Vec<Vec<usize>> {
        let experts = &self.block.mixture().unwrap().experts;
        let dense = self.source.config().block_dense(self.block.index()).remove(0);
        let name = format!("model.layers.{}.{}", self.block.index(), dense.name);
        let router = self.source_weight(&name, (dense.shape[0], dense.shape[1]));
        let products = self.inputs.dot(&router.t());
        let mut rows = vec![Vec::new(); experts.count];
        for (token, of_token) in products.axis_iter(Axis(0)).enumerate() {
            let mut order: Vec<usize> = (0..experts.count).collect();
            order.sort_by(|&a, &b| of_token[b].total_cmp(&of_token[a]));
            order[..experts.per_token].iter().for_each(|&expert| rows[expert].push(token));
        }
        rows
    }

    /// Relative error of a linear whose inputs are these, and what was seen.
    fn error(&self, id: gptq_model::LinearId, inputs: &Array2<f64>) -> f64 {
        let linear = self.block.linear(id);
        let made = wide(&linear.weight.to_host().unwrap());
        let wanted = self.source_weight(&format!("{}.weight", linear.name), made.dim());
        let mut hessian = inputs.t().dot(inputs);
        let energy = (wanted.dot(&hessian) * &wanted).sum();
        let mean = hessian.diag().mean().unwrap();
        hessian.diag_mut().mapv_inplace(|d| d + self.damp * mean);
        let off = &wanted - &made;
        (off.dot(&hessian) * &off).sum() / energy
    }

    fn activations(&self, expert: Expert, inputs: &Array2<f64>) -> Array2<f64> {
        let weight = |id| wide(&self.block.linear(id).weight.to_host().unwrap());
        let gate = inputs.dot(&weight(expert.gate()).t());
        gate.mapv(|x| x / (1.0 + (-x).exp())) * inputs.dot(&weight(expert.up()).t())
    }

    /// Of every linear of an expert, by name.
    fn linears(&self) -> BTreeMap<String, (f64, Seen)> {
        let routes = self.routes();
        let all: Vec<usize> = (0..self.inputs.nrows()).collect();
        let mut found = BTreeMap::new();
        for expert in self.block.experts() {
            let rows = match expert {
                Expert::Routed(number) => &routes[usize::from(number)],
                Expert::Shared => &all,
            };
            let mut add = |id: gptq_model::LinearId, of: &dyn Fn(&Array2<f64>) -> Array2<f64>| {
                let linear = self.block.linear(id);
                let few_tokens = rows.len() < linear.weight.cols() && rows.len() < all.len();
                let used = if few_tokens { &all } else { rows };
                let error = self.error(id, &of(&self.inputs.select(Axis(0), used)));
                let tokens = (expert != Expert::Shared).then_some(rows.len() as u64);
                found.insert(linear.name.clone(), (error, Seen { tokens, few_tokens }));
            };
            add(expert.gate(), &Clone::clone);
            add(expert.up(), &Clone::clone);
            add(expert.down(), &|inputs| self.activations(expert, inputs));
        }
        found
    }
}

/// Holds what was recorded of a block's experts against the definition; whether some saw too few tokens.
fn assert_errors(source: &Checkpoint, windows: usize, out: &Path) -> Vec<bool> {
    let calibration = calibration(windows);
    let spec = spec(Recipe::AutoGptq);
    let job = QuantizeJob { strict: false, ..job(source, &calibration, spec, out) };
    let job = QuantizeJob { device: Device::Cpu, ..job };
    let Made { sealed, report, .. } = make(&job, &Silent).unwrap().unwrap();
    let file = Checkpoint::open(&sealed.publish().unwrap().dir).unwrap();
    let model = Model::new(&file, Device::Cpu, SourcePrecision::Stored, 48).unwrap();
    let windows: Vec<u32> = calibration.windows.concat();
    let mut hidden = model.embed(&windows).unwrap();
    let mut short = Vec::new();
    for index in 0..model.config().num_hidden_layers {
        let block = model.load_block(index).unwrap();
        if block.mixture().is_some() {
            let ropes = model.ropes(48);
            let mut hidden = hidden.clone();
            let device = &Device::Cpu;
            let heads = block.stage_input(device, Stage::Output, &hidden, ropes, 48).unwrap();
            block.stage_output(device, Stage::Output, &heads, &mut hidden).unwrap();
            let inputs = block.stage_input(device, Stage::GateUp, &hidden, ropes, 48).unwrap();
            let inputs = wide(&inputs.to_host().unwrap());
            let of = Reference { source, block: &block, inputs, damp: 0.01 }.linears();
            let recorded = &report.blocks[index].linears;
            let recorded: BTreeMap<_, _> = recorded.iter().map(|l| (&l.name, l)).collect();
            for (name, (error, seen)) in of {
                let found = recorded[&name];
                let of_run = Seen { tokens: found.tokens, few_tokens: found.few_tokens };
                assert_eq!(of_run.few_tokens, seen.few_tokens, "{name}");
                assert_eq!(of_run.tokens.is_some(), seen.tokens.is_some(), "{name}");
                // The run's router computes in f32: of two experts that are next to equal it may take the other.
                let apart = of_run.tokens.zip(seen.tokens).map_or(0, |(a, b)| a.abs_diff(b));
                assert!(apart <= 2, "{name}: {of_run:?}, {seen:?}");
                let ratio = found.relative_error.unwrap() / error;
                assert!((ratio - 1.0).abs() < 5e-3, "{name}: {ratio}");
                short.push(seen.few_tokens);
            }
        }
        block.forward(&Device::Cpu, &mut hidden, model.ropes(48), 48).unwrap();
    }
    let counted = short.iter().filter(|&&few| few).count();
    assert_eq!(report.few_tokens as usize, counted);
    short
}

#[test]
fn errors_of_experts_are_those_of_the_tokens_routed_to_them() {
    for name in ["mixtral", "qwen3-moe", "qwen2-moe"] {
        let folder = tempfile::tempdir().unwrap();
        family_models::assemble(folder.path(), name);
        let source = Checkpoint::open(folder.path()).unwrap();
        let many = assert_errors(&source, 90, &folder.path().join("many"));
        assert!(many.iter().any(|few| !few), "{name}");
        // 96 tokens, of which an expert with 64 inputs sees fewer.
        let few = assert_errors(&source, 2, &folder.path().join("few"));
        assert!(few.iter().any(|few| *few), "{name}");
    }
}

/// An expert that no token is routed to: where one feature of all states is large, a router may forbid it.
#[test]
fn an_expert_without_tokens_is_calibrated_on_all() {
    let folder = tempfile::tempdir().unwrap();
    let source = changed(folder.path(), "mixtral", |name, values| {
        let rows = values.chunks_exact_mut(64);
        if name == "model.embed_tokens.weight" {
            rows.for_each(|row| row[0] = 8.0);
        } else if name.ends_with("gate.weight") {
            rows.enumerate()
                .for_each(|(expert, row)| row[0] = if expert == 2 { -1000.0 } else { 0.0 });
        }
    });
    let out = folder.path().join("out");
    let short = assert_errors(&source, 30, &out);
    assert!(short.iter().any(|few| *few));
    let report = BranchReport::read(&out).unwrap();
    let starved = report.linears().filter(|l| l.tokens == Some(0));
    let names: Vec<&str> = starved.map(|linear| linear.name.as_str()).collect();
    assert_eq!(names.len(), 6, "{names:?}");
    assert!(names.iter().all(|name| name.contains("experts.2.")), "{names:?}");
}

/// The same job leaves the same bytes.
#[test]
fn experts_are_made_alike_twice() {
    let folder = tempfile::tempdir().unwrap();
    family_models::assemble(folder.path(), "olmoe");
    let source = Checkpoint::open(folder.path()).unwrap();
    let calibration = calibration(20);
    let made = |out: &str| {
        let spec = QuantSpec::new(3, Some(32), true, 0.03, Recipe::Best);
        let out = folder.path().join(out);
        let job = QuantizeJob { strict: false, ..job(&source, &calibration, spec, &out) };
        let dir = make(&job, &Silent).unwrap().unwrap().sealed.publish().unwrap().dir;
        ["model.safetensors", REPORT_FILE].map(|file| fs::read(dir.join(file)).unwrap())
    };
    assert!(made("one") == made("two"));
}
