//! What is made of a sweep: its report, its accuracy gate and its model cards, through the binary.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use util::{TinyLlama, Workdir, listing, words};

const CONFIG: &str = "model = \"model\"\ncalibration = \"calib.toml\"\nrecipe = \"autogptq\"\n\
    damp = 0.01\ncard = \"facts.toml\"\n\
    [evaluation]\ndataset = \"text.txt\"\nprotocol = \"paper\"\nseq_len = 32\n\
    [[branch]]\nname = \"4bit-32g\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
    [[branch]]\nname = \"3bit\"\nbits = 3\ngroup_size = \"none\"\nact_order = false\n";
const CALIBRATION: &str = "name = \"own\"\ndataset = \"other.txt\"\njoin = \"card\"\nwindows = 4\n\
    seq_len = 32\nseed = 0\n";
const FACTS: &str = "name = \"Tiny\"\nrepository = \"org/tiny-GPTQ\"\nauthor = \"nobody\"\n\
    license = \"mit\"\nlanguages = [\"en\"]\ndescription = \"Says nothing.\"\n";

/// A folder with a sweep of two branches in `branches`.
fn swept() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("text.txt", &words(400));
    dir.write("other.txt", &words(300).replace("w2", "w3"));
    dir.write("sweep.toml", CONFIG);
    dir.write("calib.toml", CALIBRATION);
    dir.write("facts.toml", FACTS);
    dir.gptq(&["sweep", "sweep.toml", "--out", "branches", "--device", "cpu"]).ok();
    dir
}

/// Changes a branch's report as another run would.
fn edit(dir: &Workdir, branch: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.path("branches").join(branch).join("gptq_report.json");
    let mut report: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut report);
    fs::write(path, report.to_string()).unwrap();
}

fn scale(value: &mut Value, factor: f64) {
    *value = json!(value.as_f64().unwrap() * factor);
}

/// How a table is changed.
type Change<'a, T> = &'a dyn Fn(&mut T);

#[test]
fn a_sweep_is_reported_as_markdown_json_and_a_page() {
    let dir = swept();
    let shown = dir.gptq(&["report", "branches", "--html", "report.html"]);
    assert!(shown.ok().starts_with("# `model`: 2 branches\n"), "{}", shown.stdout);
    assert!(shown.stdout.contains("\n| `3bit` | 3 | none | no | "), "{}", shown.stdout);
    assert_eq!(shown.stderr, "wrote report.html\n");
    let page = fs::read_to_string(dir.path("report.html")).unwrap();
    assert!(page.contains("4bit-32g") && page.contains("Where the error is"));
    // The same bytes from the same reports.
    dir.gptq(&["report", "branches/3bit", "branches/4bit-32g", "--html", "again.html"]).ok();
    assert_eq!(fs::read_to_string(dir.path("again.html")).unwrap(), page);

    let report = dir.gptq(&["report", "branches", "--json"]);
    let branches = report.json()["branches"].as_array().unwrap().clone();
    assert_eq!(branches.iter().map(|b| &b["branch"]).collect::<Vec<_>>(), ["4bit-32g", "3bit"]);
    // What was printed can be read back, as a report and as the previous one.
    dir.write("old.json", report.ok());
    assert_eq!(dir.gptq(&["report", "old.json", "--json"]).ok(), report.stdout);
    edit(&dir, "3bit", |r| scale(&mut r["evaluations"][0]["perplexity"], 1.1));
    let since = dir.gptq(&["report", "branches", "--previous", "old.json"]);
    let row = since.ok().lines().find(|line| line.starts_with("| `3bit`")).unwrap();
    assert!(row.contains("(+10.0 %) | 0.0000 (0.0 %) | same |"), "{row}");
    let since = dir.gptq(&["report", "branches", "--previous", "old.json", "--json"]).json();
    let change = &since["changes"][1];
    assert_eq!(
        (&change["branch"], &change["change"]["status"]),
        (&json!("3bit"), &json!("compared"))
    );
    assert!((change["change"]["relative_perplexity"].as_f64().unwrap() - 0.1).abs() < 1e-9);
}

