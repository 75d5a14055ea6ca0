//! `gptq verify --base` on models of many blocks: its memory is that of a few linears, and its numbers
//! do not depend on how many threads there are.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use safetensors::Dtype;
use util::{Noise, TinyLlama, Weights, Workdir, words};

const HIDDEN: usize = 1024;
const MLP: usize = 4096;
const BLOCKS: usize = 4;
/// A block in f32.
const BLOCK: u64 = 4 * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP) as u64;

/// A model of some blocks, in 16 bits.
fn model_of(dir: &Path, blocks: usize, [hidden, mlp]: [usize; 2]) {
    let mut model = TinyLlama::new();
    for (key, value) in
        [("hidden_size", hidden), ("intermediate_size", mlp), ("num_hidden_layers", blocks)]
    {
        model.config[key] = value.into();
    }
    model.tensors.clear();
    let mut noise = Noise::new(3);
    let mut add = |name: String, shape: &[usize]| {
        let one = shape.len() == 1;
        let values =
            (0..shape.iter().product()).map(|_| if one { 1.0 } else { 0.1 * noise.next() });
        let (values, shape) = (values.collect(), shape.to_vec());
        model.tensors.insert(name, Weights { dtype: Dtype::BF16, shape, values });
    };
    for name in ["model.embed_tokens", "lm_head"] {
        add(format!("{name}.weight"), &[64, hidden]);
    }
    add("model.norm.weight".to_owned(), &[hidden]);
    for block in 0..blocks {
        for (name, shape) in [
            ("self_attn.q_proj", [hidden, hidden]),
            ("self_attn.k_proj", [hidden / 2, hidden]),
            ("self_attn.v_proj", [hidden / 2, hidden]),
            ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.gate_proj", [mlp, hidden]),
            ("mlp.up_proj", [mlp, hidden]),
            ("mlp.down_proj", [hidden, mlp]),
        ] {
            add(format!("model.layers.{block}.{name}.weight"), &shape);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{block}.{name}.weight"), &[hidden]);
        }
    }
    model.write(dir);
}

/// Peak memory of a command that succeeds, in bytes: what the system says of it until it is gone.
fn peak(dir: &Workdir, args: &[&str]) -> u64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(args)
        .current_dir(dir.path(""))
        // Few threads, so that allocators keep no more than their arenas' worth of freed memory.
        .envs([("RAYON_NUM_THREADS", "2"), ("MALLOC_ARENA_MAX", "1")])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        peak = peak.max(1024 * kilobytes.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{args:?}: {status}");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn memory_is_that_of_a_few_linears() {
    let dir = Workdir::new();
    model_of(&dir.path("model"), BLOCKS, [HIDDEN, MLP]);
    let quantize = ["quantize", "model", "--out", "q", "--recipe=rtn", "--group-size=128", "-q"];
    dir.gptq(&quantize).ok();
    // What any command takes, tables of the kernels' threads and all.
    let least = peak(&dir, &["verify", "q", "-q"]);
    let most = peak(&dir, &["verify", "q", "--base", "model", "-q"]);
    println!("{most} bytes, {least} without a base; a block has {BLOCK} in f32");
    assert!(most < least + BLOCK, "{most}, {least}, {BLOCK}");
}

#[test]
fn numbers_do_not_depend_on_the_number_of_threads() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(400));
    // Five bands of rows, the last one short.
    model_of(&dir.path("model"), 2, [128, 288]);
    for recipe in ["rtn", "autogptq", "best"] {
        let _ = fs::remove_dir_all(dir.path("q"));
        let command = format!(
            "quantize model --out q --recipe {recipe} --group-size 32 --calib-dataset text.txt \
             --windows 4 --seq-len 48 --device cpu -q"
        );
        dir.gptq(&command.split_whitespace().collect::<Vec<_>>()).ok();
        let told = |threads| {
            let args = ["verify", "q", "--base", "model", "--json", "-q"];
            dir.gptq_env(&args, &[("RAYON_NUM_THREADS", threads)]).ok().to_owned()
        };
        let alone = told("1");
        assert!(alone.contains("weight_error"), "{alone}");
        for threads in ["2", "5"] {
            assert_eq!(told(threads), alone, "{recipe}, {threads} threads");
        }
    }
}
