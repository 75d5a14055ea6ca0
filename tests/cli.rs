//! What the command prints, to the letter where it is stable: help, plans, inspections, mistakes.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use serde_json::{Value, json};
use util::{Outcome, TinyLlama, Workdir, repository, words};

const COMMANDS: [&str; 20] = [
    "quantize",
    "ppl",
    "generate",
    "chat",
    "serve",
    "eval",
    "plan",
    "inspect",
    "verify",
    "sweep",
    "report",
    "check",
    "card",
    "bench",
    "doctor",
    "fetch",
    "push",
    "schema",
    "completions",
    "man",
];

/// The bytes of each published branch's file, in the order of its model card, and the size that
/// the card prints.
const PUBLISHED: [(&str, u64, &str); 9] = [
    ("gptq-4bit-32g-actorder_True", 40_663_178_576, "40.66 GB"),
    ("gptq-4bit-64g-actorder_True", 37_989_309_744, "37.99 GB"),
    ("gptq-4bit-128g-actorder_True", 36_652_374_384, "36.65 GB"),
    ("gptq-4bit-128g-actorder_False", 36_652_374_384, "36.65 GB"),
    ("main", 35_332_232_296, "35.33 GB"),
    ("gptq-3bit-64g-actorder_True", 29_299_234_912, "29.30 GB"),
    ("gptq-3bit-128g-actorder_True", 28_029_146_264, "28.03 GB"),
    ("gptq-3bit-128g-actorder_False", 28_029_146_264, "28.03 GB"),
    ("gptq-3bit--1g-actorder_True", 26_775_011_200, "26.78 GB"),
];

/// config.json of stabilityai/StableBeluga2, a Llama 2 of 70B parameters.
const STABLEBELUGA2: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 8192,
  "initializer_range": 0.02,
  "intermediate_size": 28672,
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "num_attention_heads": 64,
  "num_hidden_layers": 80,
  "num_key_value_heads": 8,
  "pad_token_id": 0,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": null,
  "tie_word_embeddings": false,
  "torch_dtype": "float32",
  "transformers_version": "4.32.0.dev0",
  "use_cache": true,
  "vocab_size": 32000
}"#;

fn run(args: &[&str]) -> Outcome {
    Workdir::new().gptq(args)
}

/// A folder with a tiny model and a text.
fn tiny() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("text.txt", &words(400));
    dir
}

fn demo() -> String {
    repository().join("tests/fixtures/demo-llama").display().to_string()
}