/// A page goes to where its name leads, whatever is there; a name is never taken from a device or pipe.
#[cfg(target_os = "linux")]
#[test]
fn a_page_is_written_into_what_is_no_regular_file() {
    use std::os::unix::fs::{FileTypeExt, symlink};

    let dir = swept();
    let html = |file: &str| dir.gptq(&["report", "branches", "--html", file]);
    let page = |text: &str| assert!(text.trim_start().starts_with("<!doctype html>"), "{text}");
    // What is printed follows.
    let both = html("/dev/stdout");
    page(both.ok());
    assert!(both.stdout.ends_with(html("/dev/null").ok()), "{}", both.stdout);
    html("/dev/full").refused(&["/dev/full"]);
    for device in ["/dev/null", "/dev/full"] {
        assert!(fs::symlink_metadata(device).unwrap().file_type().is_char_device(), "{device}");
    }
    let mkfifo = std::process::Command::new("mkfifo").arg(dir.path("pipe")).status().unwrap();
    assert!(mkfifo.success());
    let pipe = dir.path("pipe");
    let reading = std::thread::spawn(move || fs::read_to_string(pipe).unwrap());
    html("pipe").ok();
    page(&reading.join().unwrap());
    assert!(fs::symlink_metadata(dir.path("pipe")).unwrap().file_type().is_fifo());
    dir.write("there/page.html", "old");
    symlink("there/page.html", dir.path("link.html")).unwrap();
    html("link.html").ok();
    page(&fs::read_to_string(dir.path("there/page.html")).unwrap());
    assert!(fs::symlink_metadata(dir.path("link.html")).unwrap().is_symlink());
}

#[test]
fn a_report_of_nothing_is_refused() {
    let dir = Workdir::new();
    fs::create_dir(dir.path("empty")).unwrap();
    dir.write("notes.json", "{}");
    dir.gptq(&["report", "empty"]).refused(&["empty", "gptq_report.json"]);
    dir.gptq(&["report", "nowhere"]).refused(&["nowhere"]);
    dir.gptq(&["report", "notes.json"]).refused(&["notes.json", "format"]);
    dir.gptq(&["check", "empty", "--baseline", "b.json"]).refused(&["empty"]);
    dir.gptq(&["card", "empty", "--facts", "f.toml"]).refused(&["f.toml"]);
}

#[test]
fn the_gate_opens_for_what_was_accepted_and_closes_for_worse() {
    let dir = swept();
    let check = |args: &[&str]| {
        dir.gptq(&[&["check", "branches", "--baseline", "baseline.json"], args].concat())
    };
    check(&[]).refused(&["baseline.json", "--update"]);
    check(&["--update"]).ok();
    let baseline = fs::read_to_string(dir.path("baseline.json")).unwrap();
    assert!(check(&[]).ok().contains("4bit-32g  kl"), "{}", check(&[]).stdout);
    assert_eq!(check(&["--json"]).json()["passed"], true);

    edit(&dir, "3bit", |r| scale(&mut r["evaluations"][0]["kl"], 1.06));
    let worse = check(&[]);
    assert_eq!(worse.code, 1);
    let row = worse.stdout.lines().find(|line| line.contains("WORSE")).unwrap();
    assert!(row.starts_with("3bit") && row.contains(" kl ") && row.contains("+6.00 %"), "{row}");
    assert!(worse.stderr.contains("1 of 7 values fail"), "{}", worse.stderr);
    assert_eq!(check(&["--json"]).code, 1);
    // The other branch alone passes; so does this one once it is accepted.
    dir.gptq(&["check", "branches/4bit-32g", "--baseline", "baseline.json"]).ok();
    assert_eq!(fs::read_to_string(dir.path("baseline.json")).unwrap(), baseline);
    check(&["--update"]).ok();
    assert!(check(&[]).stdout.contains("same"));

    edit(&dir, "3bit", |r| scale(&mut r["evaluations"][0]["kl"], 0.9));
    let better = check(&[]);
    assert!(better.ok().contains("improved") && better.stderr.contains("--update"));
    edit(&dir, "3bit", |r| r["evaluations"][0]["windows"] = json!(1));
    check(&[]).refused(&["`3bit`", "number of windows"]);
    fs::remove_dir_all(dir.path("branches/3bit")).unwrap();
    assert!(check(&[]).stdout.contains("MISSING"));
}

