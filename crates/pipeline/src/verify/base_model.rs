//! What the weights are computed with, against the base's: config.json and the tokenizer.
//!
//! A checkpoint carries both on from its base. A changed key leaves every tensor as it was and makes
//! another model of them. What is compared is what the files mean, not how they are spelt: absent keys
//! are their defaults, both forms of rotary settings are one. Keys that are compared elsewhere or
//! change nothing that is computed are left out: sizes ([`super::base::check_base`]), the activation
//! (there is one), whether the head is tied (the values of the head show it), the context, types.

use gptq_checkpoint::{
    CONFIG_FILE, Checkpoint, Experts, ModelConfig, Rope, RopeScaling, TOKENIZER_FILE,
};
use gptq_text::tokens::TextTokenizer;

use super::findings::{Check, Findings};
use super::other_parts;

/// Compares the configuration and the tokenizer with the base's.
pub(super) fn check(checkpoint: &Checkpoint, base: &Checkpoint, findings: &mut Findings) {
    findings.examine(Check::Model, 1);
    for (key, mine, theirs) in differences(checkpoint.config(), base.config()) {
        let message = format!("says {key} {mine}, but the base's says {theirs}");
        findings.add(Check::Model, CONFIG_FILE, message);
    }
    let mut differ = Vec::new();
    if base.config().wrapper().is_some() {
        other_parts::compare(checkpoint.config().raw(), base.config().raw(), &mut differ);
    }
    differ.into_iter().for_each(|how| findings.add(Check::Model, CONFIG_FILE, how));
    let has = |of: &Checkpoint| of.dir().join(TOKENIZER_FILE).is_file();
    if !(has(checkpoint) && has(base)) {
        return;
    }
    let open = |of: &Checkpoint| TextTokenizer::open(of.dir(), of.config().vocab_size);
    // What is wrong with the base's own shows where the base is used.
    let Ok(theirs) = open(base) else { return };
    findings.examine(Check::Model, 1);
    match open(checkpoint) {
        Ok(mine) => {
            if let Some(how) = mine.difference(&theirs) {
                findings.add(Check::Model, TOKENIZER_FILE, how);
            }
        }
        Err(error) => findings.add_error(Check::Model, TOKENIZER_FILE, error),
    }
}

/// Keys that make another model of the same tensors, with both values.
fn differences(mine: &ModelConfig, theirs: &ModelConfig) -> Vec<(&'static str, String, String)> {
    let mut differ = Vec::new();
    for (key, value) in KEYS {
        let (mine, theirs) = (value(mine), value(theirs));
        if mine != theirs {
            differ.push((key, mine, theirs));
        }
    }
    differ
}

type Told = fn(&ModelConfig) -> String;

/// What is compared, each as text that is equal where the computation is.
const KEYS: [(&str, Told); 14] = [
    ("model_type", |c| c.family.to_owned()),
    ("rms_norm_eps", |c| format!("{:?}", c.norm_eps)),
    ("rope_theta", |c| format!("{:?}", c.rope.theta)),
    ("rope_scaling", |c| scaling(&c.rope.scaling)),
    ("that of a head are rotated", |c| c.rope.dims.to_string()),
    ("for rotary settings of sliding blocks", |c| c.local_rope.as_ref().map_or_else(none, local)),
    ("sliding_window", |c| c.sliding_window().map_or_else(none, |w| w.to_string())),
    ("that attention slides in", |c| blocks(&c.sliding_blocks())),
    ("that there is no rotation in", |c| blocks(&unrotated(c))),
    ("for factors", |c| format!("{:?}", c.factors)),
    ("for caps on scores and logits", |c| {
        format!("{:?} and {:?}", c.attention_softcap, c.logit_softcap)
    }),
    ("for experts", |c| c.any_experts().map_or_else(none, |experts| routing(c, experts))),
    ("that there are norms of", |c| {
        list(c.block_norms(0).into_iter().map(|norm| norm.name.to_owned()))
    }),
    ("that there are biases of", |c| {
        let biased = c.block_linears(0).into_iter().filter(|linear| linear.bias);
        list(biased.map(|linear| linear.name.into_owned()))
    }),
];

fn none() -> String {
    "none".to_owned()
}

/// How tokens are routed, and in which blocks.
fn routing(config: &ModelConfig, experts: &Experts) -> String {
    let mixed = |&block: &usize| config.experts(block).is_some();
    let of: Vec<usize> = (0..config.num_hidden_layers).filter(mixed).collect();
    format!("{} a token by {:?} in {}", experts.per_token, experts.router, blocks(&of))
}

/// Base and stretch of other settings.
fn local(rope: &Rope) -> String {
    format!("base {:?}, scaling {}", rope.theta, scaling(&rope.scaling))
}

/// Blocks that do not rotate queries and keys.
fn unrotated(config: &ModelConfig) -> Vec<usize> {
    let plain = |&block: &usize| config.block_attention(block).rope.is_none();
    (0..config.num_hidden_layers).filter(plain).collect()
}

