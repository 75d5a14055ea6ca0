//! The experts of a mixture: how many there are, how a router chooses among them, and their names.
//!
//! A block with experts has many MLPs in the place of one. A router gives every token a few of them, and the
//! block adds what these make of it, each times a weight. Some families have one more MLP that every token goes
//! through, the shared expert.

use crate::{DenseId, DenseShape, Expert, LinearId, LinearShape};

/// The mixture of experts that blocks of a model have.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// Experts that the router chooses from.
    pub count: usize,
    /// Experts that a token goes through, the shared one aside.
    pub per_token: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// The expert that every token goes through.
    pub shared: Option<SharedExpert>,
    /// How experts are chosen and weighed.
    pub router: Router,
    pub(crate) names: &'static ExpertNames,
    /// Whether each block has them.
    pub(crate) blocks: Vec<bool>,
}

/// The expert that every token goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpert {
    /// Its width.
    pub intermediate_size: usize,
    /// What it gives is multiplied by the sigmoid of one more product of its inputs.
    pub gated: bool,
}

/// How experts are chosen and weighed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// What becomes of its products.
    pub scores: Scores,
    /// The weights of a token's experts are divided by their sum.
    pub normalize: bool,
    /// What weights are multiplied by at last.
    pub scale: f32,
    /// Experts lie in so many groups, one after the other.
    pub groups: usize,
    /// A token's experts are of so many groups: those whose two best scores have the largest sums.
    pub groups_per_token: usize,
    /// A bias of each expert is added to its score while experts are chosen, not to its weight.
    pub corrected: bool,
}

/// What the products of a router become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// Probabilities of all experts.
    Softmax,
    /// Each a number from 0 to 1 by itself.
    Sigmoid,
}

/// What the parts of a mixture are called.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ExpertNames {
    /// What they are in, inside the block.
    pub(crate) module: &'static str,
    /// Gate, up and down of an expert.
    pub(crate) leaves: [&'static str; 3],
    /// The shared expert, inside of the module.
    pub(crate) shared: &'static str,
}

/// The usual names.
pub(crate) const LLAMA_NAMES: ExpertNames = ExpertNames {
    module: "mlp",
    leaves: ["gate_proj", "up_proj", "down_proj"],
    shared: "shared_expert",
};

impl ExpertNames {
    /// Name of a linear inside its block; those of other parts than experts have their own.
    pub(crate) fn linear(&self, id: LinearId) -> String {
        let Self { module, leaves: [gate, up, down], shared } = self;
        match id {
            LinearId::ExpertGate(expert) => format!("{module}.experts.{expert}.{gate}"),
            LinearId::ExpertUp(expert) => format!("{module}.experts.{expert}.{up}"),
            LinearId::ExpertDown(expert) => format!("{module}.experts.{expert}.{down}"),
            LinearId::SharedGate => format!("{module}.{shared}.{gate}"),
            LinearId::SharedUp => format!("{module}.{shared}.{up}"),
            LinearId::SharedDown => format!("{module}.{shared}.{down}"),
            other => other.name().into_owned(),
        }
    }
}

impl Experts {
    /// Whether a block has them.
    pub(crate) fn are_in(&self, block: usize) -> bool {
        self.blocks.get(block).copied().unwrap_or(false)
    }

    /// All experts, in the order in which what they give is added: by number, the shared one last.
    pub fn all(&self) -> impl Iterator<Item = Expert> + use<> {
        let shared = self.shared.map(|_| Expert::Shared);
        (0..self.count as u16).map(Expert::Routed).chain(shared)
    }

    /// Width of an expert.
    #[must_use]
    pub fn width(&self, expert: Expert) -> usize {
        match (expert, self.shared) {
            (Expert::Shared, Some(shared)) => shared.intermediate_size,
            _ => self.intermediate_size,
        }
    }

    /// The linears of all experts.
    pub(crate) fn linears(&self, hidden: usize) -> impl Iterator<Item = LinearShape> {
        self.all().flat_map(move |expert| {
            [expert.gate(), expert.up(), expert.down()].map(|id| self.linear(hidden, id, expert))
        })
    }

    fn linear(&self, hidden: usize, id: LinearId, of: Expert) -> LinearShape {
        let width = self.width(of);
        let down = id == of.down();
        let (in_features, out_features) = if down { (width, hidden) } else { (hidden, width) };
        LinearShape {
            id,
            name: self.names.linear(id).into(),
            in_features,
            out_features,
            bias: false,
        }
    }

    /// The linear of this name inside the block.
    pub(crate) fn linear_named(&self, hidden: usize, name: &str) -> Option<LinearShape> {
        let part = name.strip_prefix(self.names.module)?.strip_prefix('.')?;
        let expert = match part.strip_prefix("experts.") {
            Some(rest) => {
                let number: u16 = rest.split_once('.')?.0.parse().ok()?;
                Some(Expert::Routed(number)).filter(|_| usize::from(number) < self.count)?
            }
            None => self.shared.map(|_| Expert::Shared)?,
        };
        let ids = [expert.gate(), expert.up(), expert.down()];
        ids.map(|id| self.linear(hidden, id, expert)).into_iter().find(|linear| linear.name == name)
    }

    /// What routes tokens.
    pub(crate) fn dense(&self, hidden: usize) -> Vec<DenseShape> {
        let ExpertNames { module, shared, .. } = self.names;
        let dense = |id, name, shape, exact| DenseShape { id, name, shape, exact };
        let router = format!("{module}.gate.weight");
        let mut of = vec![dense(DenseId::Router, router, vec![self.count, hidden], false)];
        if self.router.corrected {
            let name = format!("{module}.gate.e_score_correction_bias");
            of.push(dense(DenseId::Correction, name, vec![self.count], true));
        }
        if self.shared.is_some_and(|shared| shared.gated) {
            let name = format!("{module}.{shared}_gate.weight");
            of.push(dense(DenseId::SharedGate, name, vec![1, hidden], false));
        }
        of
    }
}