#[test]
fn a_sweep_leaves_a_card_in_every_branch_and_card_writes_it_anew() {
    let dir = swept();
    let read =
        |branch: &str| fs::read_to_string(dir.path("branches").join(branch).join("README.md"));
    let card = read("3bit").unwrap();
    assert!(card.starts_with("---\nlicense: \"mit\"\n"), "{card}");
    assert!(
        card.contains("| **this:** [`3bit`](https://huggingface.co/org/tiny-GPTQ/tree/3bit) | 3 ")
    );
    assert!(card.contains("| ExLlamaV2 | `4bit-32g` |"), "{card}");
    assert!(card.contains("Every figure was measured from the published file, protocol paper"));
    // Loading is a matter of the file, which a card does not touch.
    let before = listing(&dir.path("branches/3bit"));
    let args = ["card", "branches", "--facts", "facts.toml", "--repo", "me/other"];
    let written = dir.gptq(&args);
    assert_eq!(written.ok(), "branches/4bit-32g/README.md\nbranches/3bit/README.md\n");
    assert_eq!(listing(&dir.path("branches/3bit")), before);
    assert_eq!(read("3bit").unwrap(), card.replace("org/tiny-GPTQ", "me/other"));
    let json = dir.gptq(&[&args[..], &["--json"]].concat()).json();
    assert_eq!(json, json!(["branches/4bit-32g/README.md", "branches/3bit/README.md"]));
    // A finished sweep is still a finished one.
    let again = dir.gptq(&["sweep", "sweep.toml", "--out", "branches", "--device", "cpu"]);
    again.ok();
    assert!(!again.stderr.contains("block 1/2"), "{}", again.stderr);
    assert_eq!(read("3bit").unwrap(), card);
}

#[test]
fn cards_of_a_sweep_are_about_its_branches_and_nothing_else() {
    let dir = swept();
    let card = |branch: &str| dir.path("branches").join(branch).join("README.md");
    let before = fs::read_to_string(card("3bit")).unwrap();
    // Somebody's notes, and a copy of a branch.
    dir.write("branches/junk/gptq_report.json", "{}");
    fs::create_dir(dir.path("branches/3bit-old")).unwrap();
    for entry in fs::read_dir(dir.path("branches/3bit")).unwrap() {
        let file = entry.unwrap().path();
        let copy = dir.path("branches/3bit-old").join(file.file_name().unwrap());
        fs::copy(&file, copy).unwrap();
    }
    fs::write(card("3bit-old"), "mine").unwrap();
    let sweep = ["sweep", "sweep.toml", "--out", "branches", "--device", "cpu"];
    assert!(dir.gptq(&sweep).ok().contains("\n3bit "));
    assert_eq!(fs::read_to_string(card("3bit-old")).unwrap(), "mine");
    assert_eq!(fs::read_to_string(card("3bit")).unwrap(), before);

    // A card that cannot be written costs the card and not the table.
    fs::remove_file(card("3bit")).unwrap();
    fs::create_dir(card("3bit")).unwrap();
    let outcome = dir.gptq(&sweep);
    assert_eq!(outcome.code, 1, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("\n3bit "), "{}", outcome.stdout);
    assert!(outcome.stderr.contains("branches/3bit/README.md"), "{}", outcome.stderr);
}

#[test]
fn a_sweep_with_wrong_facts_makes_nothing() {
    let dir = swept();
    dir.write("facts.toml", "name = \"Tiny\"\n");
    let args = ["sweep", "sweep.toml", "--out", "other", "--device", "cpu"];
    dir.gptq(&args).refused(&["facts.toml", "repository"]);
    assert!(!Path::new(&dir.path("other")).exists());
}