#[test]
fn help_lists_the_commands() {
    assert_snapshot!(run(&["--help"]).snapshot(), @r"
    exit code 0
    --- stdout
    Quantize Llama models with GPTQ and prove the result

    Usage: gptq [OPTIONS] <COMMAND>

    Commands:
      quantize     Make one quantized checkpoint
      ppl          Measure the perplexity of a dense model or a GPTQ checkpoint
      generate     Make text with a dense model or a GPTQ checkpoint
      chat         Talk with a dense model or a GPTQ checkpoint
      serve        Answer OpenAI's HTTP interface with a dense model or a GPTQ checkpoint
      eval         Measure tasks of lm-evaluation-harness, and keep the results beside perplexity
      calib        Show what the windows of a calibration recipe hold, as a model's tokenizer sees them
      plan         Predict sizes, memory, work and time of every branch from config.json alone
      inspect      Show what a checkpoint holds
      verify       Check a GPTQ checkpoint in every respect, and say who loads it
      sweep        Make and measure every branch of a configuration
      report       Show what a sweep gave, as Markdown, JSON or a page with charts
      check        Compare a sweep's accuracy with accepted values, and fail where it is worse
      card         Write the model card, README.md, of every checkpoint in a folder
      bench        Measure this machine on a synthetic block
      doctor       Show what this machine has for GPU runs, and what it lacks
      fetch        Download a model or dataset from the Hugging Face Hub
      push         Upload checkpoints to the Hugging Face Hub, a branch each
      schema       Print the JSON Schema of what a command prints with --json
      completions  Print a script that completes gptq's command line in a shell
      man          Print the manual page of gptq or of a command, for man
      help         Print this message or the help of the given subcommand(s)

    Options:
      -q, --quiet        Print warnings, errors and results only
          --no-progress  Print lines instead of progress bars, on a terminal too
      -h, --help         Print help
      -V, --version      Print version
    ");
}

#[test]
fn every_command_explains_itself() {
    let listed = run(&["--help"]).stdout;
    for command in COMMANDS {
        let help = run(&[command, "--help"]);
        let usage = format!("Usage: gptq {command} ");
        assert!(help.ok().contains(&usage), "{}", help.stdout);
        assert!(help.stdout.contains("Example"), "{command} shows no example");
        // A server's results are its answers, which are JSON; the others print a program's own form.
        let forms = ["serve", "schema", "completions", "man"];
        let json = help.stdout.contains("--json") || forms.contains(&command);
        assert!(json, "{command} prints numbers for people only");
        assert!(help.stdout.lines().all(|line| line.len() <= 100), "{}", help.stdout);
        assert_eq!(run(&["help", command]).stdout, help.stdout);
        let summary = help.stdout.lines().next().unwrap();
        assert!(listed.contains(summary), "{command}: {summary}");
    }
    assert_snapshot!(run(&["inspect", "--help"]).snapshot(), @r"
    exit code 0
    --- stdout
    Show what a checkpoint holds

    Usage: gptq inspect [OPTIONS] <CHECKPOINT>

    Arguments:
      <CHECKPOINT>  Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION

    Options:
          --checksum     Read every value, and print how fast and their SHA-256: equal for equal
                         tensors, whatever files hold them
          --json         Print the result as JSON
      -q, --quiet        Print warnings, errors and results only
          --no-progress  Print lines instead of progress bars, on a terminal too
      -h, --help         Print help
      -V, --version      Print version

    Examples:
      gptq inspect ./SmolLM2-135M-4bit-128g
      gptq inspect ./SmolLM2-135M --checksum
    ");
}

#[test]
fn the_version_is_the_packages() {
    let version = concat!("gptq ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(run(&["--version"]).ok(), version);
}

#[test]
fn the_plan_of_stablebeluga2_is_what_was_published() {
    let dir = Workdir::new();
    dir.write("StableBeluga2/config.json", STABLEBELUGA2);
    let plan = ["plan", "StableBeluga2", "--config", "stablebeluga2"];
    let text = dir.gptq(&[&plan[..], &["--quiet"]].concat());
    let json = dir.gptq(&[&plan[..], &["--json"]].concat()).json();
    let lines: Vec<&str> = text.ok().lines().collect();
    for (i, (branch, bytes, size)) in PUBLISHED.into_iter().enumerate() {
        assert_eq!(json[i]["branch"], branch);
        assert_eq!(json[i]["file_bytes"], bytes);
        let line = lines[i + 1];
        assert!(line.starts_with(&format!("{branch} ")), "{line}");
        assert!(line.contains(&format!(" {bytes}  {size}")), "{line}");
    }
    assert_eq!(json.as_array().unwrap().len(), PUBLISHED.len());
    assert_eq!(text.stderr, "");
}

#[test]
fn the_repositorys_configuration_plans_the_same() {
    let dir = Workdir::new();
    dir.write("StableBeluga2/config.json", STABLEBELUGA2);
    let file = repository().join("configs/stablebeluga2.toml").display().to_string();
    let from_file = dir.gptq(&["plan", "StableBeluga2", "--config", &file, "--json"]).json();
    let built_in = ["plan", "StableBeluga2", "--config", "stablebeluga2", "--json"];
    assert_eq!(from_file, dir.gptq(&built_in).json());
}

/// Eighty blocks as the card was measured, and some seconds around them.
#[test]
fn plans_say_how_long_a_card_takes() {
    let dir = Workdir::new();
    dir.write("StableBeluga2/config.json", STABLEBELUGA2);
    let plan = |more: &[&str]| {
        dir.gptq(&[&["plan", "StableBeluga2", "--config", "stablebeluga2"], more].concat())
    };
    for (card, least, most, from) in [
        ("H100", 270.0, 285.0, "table"),
        ("h200", 270.0, 285.0, "table"),
        ("A100", 850.0, 900.0, "data-sheet"),
    ] {
        let args = ["--card", card, "--gpu-memory", "80GB", "--json"];
        for row in plan(&args).json().as_array().unwrap() {
            let seconds = row["seconds"].as_f64().unwrap();
            assert!(seconds > least && seconds < most, "{card}: {seconds}");
            assert_eq!(row["seconds_from"], from, "{card}");
        }
    }
    let text = plan(&["--card", "H100"]).ok().to_owned();
    assert_eq!(text.matches(" PFLOP  275 s\n").count(), PUBLISHED.len(), "{text}");
    assert!(
        text.ends_with("Time: of gptq quantize on H100, as such cards were measured.\n"),
        "{text}"
    );
    // Less memory than the model takes at full speed, by the card's own.
    let text = plan(&["--card", "rtx4090"]).ok().to_owned();
    assert!(text.contains("on a card of 24.00 GB") && text.contains("  ~27 min\n"), "{text}");
    let from = "Time: of gptq quantize on RTX4090, estimated from an H100's by data sheets.\n";
    assert!(text.ends_with(from), "{text}");
    plan(&["--card", "abacus"]).refused(&["--card", "H100, H200, A100, L40S, RTX4090, RTX3090"]);
    assert!(plan(&["--help"]).ok().contains("RTX4090"));
}

#[test]
fn the_demo_model_is_inspected() {
    let dir = Workdir::new();
    std::os::unix::fs::symlink(demo(), dir.path("demo")).unwrap();
    assert_snapshot!(dir.gptq(&["inspect", "demo"]).snapshot(), @r"
    exit code 0
    --- stdout
    folder      demo
    model       llama, rotary scaling default
    blocks      5
    width       256 hidden, 768 MLP
    heads       4 query, 2 key/value
    vocabulary  2048
    head        the embedding
    weights     8923.5 kB (8923544 bytes)
    tensors     47 (47 F16)
    quantized   no
    ");
    let json = dir.gptq(&["inspect", "demo", "--json"]).json();
    assert_eq!(json["quantization"], Value::Null);
    assert_eq!(json["dtypes"], json!({"F16": 47}));
    assert_eq!(json["file_bytes"], 8_923_544);
}

#[test]
fn a_run_is_summarized() {
    let dir = tiny();
    let calibration = ["--calib-dataset", "text.txt", "--windows", "4", "--seq-len", "32"];
    let fixed = ["quantize", "model", "--out", "out", "--device", "cpu", "--bits", "3"];
    let made = dir.gptq(&[&fixed[..], &calibration].concat());
    assert!(made.stdout.starts_with("out: 3 bits, group size 128, best, "), "{}", made.stdout);
    assert!(made.ok().ends_with("\nMeasure it: gptq ppl out\n"), "{}", made.stdout);
    assert!(made.stderr.contains("\nblock 2/2  relative error "), "{}", made.stderr);
    assert_snapshot!(dir.gptq(&["inspect", "out"]).snapshot(), @r"
    exit code 0
    --- stdout
    folder      out
    model       llama, rotary scaling default
    blocks      2
    width       64 hidden, 96 MLP
    heads       4 query, 2 key/value
    vocabulary  64
    head        a tensor of its own
    weights     52.6 kB (52616 bytes)
    tensors     63 (21 F16, 42 I32)
    quantized   3 bits, group size 128, act-order yes, damp 0.03
    linears     14 in 29.0 kB, 3.777 bits a weight
    ");
    let measure = ["ppl", "out", "--device", "cpu", "--dataset", "text.txt", "--seq-len", "32"];
    let measured = dir.gptq(&measure);
    assert!(measured.ok().starts_with("perplexity "), "{}", measured.stdout);
    assert!(
        measured.stdout.ends_with("(paper, text.txt, 12 windows × 32, 372 tokens scored, f32)\n")
    );
    // Nothing but results, warnings and errors.
    assert_eq!(
        dir.gptq(&[&measure[..], &["--quiet"]].concat()).stderr,
        "warning: the checkpoint was calibrated on this text, which flatters it\n"
    );
}

#[test]
fn a_run_without_calibration_prints_this() {
    let rounded = ["quantize", "model", "--out", "out", "--device", "cpu", "--recipe", "rtn"];
    let outcome = tiny().gptq(&rounded).snapshot();
    // The device's name counts this machine's threads.
    let threads = outcome.lines().find(|line| line.starts_with("device: cpu")).unwrap();
    assert_snapshot!(outcome.replace(threads, "device: cpu"), @r"
    exit code 0
    --- stdout
    out: 4 bits, group size 128, rtn, 60.2 kB in [N] s, peak memory [N] MB
    Measure it: gptq ppl out
    --- stderr
    device: cpu
    block 1/2  [N] s
    block 2/2  [N] s
    quantize: 2 blocks in [N] s
    ");
}

#[test]
fn every_command_speaks_json() {
    let dir = tiny();
    let calibration = ["--calib-dataset", "text.txt", "--windows", "4", "--seq-len", "32"];
    let cpu = ["--device", "cpu", "--json"];
    let fixed = ["quantize", "model", "--out", "out"];
    let quantize = dir.gptq(&[&fixed[..], &calibration, &cpu].concat()).json();
    for key in ["bits", "group_size", "act_order", "damp", "file_bytes", "seconds", "blocks"] {
        assert!(!quantize[key].is_null(), "{key}: {quantize}");
    }
    assert_eq!(quantize["blocks"].as_array().unwrap().len(), 2);
    assert_eq!(quantize["calibration"]["windows"], 4);
    let fixed = ["ppl", "out", "--base", "model", "--dataset", "text.txt", "--seq-len", "32"];
    let ppl = dir.gptq(&[&fixed[..], &cpu].concat()).json();
    for key in ["perplexity", "protocol", "dataset", "tokens", "windows", "seq_len", "dtype"] {
        assert!(!ppl[key].is_null(), "{key}: {ppl}");
    }
    assert!(ppl["base"]["kl"].is_number(), "{ppl}");
    let config = "model = \"model\"\ncalibration = \"card\"\nrecipe = \"autogptq\"\ndamp = 0.01\n\
        [evaluation]\ndataset = \"text.txt\"\nprotocol = \"paper\"\nseq_len = 32\n\
        [[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
        [[branch]]\nname = \"b\"\nbits = 3\ngroup_size = \"none\"\nact_order = false\n";
    dir.write("sweep.toml", config);
    let sweep = |only: &[&str], out: &str| {
        let fixed = ["sweep", "sweep.toml", "--out", out];
        dir.gptq(&[&fixed[..], &calibration, &cpu, only].concat()).json()
    };
    let all = sweep(&[], "all");
    assert_eq!(all["rows"].as_array().unwrap().len(), 2);
    // The text was calibrated on, and the report says so.
    assert_eq!(all["evaluation"]["contaminated"], true);
    let one = sweep(&["--only", "b"], "one");
    assert_eq!(one["rows"][0]["result"], all["rows"][1]["result"]);
    for args in
        [&["plan", "model", "--config", "sweep.toml", "--json"][..], &["inspect", "out", "--json"]]
    {
        let value = dir.gptq(args).json();
        assert!(value.is_object() || value.is_array(), "{args:?}: {value}");
    }
}

#[test]
fn doctor_says_what_is_missing_and_what_to_do() {
    let output = run(&["doctor", "--json"]).json();
    let checks = output["checks"].as_array().unwrap();
    let find = |what: &str| checks.iter().find(|check| check["what"] == what).unwrap();
    for library in ["libcuda.so.1", "libnvrtc.so.13", "libcublas.so.13", "libnccl.so.2"] {
        let check = find(library);
        assert!(check["found"].is_string() != check["advice"].is_string(), "{check}");
    }
    let host = find("host")["found"].as_str().unwrap().to_owned();
    let threads = std::thread::available_parallelism().unwrap();
    assert!(host.starts_with(&format!("{threads} threads, ")) && host.ends_with('B'), "{host}");
    let shown = run(&["doctor"]);
    assert!(shown.ok().contains("libnvrtc.so.13") && shown.stdout.contains(&host));
}

#[test]
fn what_bench_prints_adds_up() {
    let bench =
        ["bench", "--width", "tiny", "--windows", "1", "--seq-len", "64", "--recipe", "autogptq"];
    let made = run(&[&bench[..], &["--device", "cpu", "--json"]].concat()).json();
    let number = |value: &Value| value.as_f64().unwrap();
    let products = made["products"].as_array().unwrap();
    assert_eq!(products.len(), 3);
    for product in products {
        let sides: Vec<f64> =
            product["shape"].as_str().unwrap().split('×').map(|n| n.parse().unwrap()).collect();
        let operations = 2.0 * sides.iter().product::<f64>();
        assert_eq!(number(&product["operations"]), operations, "{product}");
        let rate = operations / number(&product["seconds"]);
        assert!((number(&product["rate"]) / rate - 1.0).abs() < 1e-6, "{product}");
        assert!(number(&product["fraction"]) > 0.0, "{product}");
    }
    let block = &made["block"];
    let stages = block["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|s| s["operation"].as_str().unwrap()).collect();
    assert_eq!(names, ["factor", "forward", "gram", "pack", "solve"]);
    let spent: f64 = stages.iter().map(|stage| number(&stage["seconds"])).sum();
    assert!(spent > 0.0 && spent <= number(&block["seconds"]), "{block}");
    // q, k, v, o, gate, up and down of 64 tokens, 2 operations a weight.
    let weights = 256.0 * (256.0 + 128.0 + 128.0 + 256.0 + 3.0 * 768.0);
    let forward = stages.iter().find(|stage| stage["operation"] == "forward").unwrap();
    assert!(number(&forward["operations"]) >= 2.0 * 64.0 * weights, "{forward}");
    assert_eq!(made["disk"], Value::Array(Vec::new()));
}

#[test]
fn bench_measures_how_fast_text_is_made() {
    let bench = ["bench", "--width", "tiny", "--decode", "--device", "cpu"];
    let made = run(&[&bench[..], &["--json"]].concat()).json();
    let read = made["read_rate"].as_f64().unwrap();
    // Four shapes and a model after two texts, in seven forms.
    let (products, steps) = (&made["products"], &made["steps"]);
    assert_eq!((products.as_array().unwrap().len(), steps.as_array().unwrap().len()), (28, 14));
    for product in products.as_array().unwrap() {
        let of = |key: &str| product[key].as_f64().unwrap();
        let values = product["shape"][0].as_f64().unwrap() * product["shape"][1].as_f64().unwrap();
        let bytes = of("rate") * of("seconds");
        // Codes, and five bytes a group of 128.
        let most = values * (of("bits") / 8.0 + 0.05);
        assert!(bytes > values * of("bits") / 8.0 * 0.999 && bytes < most, "{product}");
        assert!((of("fraction") * read / of("rate") - 1.0).abs() < 1e-9, "{product}");
    }
    for step in steps.as_array().unwrap() {
        assert!(step["tokens_per_second"].as_f64().unwrap() > 0.0, "{step}");
        assert_eq!(step["blocks"], 5);
    }
    let shown = run(&bench);
    assert!(shown.ok().contains("whole model"), "{}", shown.stdout);
    run(&["bench", "--decode", "--device", "cuda:0,1"]).refused(&["one device"]);
}

#[test]
fn bench_reads_writes_and_sums_a_block_beside_the_least_that_takes() {
    let dir = Workdir::new();
    fs::create_dir(dir.path("disk")).unwrap();
    let bench = |more: &[&str]| {
        let fixed = ["bench", "--width", "tiny", "--windows", "1", "--seq-len", "64"];
        dir.gptq(&[&fixed[..], &["--device", "cpu", "--recipe", "autogptq"], more].concat())
    };
    let made = bench(&["--blocks=disk", "--json"]).json();
    let names: Vec<&Value> =
        made["disk"].as_array().unwrap().iter().map(|t| &t["operation"]).collect();
    assert_eq!(names, ["read", "write", "hash"]);
    for transfer in made["disk"].as_array().unwrap() {
        let number = |key: &str| transfer[key].as_f64().unwrap();
        assert!(number("rate") > 0.0 && number("floor_rate") > 0.0, "{transfer}");
        let fraction = number("rate") / number("floor_rate");
        assert!((number("fraction") / fraction - 1.0).abs() < 1e-6, "{transfer}");
    }
    // Two bytes a weight are read, and half of one is written, both with a little beside.
    let weights = 256 * (256 + 128 + 128 + 256 + 3 * 768);
    let bytes = |at: usize| made["disk"][at]["bytes"].as_u64().unwrap();
    assert!((2 * weights..3 * weights).contains(&bytes(0)), "{made}");
    assert!((weights / 2..weights).contains(&bytes(1)) && bytes(1) == bytes(2), "{made}");
    let text = bench(&["--blocks"]).ok().to_owned();
    assert!(text.contains("floor, GB/s") && text.contains("\nhash "), "{text}");
    // Nothing is left of either.
    let left = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!((left(&dir.path("disk")), left(&dir.path("."))), (0, 1));
    bench(&["--blocks=/proc/nowhere"]).refused(&["/proc/nowhere"]);
}

#[test]
fn mistyped_commands_are_the_users() {
    assert_snapshot!(run(&["frobnicate"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: unrecognized subcommand 'frobnicate'

    Usage: gptq [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["quantize", "model"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: the following required arguments were not provided:
      --out <DIR>

    Usage: gptq quantize --out <DIR> <MODEL>

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["quantize", "m", "--out", "o", "--group-size", "0"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: invalid value '0' for '--group-size <N|none>': Group size 0 is not supported; use a number from 1 to 268435456, or none (as files say it, -1) for one scale a row

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["ppl", "m", "--protocol", "mine"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: invalid value 'mine' for '--protocol <PROTOCOL>': Protocol `mine` is unknown: it is none of paper, llama-cpp and strided

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["ppl", "m", "--dataset", "a:b"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: invalid value 'a:b' for '--dataset <DATASET>': Dataset `a:b` cannot be read: it is not three parts with `:` between them, nor a file of a known kind; a dataset is `ORG/NAME:CONFIG:SPLIT`, or the path of a .txt, .jsonl or .parquet file, or builtin:addresses

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["ppl", "m", "--device", "tpu"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: invalid value 'tpu' for '--device <DEVICE>': use cpu, cuda, cuda:N, cuda:N,M,… or cuda:all

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["ppl", "m", "--device", "cuda:0,0"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: invalid value 'cuda:0,0' for '--device <DEVICE>': GPU 0 is named twice

    For more information, try '--help'.
    ");
}

#[test]
fn values_that_no_branch_can_have_are_refused() {
    let dir = tiny();
    let quantize = |option: &[&str]| {
        dir.gptq(&[&["quantize", "model", "--out", "out", "--device", "cpu"], option].concat())
    };
    assert_snapshot!(quantize(&["--bits", "5"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: 5 bits are not supported
    hint: use 2, 3, 4 or 8
    ");
    assert_snapshot!(quantize(&["--damp", "1.5"]).snapshot(), @r"
    exit code 1
    --- stderr
    error: Damping 1.5 is not supported
    hint: use a number above 0 and below 1
    ");
    quantize(&["--group-size", "300000000"]).refused(&["300000000", "268435456", "none"]);
    quantize(&["--calib", "nope"]).refused(&["nope", "card", "wikitext2"]);
    quantize(&["--recipe", "magic"]).refused(&["magic", "autogptq", "rtn"]);
    quantize(&["--gpu-memory", "1GB"]).refused(&["--gpu-memory"]);
    quantize(&["--branch", "nain"]).refused(&["`nain`", "main", "gptq-4bit-32g-actorder_True"]);
    let demo = repository().join("configs/demo.toml").display().to_string();
    dir.gptq(&["sweep", &demo, "--only", "5bit"]).refused(&["`5bit`", "4bit-32g-act"]);
    dir.gptq(&["sweep", "nope.toml"]).refused(&["nope.toml"]);
    dir.write("bad.toml", "model = 1");
    dir.gptq(&["sweep", "bad.toml"]).refused(&["bad.toml"]);
}

#[test]
fn options_are_taken_as_other_programs_have_them() {
    let dir = tiny();
    for (i, options) in [
        ["--group-size", "-1", "--act-order", "false"],
        ["--groupsize", "none", "--desc-act", "false"],
        ["--wbits=4", "--group-size=-1", "--percdamp=0.01", "--act-order=false"],
    ]
    .iter()
    .enumerate()
    {
        let out = format!("out-{i}");
        let fixed = ["quantize", "model", "--out", &out, "--device=cpu", "--recipe=rtn", "--json"];
        let made = dir.gptq(&[&fixed[..], &options[..]].concat()).json();
        assert_eq!((&made["group_size"], &made["act_order"]), (&Value::Null, &json!(false)));
    }
}

#[test]
fn a_leading_tilde_is_the_home_folder() {
    let dir = tiny();
    let home = dir.path("home");
    std::fs::create_dir(&home).unwrap();
    let quantize = ["quantize", "model", "--out=~/made", "--recipe=rtn", "--device=cpu"];
    dir.gptq_env(&quantize, &[("HOME", home.to_str().unwrap())]).ok();
    assert!(home.join("made/config.json").is_file());
    dir.gptq(&quantize).refused(&["~/made", "HOME"]);
    assert!(!dir.path("~").exists());
}

#[test]
fn a_model_that_is_not_there_gets_a_hint() {
    for command in [&["inspect"][..], &["plan"], &["ppl", "--device=cpu", "--quiet"]] {
        run(&[command, &["org/name"]].concat()).refused(&["`org/name`", "local folder", "HF_HOME"]);
        run(&[command, &["./nowhere"]].concat()).refused(&["`./nowhere`"]);
    }
    let dir = Workdir::new();
    let cache = dir.path("cache").display().to_string();
    let found = dir.gptq_env(&["inspect", "org/name"], &[("HF_HOME", &cache)]);
    assert_snapshot!(found.snapshot(), @r"
    exit code 1
    --- stderr
    error: `org/name` at revision `main` is neither a local path nor in the Hub cache (looked in `[DIR]/cache/hub/models--org--name`)
    hint: download it with `gptq fetch org/name`, give a local folder, or set HF_HOME to a cache that holds it
    ");
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_without_the_hub_says_so() {
    for command in [&["fetch", "org/name"][..], &["push", "out", "--repo", "org/name"]] {
        run(command).refused(&["no Hub access", "--no-default-features"]);
    }
}

#[test]
fn hub_ids_are_found_in_the_cache() {
    let dir = Workdir::new();
    let repository = "cache/hub/models--org--name";
    dir.write(&format!("{repository}/refs/main"), "c0ffee");
    TinyLlama::new().write(&dir.path(&format!("{repository}/snapshots/c0ffee")));
    let cache = dir.path("cache").display().to_string();
    let shown = dir.gptq_env(&["inspect", "org/name", "--json"], &[("HF_HOME", &cache)]).json();
    assert_eq!(shown["hidden_size"], 64);
}

#[test]
fn a_closed_pipe_is_no_error() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["inspect", &demo()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