/// A factor of 1 stretches nothing.
fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::None => "none".to_owned(),
        RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } if *factor == 1.0 => {
            "none".to_owned()
        }
        RopeScaling::Linear { factor } => format!("linear, factor {factor}"),
        RopeScaling::Dynamic { factor, context } => {
            format!("dynamic, factor {factor}, from {context} tokens on")
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            format!(
                "llama3, factor {factor}, frequencies {low_freq_factor} to {high_freq_factor}, \
                 original context {original_context}"
            )
        }
        RopeScaling::Yarn(yarn) => format!("{yarn:?}"),
        RopeScaling::LongRope(long) => format!("{long:?}"),
    }
}

/// `blocks 0, 28-79`: what follows one another as its ends. Ascending.
fn blocks(of: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &block in of {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == block => *last = block,
            _ => runs.push((block, block)),
        }
    }
    let run = |(first, last): (usize, usize)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    };
    let word = if of.len() == 1 { "block" } else { "blocks" };
    match list(runs.into_iter().map(run)) {
        none if of.is_empty() => none,
        some => format!("{word} {some}"),
    }
}

fn list(of: impl Iterator<Item = String>) -> String {
    let of: Vec<String> = of.collect();
    if of.is_empty() { "none".to_owned() } else { of.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(extra: &str) -> ModelConfig {
        let text = format!(
            r#"{{"hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,
            "num_attention_heads":32,"num_key_value_heads":32,"vocab_size":96{extra}}}"#
        );
        let text = if extra.contains("model_type") {
            text
        } else {
            text.replacen('{', r#"{"model_type":"llama","#, 1)
        };
        ModelConfig::parse(&text, Path::new("config.json")).unwrap()
    }

    fn keys(mine: &str, theirs: &str) -> Vec<&'static str> {
        differences(&config(mine), &config(theirs)).into_iter().map(|(key, ..)| key).collect()
    }

    #[test]
    fn every_key_that_makes_another_model_is_named() {
        for (extra, key) in [
            (r#","rms_norm_eps":0.1"#, "rms_norm_eps"),
            (r#","rope_theta":500000"#, "rope_theta"),
            (r#","rope_scaling":{"type":"linear","factor":4.0}"#, "rope_scaling"),
            (r#","rope_parameters":{"rope_type":"dynamic","factor":4.0}"#, "rope_scaling"),
            (r#","attention_bias":true"#, "that there are biases of"),
            (r#","mlp_bias":true"#, "that there are biases of"),
            (r#","model_type":"mistral","sliding_window":null"#, "model_type"),
        ] {
            assert_eq!(keys(extra, ""), [key], "{extra}");
            assert_eq!(keys("", extra), [key], "{extra}");
        }
        let mistral = r#","model_type":"mistral""#;
        let short = r#","model_type":"mistral","sliding_window":8"#;
        assert_eq!(keys(short, mistral), ["sliding_window"]);
        assert_eq!(keys(short, ""), ["model_type", "sliding_window", "that attention slides in"]);
        let qwen = r#","model_type":"qwen2","use_sliding_window":true,"max_window_layers":"#;
        let (first, second) = (format!("{qwen}0"), format!("{qwen}1"));
        assert_eq!(keys(&first, &second), ["that attention slides in"]);
    }

    #[test]
    fn blocks_are_told_as_ranges() {
        for (of, told) in [
            ([].as_slice(), "none"),
            (&[3], "block 3"),
            (&[3, 4], "blocks 3-4"),
            (&[0, 2, 28, 29, 30], "blocks 0, 2, 28-30"),
        ] {
            assert_eq!(blocks(of), told);
        }
    }

    #[test]
    fn other_words_for_the_same_model_are_no_difference() {
        let llama3 = r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
            "high_freq_factor":4.0,"original_max_position_embeddings":512}"#;
        let scaled = format!(r#","rope_theta":10000.0,"rope_scaling":{llama3}"#);
        let newer = format!(r#","rope_parameters":{llama3}"#);
        let qwen = r#","model_type":"qwen2","use_sliding_window":true"#;
        let listed =
            r#","max_window_layers":28,"layer_types":["full_attention","sliding_attention"]"#;
        for (mine, theirs) in [
            ("", r#","rms_norm_eps":1e-6,"rope_theta":1e4,"attention_bias":false"#),
            ("", r#","rope_scaling":{"type":"linear","factor":1.0}"#),
            ("", r#","rope_scaling":null,"tie_word_embeddings":true,"torch_dtype":"float16""#),
            ("", r#","rope_parameters":{"rope_type":"default","rope_theta":10000}"#),
            ("", r#","max_position_embeddings":4096,"bos_token_id":1"#),
            (scaled.as_str(), newer.as_str()),
            (&format!(r#"{qwen},"max_window_layers":1"#), &format!("{qwen}{listed}")),
        ] {
            assert_eq!(keys(mine, theirs), [""; 0], "{mine}; {theirs}");
        }
    }
}
