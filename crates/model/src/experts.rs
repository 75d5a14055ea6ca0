//! Mixtures of experts: which tokens go through which expert, and what these add to them.
//!
//! A router's choice depends on the normed states and on its own weights, never on the experts: it is made once a
//! block, on the host, and is the same before and after the experts are quantized. An expert's part is then that
//! of a small MLP over the rows of its tokens ([`Block::expert_input`], [`Block::expert_activation`],
//! [`Block::expert_output`]), and the block's output is what all of them add, in the order of
//! [`Block::experts`].

use gptq_checkpoint::{Expert, Experts, Router, Scores};
use gptq_compute::{Device, Tensor};
use ndarray::{Array2, ArrayView1, Axis};
use rayon::prelude::*;

use crate::block::{Block, Linear};
use crate::error::Result;
use crate::forward::Weight;
use crate::stage::{Reading, Stage};

/// Tokens that one task routes.
const TOKENS_PER_TASK: usize = 64;
/// What transformers adds to a sum that weights are divided by, so that it is never 0.
const LEAST_SUM: f32 = 1e-20;

/// What routes the tokens of a block to its experts.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// The experts, and how they are chosen.
    pub experts: Experts,
    /// Weights of the router, `[experts, hidden]`, on the block's device.
    pub router: Tensor,
    /// What is added to the scores of experts while they are chosen.
    pub correction: Option<Vec<f32>>,
    /// Weights of the shared expert's own gate, `[1, hidden]`.
    pub shared_gate: Option<Tensor>,
}

/// Which tokens go through which expert, and what the outputs are multiplied by.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// Of each expert by its number.
    routed: Vec<Share>,
    /// Of the shared expert, where there is one.
    shared: Option<Share>,
}

/// The tokens of an expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// Rows of the normed states, ascending.
    pub rows: Vec<u32>,
    /// What the expert's outputs are multiplied by, one for each row; none where that is 1 for all.
    pub weights: Option<Vec<f32>>,
}

impl Routes {
    /// The tokens of an expert.
    ///
    /// # Panics
    /// For an expert that the block does not have.
    #[must_use]
    pub fn share(&self, expert: Expert) -> &Share {
        match expert {
            Expert::Routed(number) => &self.routed[usize::from(number)],
            Expert::Shared => match &self.shared {
                Some(share) => share,
                None => panic!("the block has no shared expert"),
            },
        }
    }

    /// How many tokens go through an expert.
    ///
    /// # Panics
    /// As [`Self::share`].
    #[must_use]
    pub fn tokens(&self, expert: Expert) -> usize {
        self.share(expert).rows.len()
    }
}

impl<W> Block<W> {
    /// The experts, in the order in which what they give is added: by number, the shared one last. None in a
    /// block that has one MLP for all tokens.
    pub fn experts(&self) -> impl Iterator<Item = Expert> + use<W> {
        self.mixture()
            .into_iter()
            .flat_map(|mixture| mixture.experts.all())
            .collect::<Vec<_>>()
            .into_iter()
    }
}

impl<W: Weight> Block<W> {
    /// Sends tokens to experts: `input` are the normed states that gate and up read, `[tokens, hidden]`.
    ///
    /// Products are f32 on every device, as are scores. Among equal scores the expert of the lowest number is
    /// taken; transformers leaves that open.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// For a block without experts.
    pub fn routes(&self, device: &Device, input: &Tensor) -> Result<Routes> {
        let Some(mixture) = self.mixture() else {
            panic!("block {} has no experts", self.index());
        };
        let products = device.logits(input, &mixture.router)?.to_host()?;
        let shared = match &mixture.shared_gate {
            Some(gate) => {
                let products = device.logits(input, gate)?.to_host()?;
                Some(products.iter().map(|&x| sigmoid(x)).collect())
            }
            None => None,
        };
        let all = || (0..input.rows() as u32).collect();
        Ok(Routes {
            routed: routed(&products, &mixture.experts, mixture.correction.as_deref()),
            shared: mixture.experts.shared.map(|_| Share { rows: all(), weights: shared }),
        })
    }