/// A report is data that others wrote: whatever numbers it holds, the page ends and draws.
#[test]
fn reports_of_extreme_numbers_make_a_page() {
    let dir = swept();
    let whole = |branch: &str| {
        fs::read_to_string(dir.path("branches").join(branch).join("gptq_report.json")).unwrap()
    };
    let before = whole("3bit");
    for number in ["1e300", "1e-300", "5e-324", "1.7e308", "1.9e305", "-1e300", "0.0", "null"] {
        let number: Value = serde_json::from_str(number).unwrap();
        edit(&dir, "3bit", |report| {
            for block in report["blocks"].as_array_mut().unwrap() {
                block["linears"][0]["relative_error"] = number.clone();
            }
            report["blocks"][1]["block"] = json!(u64::MAX);
            report["file_bytes"] = json!(u64::MAX);
            if number.is_number() {
                let evaluation = &mut report["evaluations"][0];
                for key in ["perplexity", "standard_error", "kl", "base_perplexity"] {
                    evaluation[key] = number.clone();
                }
                evaluation["rtn"] = json!({"perplexity": number, "kl": number});
                report["damp"] = number.clone();
            } else {
                // What an energy of 0 leaves: no error.
                report["evaluations"][0]["rtn"] = Value::Null;
            }
        });
        let shown = dir.gptq(&["report", "branches", "--html", "extreme.html"]);
        assert_eq!(shown.code, 0, "{number}: {}", shown.stderr);
        let page = fs::read_to_string(dir.path("extreme.html")).unwrap();
        assert!(page.len() < 200_000, "{number}: {} bytes", page.len());
        // No place in a drawing is without a number.
        assert!(!page.contains("\"NaN\"") && !page.contains("NaN NaN"), "{number}");
        assert!(shown.stdout.lines().all(|line| line.len() < 2000), "{number}: {}", shown.stdout);
        fs::write(dir.path("branches/3bit/gptq_report.json"), &before).unwrap();
    }
}