    /// The rows of `input` that an expert reads, as [`Self::routes`] has them; `None` where no token goes through
    /// it.
    ///
    /// # Errors
    /// Those of the device.
    pub fn expert_input(
        &self,
        device: &Device,
        expert: Expert,
        routes: &Routes,
        input: &Tensor,
    ) -> Result<Option<Tensor>> {
        let rows = &routes.share(expert).rows;
        match expert {
            _ if rows.is_empty() => Ok(None),
            Expert::Shared => Ok(Some(input.clone())),
            Expert::Routed(_) => Ok(Some(device.select_rows(input, rows)?)),
        }
    }

    /// Input of an expert's down: activation(gate(input)) · up(input), `[rows, width]`.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// For an expert that the block does not have.
    pub fn expert_activation(
        &self,
        device: &Device,
        expert: Expert,
        input: &Tensor,
    ) -> Result<Tensor> {
        let gate = self.project(device, input, expert.gate())?;
        let up = self.project(device, input, expert.up())?;
        Ok(device.gated(gate, &up, self.rule().activation)?)
    }

    /// Adds what an expert gives to the hidden states of its tokens: its weight there times down(activation).
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// As [`Self::expert_activation`].
    pub fn expert_output(
        &self,
        device: &Device,
        expert: Expert,
        routes: &Routes,
        activation: &Tensor,
        hidden: &mut Tensor,
    ) -> Result<()> {
        let Share { rows, weights } = routes.share(expert);
        let Some(weights) = weights else {
            let Linear { weight, .. } = self.linear(expert.down());
            return weight.multiply_add(device, activation, hidden);
        };
        let output = self.project(device, activation, expert.down())?;
        Ok(device.add_rows(hidden, rows, weights, &output)?)
    }

    /// Adds what all experts in order make of the normed states `input` to the hidden states; `look` is shown what
    /// each of them reads.
    ///
    /// # Errors
    /// Those of the device and of `look`.
    ///
    /// # Panics
    /// As [`Self::routes`].
    pub fn mixed(
        &self,
        device: &Device,
        input: &Tensor,
        hidden: &mut Tensor,
        look: &mut impl FnMut(Reading, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let routes = self.routes(device, input)?;
        for expert in self.experts() {
            let Some(rows) = self.expert_input(device, expert, &routes, input)? else { continue };
            let reading = |stage| Reading { stage, expert: Some(expert) };
            look(reading(Stage::GateUp), &rows)?;
            let activation = self.expert_activation(device, expert, &rows)?;
            look(reading(Stage::Down), &activation)?;
            self.expert_output(device, expert, &routes, &activation, hidden)?;
        }
        Ok(())
    }
}

/// The tokens of every expert, from the router's products `[tokens, experts]`.
fn routed(products: &Array2<f32>, experts: &Experts, correction: Option<&[f32]>) -> Vec<Share> {
    let rows: Vec<_> = products.axis_iter(Axis(0)).collect();
    let choices: Vec<Vec<(usize, f32)>> = rows
        .par_iter()
        .with_min_len(TOKENS_PER_TASK)
        .map(|row| choose(row, &experts.router, experts.per_token, correction))
        .collect();
    let mut shares = vec![(Vec::new(), Vec::new()); experts.count];
    for (row, chosen) in choices.into_iter().enumerate() {
        for (expert, weight) in chosen {
            shares[expert].0.push(row as u32);
            shares[expert].1.push(weight);
        }
    }
    let share = |(rows, weights)| Share { rows, weights: Some(weights) };
    shares.into_iter().map(share).collect()
}

/// The experts of one token with their weights, the best first.
fn choose(
    products: &ArrayView1<'_, f32>,
    router: &Router,
    per_token: usize,
    correction: Option<&[f32]>,
) -> Vec<(usize, f32)> {
    let scores = scores(products, router.scores);
    let corrected: Vec<f32> = match correction {
        Some(correction) => scores.iter().zip(correction).map(|(s, c)| s + c).collect(),
        None => scores.clone(),
    };
    let width = corrected.len() / router.groups;
    let mut among: Vec<usize> = match router.groups_per_token == router.groups {
        true => (0..corrected.len()).collect(),
        false => {
            let worth: Vec<f32> = corrected.chunks(width).map(two_best).collect();
            let mut groups = best((0..router.groups).collect(), &worth, router.groups_per_token);
            groups.sort_unstable();
            groups.into_iter().flat_map(|group| group * width..(group + 1) * width).collect()
        }
    };
    among = best(among, &corrected, per_token);
    let sum = match router.normalize {
        true => among.iter().map(|&expert| scores[expert]).sum::<f32>() + LEAST_SUM,
        false => 1.0,
    };
    let weight = |expert: usize| (expert, scores[expert] / sum * router.scale);
    among.into_iter().map(weight).collect()
}

/// Sum of the two largest values.
fn two_best(of: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; 2];
    for &value in of {
        if value > best[0] {
            best = [value, best[0]];
        } else if value > best[1] {
            best[1] = value;
        }
    }
    best[0] + best[1]
}

/// The `count` of these places, which ascend, that have the largest values, the largest first; of equal ones the
/// lowest.
fn best(mut places: Vec<usize>, values: &[f32], count: usize) -> Vec<usize> {
    places.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    places.truncate(count);
    places
}

fn scores(products: &ArrayView1<'_, f32>, scores: Scores) -> Vec<f32> {
    match scores {
        Scores::Sigmoid => products.iter().map(|&x| sigmoid(x)).collect(),
        Scores::Softmax => {
            let most = products.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut powers: Vec<f32> = products.iter().map(|x| (x - most).exp()).collect();
            let sum: f32 = powers.iter().sum();
            powers.iter_mut().for_each(|power| *power /= sum);
            powers
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use ndarray::aview1;

    use super::*;

    const PLAIN: Router = Router {
        scores: Scores::Softmax,
        normalize: false,
        scale: 1.0,
        groups: 1,
        groups_per_token: 1,
        corrected: false,
    };

    fn chosen(products: &[f32], router: &Router, count: usize, bias: Option<&[f32]>) -> Vec<usize> {
        choose(&aview1(products), router, count, bias)
            .into_iter()
            .map(|(expert, _)| expert)
            .collect()
    }

    #[test]
    fn the_best_are_taken_and_of_equal_ones_the_first() {
        assert_eq!(chosen(&[0.0, 2.0, -1.0, 3.0], &PLAIN, 2, None), [3, 1]);
        assert_eq!(chosen(&[1.0, 2.0, 2.0, 2.0], &PLAIN, 2, None), [1, 2]);
        let weights = choose(&aview1(&[0.0, 0.0, 2.0_f32.ln()]), &PLAIN, 2, None);
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(near(weights[0].1, 0.5) && near(weights[1].1, 0.25), "{weights:?}");
        let normal = Router { normalize: true, ..PLAIN };
        let weights = choose(&aview1(&[0.0, 0.0, 2.0_f32.ln()]), &normal, 2, None);
        assert!(near(weights[0].1, 2.0 / 3.0) && near(weights[1].1, 1.0 / 3.0), "{weights:?}");
    }

    #[test]
    fn a_correction_chooses_but_does_not_weigh() {
        let sigmoid = Router { scores: Scores::Sigmoid, scale: 2.0, ..PLAIN };
        let found = choose(&aview1(&[0.0, 0.0, 0.0]), &sigmoid, 1, Some(&[0.0, 0.5, 0.1]));
        assert_eq!(found, [(1, 1.0)]);
    }

    #[test]
    fn groups_are_worth_their_two_best() {
        let grouped = Router { scores: Scores::Sigmoid, groups: 2, groups_per_token: 1, ..PLAIN };
        // The best expert of all lies in the group whose second is bad.
        assert_eq!(chosen(&[9.0, -9.0, -9.0, 1.0, 1.0, 0.0], &grouped, 2, None), [3, 4]);
        assert_eq!(chosen(&[9.0, 1.0, -9.0, 1.0, 1.0, 0.0], &grouped, 2, None), [0, 1]);
        let both = Router { groups_per_token: 2, ..grouped };
        assert_eq!(chosen(&[9.0, -9.0, -9.0, 1.0, 1.0, 0.0], &both, 2, None), [0, 3]);
    }
}