/// A gate that cannot fail is no gate: what is not compared, cannot be compared or cannot be, fails.
#[test]
fn the_gate_fails_where_nothing_or_something_else_was_compared() {
    let dir = swept();
    let check = |report: &str| dir.gptq(&["check", report, "--baseline", "baseline.json"]);
    let update = ["check", "branches", "--baseline", "baseline.json", "--update"];
    dir.gptq(&update).ok();
    let accepted = fs::read_to_string(dir.path("baseline.json")).unwrap();
    let report = dir.gptq(&["report", "branches", "--json"]).json();
    dir.write("report.json", &report.to_string());
    check("report.json").ok();
    // A baseline of before settings were recorded is held against what it has.
    let older = |baseline: &mut Value| {
        for branch in baseline["branches"].as_object_mut().unwrap().values_mut() {
            branch.as_object_mut().unwrap().remove("settings").unwrap();
        }
    };
    let with_baseline = |change: &dyn Fn(&mut Value), look: &dyn Fn(util::Outcome)| {
        let mut baseline: Value = serde_json::from_str(&accepted).unwrap();
        change(&mut baseline);
        dir.write("baseline.json", &baseline.to_string());
        look(check("report.json"));
        dir.write("baseline.json", &accepted);
    };
    with_baseline(&older, &|outcome| assert!(!outcome.ok().is_empty()));

    let refused: [(Change<'_, Value>, &str); 8] = [
        (&|b| b["branches"] = json!({}), "accepts no branch"),
        (&|b| b["branches"]["3bit"]["perplexity"] = json!(1e308), "perplexity of `3bit`"),
        (&|b| b["branches"]["3bit"]["perplexity"] = json!(-1e308), "perplexity of `3bit`"),
        (&|b| b["branches"]["3bit"]["perplexity"] = json!(0.5), "perplexity of `3bit`"),
        (&|b| b["branches"]["3bit"]["kl"] = json!(-0.5), "kl of `3bit`"),
        (&|b| b["branches"]["3bit"]["kl"] = json!(1e9), "kl of `3bit`"),
        (&|b| b["branches"]["3bit"]["file_bytes"] = json!(0), "file_bytes of `3bit`"),
        (&|b| b["base_perplexity"] = json!(0.0), "perplexity of `fp16`"),
    ];
    for (change, reason) in refused {
        with_baseline(change, &|outcome| outcome.refused(&["is not a baseline", reason]));
    }

    let with_report = |change: &dyn Fn(&mut [Value])| {
        let mut report = report.clone();
        change(report["branches"].as_array_mut().unwrap());
        dir.write("other.json", &report.to_string());
        check("other.json")
    };
    let evaluation = |branch: &mut Value, key: &str, value: Value| {
        branch["evaluations"][0][key] = value;
    };
    let found: [(Change<'_, [Value]>, &[&str]); 11] = [
        (
            &|b| b.iter_mut().for_each(|b| evaluation(b, "base_perplexity", Value::Null)),
            &["fp16", "perplexity", "MISSING"],
        ),
        (&|b| evaluation(&mut b[1], "base_perplexity", json!(5e5)), &["3bit", "fp16", "CHANGED"]),
        (&|b| evaluation(&mut b[1], "base_perplexity", Value::Null), &["3bit", "fp16", "MISSING"]),
        (&|b| evaluation(&mut b[0], "perplexity", json!(-4.0)), &["perplexity", "IMPOSSIBLE"]),
        (&|b| evaluation(&mut b[0], "perplexity", json!(0)), &["perplexity", "IMPOSSIBLE"]),
        (&|b| evaluation(&mut b[0], "kl", json!(-3.0)), &["kl", "IMPOSSIBLE"]),
        (&|b| evaluation(&mut b[0], "contaminated", json!(true)), &["contaminated", "CHANGED"]),
        (&|b| b[0]["bits"] = json!(3), &["4bit-32g settings: bits was 4, now 3"]),
        (&|b| b[0]["recipe"] = json!("rtn"), &["settings: recipe was autogptq, now rtn"]),
        (&|b| b[0]["source_dtype"] = json!("fp32"), &["source dtype was fp16, now fp32"]),
        (&|b| b[0]["group_size"] = Value::Null, &["settings: group size was 32, now none"]),
    ];
    for (change, names) in found {
        let outcome = with_report(change);
        assert_eq!(outcome.code, 1, "{names:?}: {}", outcome.stdout);
        let named = |line: &str| names.iter().all(|name| line.contains(name));
        assert!(outcome.stdout.lines().any(named), "{names:?}: {}", outcome.stdout);
        assert!(outcome.stdout.lines().all(|line| line.len() < 120), "{}", outcome.stdout);
    }
    // However large, a number takes no more room than the others.
    let huge = with_report(&|b| evaluation(&mut b[0], "perplexity", json!(1e300)));
    assert!(huge.code == 1 && huge.stdout.contains("1.000e300"), "{}", huge.stdout);
    assert!(huge.stdout.lines().all(|line| line.len() < 120), "{}", huge.stdout);
    let twice = with_report(&|b| {
        let mut again = b[0]["evaluations"][0].clone();
        again["perplexity"] = json!(9e9);
        b[0]["evaluations"].as_array_mut().unwrap().push(again);
    });
    twice.refused(&["`4bit-32g`", "several evaluations of one measurement"]);

    // A new branch of a sweep is named; alone it is no check at all.
    edit(&dir, "3bit", |r| r["branch"] = json!("renamed"));
    let alone = check("branches/3bit");
    assert_eq!(alone.code, 1, "{}", alone.stdout);
    assert!(alone.stdout.contains("NOT IN THE BASELINE"), "{}", alone.stdout);
    assert!(check("branches").stdout.contains("renamed   branch"), "{}", check("branches").stdout);
    // What could not be read back is not accepted.
    edit(&dir, "3bit", |r| r["evaluations"][0]["kl"] = json!(-1.0));
    let outcome = dir.gptq(&update);
    assert_eq!(outcome.code, 1, "{}", outcome.stdout);
    assert!(outcome.stderr.contains("kl of `renamed`"), "{}", outcome.stderr);
    assert_eq!(fs::read_to_string(dir.path("baseline.json")).unwrap(), accepted);
}

/// What a command reads is not replaced by what it writes, under whatever name.
#[test]
fn what_is_read_is_not_written_over() {
    let dir = swept();
    let report = dir.gptq(&["report", "branches", "--json"]).stdout;
    dir.write("report.json", &report);
    std::os::unix::fs::symlink("report.json", dir.path("link.json")).unwrap();
    let text = fs::read_to_string(dir.path("text.txt")).unwrap();
    let config = fs::read_to_string(dir.path("sweep.toml")).unwrap();
    fs::create_dir(dir.path("new")).unwrap();
    dir.write("new/sweep.json", &config);
    dir.write("new/calib.toml", CALIBRATION);
    dir.write("new/facts.toml", FACTS);
    let of_branch = "branches/3bit/gptq_report.json";
    let measured = fs::read_to_string(dir.path(of_branch)).unwrap();
    for args in [
        &["report", "report.json", "--html", "report.json"][..],
        &["report", "report.json", "--html", "./link.json"],
        &["report", "branches", "--previous", "report.json", "--html", "report.json"],
        &["report", "branches", "--html", of_branch],
        &["report", "branches/3bit", "--html", of_branch],
        &["check", "report.json", "--baseline", "report.json", "--update"],
        &["check", "branches", "--baseline", of_branch, "--update"],
        &["ppl", "model", "--dataset", "text.txt", "--per-token", "text.txt", "--device=cpu"],
        &["ppl", "model", "--dataset=text.txt", "--per-token=model/config.json", "--device=cpu"],
        &["sweep", "new/sweep.json", "--out", "new", "--device", "cpu"],
    ] {
        dir.gptq(args).refused(&["would be overwritten"]);
    }
    assert_eq!(fs::read_to_string(dir.path("report.json")).unwrap(), report);
    assert_eq!(fs::read_to_string(dir.path("text.txt")).unwrap(), text);
    assert_eq!(fs::read_to_string(dir.path("new/sweep.json")).unwrap(), config);
    assert_eq!(fs::read_to_string(dir.path(of_branch)).unwrap(), measured);
}

/// What has no end is not read: a device or a pipe in a small file's place.
#[cfg(target_os = "linux")]
#[test]
fn what_is_no_regular_file_is_not_read() {
    let dir = swept();
    let refuses = |args: &[&str], path: &str| {
        let outcome = dir.gptq(args);
        outcome.refused(&[path]);
        assert!(outcome.stderr.contains("it is no regular file"), "{}", outcome.stderr);
    };
    for path in ["/dev/zero", "pipe"] {
        if path == "pipe" {
            let made = std::process::Command::new("mkfifo").arg(dir.path(path)).status().unwrap();
            assert!(made.success());
        }
        refuses(&["check", "branches", "--baseline", path], path);
        refuses(&["report", path], path);
        refuses(&["sweep", path], path);
        refuses(&["card", "branches", "--facts", path], path);
        let calibrated = ["quantize", "model", "--out", "q", "--device", "cpu", "--calib", path];
        assert_eq!(dir.gptq(&calibrated).code, 1);
    }
    // What is printed can be piped on; there are no values of before in a pipe.
    let update = ["check", "branches", "--baseline", "/dev/stdout", "--update"];
    let text = dir.gptq(&update).ok().to_owned();
    let start = text.find("{\n").unwrap();
    let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
    assert_eq!(values.next().unwrap().unwrap()["format"], 1);
    // Beside a manifest.
    for file in ["gptq_report.json", "gptq_manifest.json", "tokenizer.json"] {
        let path = dir.path("branches/3bit").join(file);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let outcome = dir.gptq(&["verify", "branches/3bit", "--base", "model"]);
        assert_eq!(outcome.code, 1, "{file}");
        let output = outcome.stdout + &outcome.stderr;
        assert!(output.contains(file) && output.contains("no regular file"), "{file}: {output}");
        fs::remove_file(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
}

/// The base's perplexity on the tokens of another tokenizer would say nothing.
#[test]
fn a_base_with_another_tokenizer_is_not_compared_with() {
    let dir = Workdir::new();
    let model = TinyLlama::new();
    model.write(&dir.path("model"));
    model.write(&dir.path("base"));
    dir.write("text.txt", &words(400));
    let mut args =
        vec!["ppl", "model", "--base", "base", "--dataset", "text.txt", "--device", "cpu"];
    args.extend(["--seq-len", "32"]);
    dir.gptq(&args).ok();
    let path = dir.path("base/tokenizer.json");
    let tokenizer = fs::read_to_string(&path).unwrap();
    let swapped = tokenizer.replace("\"w2\":2", "\"w2\":0").replace("\"<unk>\":0", "\"<unk>\":2");
    assert_ne!(swapped, tokenizer);
    fs::write(&path, swapped).unwrap();
    dir.gptq(&args).refused(&["tokenizers", "`base`", "other tokens of"]);
    // A base without one takes what it is given.
    fs::remove_file(path).unwrap();
    dir.gptq(&args).ok();
}
