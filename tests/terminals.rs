//! What shells, man and terminals get: completions, pages, colors, widths.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::process::{Command, Stdio};

use util::needs::Need;
use util::{TinyLlama, Workdir, listing};

fn run(args: &[&str]) -> String {
    Workdir::new().gptq(args).ok().to_owned()
}

/// The commands that help lists.
fn commands() -> Vec<String> {
    let help = run(&["--help"]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = listed.take_while(|line| !line.is_empty()).filter_map(|line| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!name.is_empty() && name != "help").then(|| name.to_owned())
    });
    names.collect()
}

/// Runs a program of the system with a text as its input; `None` where it is not installed.
fn piped(program: &str, args: &[&str], text: &str) -> Option<(bool, String)> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    std::io::Write::write_all(&mut child.stdin.take()?, text.as_bytes()).ok()?;
    let output = child.wait_with_output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

#[test]
fn completions_know_every_command_and_its_options() {
    let commands = commands();
    assert!(commands.len() >= 20, "{commands:?}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completions", shell]);
        for command in &commands {
            assert!(script.contains(command.as_str()), "{shell}: {command}");
        }
        for option in ["group-size", "no-progress", "max-kl"] {
            assert!(script.contains(option), "{shell}: {option}");
        }
    }
    Workdir::new().gptq(&["completions", "cmd"]).refused(&["cmd"]);
}

/// In the shell that every test machine has.
#[test]
fn bash_completes_what_is_begun() {
    let script = run(&["completions", "bash"]);
    for (typed, least) in [("gptq quan", "quantize"), ("gptq ppl --prot", "--protocol")] {
        let words: Vec<&str> = typed.split(' ').collect();
        let (count, last, before) =
            (words.len() - 1, words[words.len() - 1], words[words.len() - 2]);
        let ask = format!(
            "{script}\nCOMP_WORDS=({typed})\nCOMP_CWORD={count}\n_gptq gptq '{last}' '{before}'\necho \"<${{COMPREPLY[*]}}>\"\n"
        );
        let (ok, printed) = piped("bash", &["--norc"], &ask).unwrap();
        assert!(ok && printed.contains(&format!("<{least}>")), "{typed}: {printed}");
    }
}

#[test]
fn pages_are_written_for_man() {
    let dir = Workdir::new();
    std::fs::create_dir(dir.path("man1")).unwrap();
    dir.gptq(&["man", "--out", "man1"]).ok();
    let mut expected: Vec<String> = commands()
        .iter()
        .map(|name| format!("gptq-{name}.1"))
        .chain(["gptq.1".to_owned()])
        .collect();
    expected.sort();
    assert_eq!(listing(&dir.path("man1")), expected);
    for name in expected {
        let page = std::fs::read_to_string(dir.path("man1").join(&name)).unwrap();
        let title = format!(".TH {} 1 ", name.trim_end_matches(".1"));
        assert!(page.contains(&title), "{name}");
        // What roff itself says of it.
        if let Some((ok, said)) = piped("groff", &["-Kutf8", "-man", "-ww", "-z"], &page) {
            assert!(ok && said.is_empty(), "{name}: {said}");
        }
    }
    let page = run(&["man", "verify"]);
    let file = std::fs::read_to_string(dir.path("man1/gptq-verify.1")).unwrap();
    assert_eq!(page.trim_end(), file.trim_end());
    // Lines to be copied stay lines.
    let examples = page.split(".SH EXAMPLES\n.nf\n").nth(1).unwrap();
    assert!(examples.contains("gptq verify "), "{examples}");
    dir.gptq(&["man", "nothing"]).refused(&["`nothing`", "--help"]);
    dir.gptq(&["man", "--out", "nowhere"]).refused(&["nowhere"]);
}

/// Runs gptq on a terminal of so many columns, with an environment; what the terminal got. `None` where
/// util-linux's script is not installed.
fn on_terminal(dir: &Workdir, columns: u32, env: &[(&str, &str)], args: &str) -> Option<String> {
    let gptq = env!("CARGO_BIN_EXE_gptq");
    let output = Command::new("script")
        .args(["-qec", &format!("stty cols {columns} rows 24; {gptq} {args}"), "/dev/null"])
        .current_dir(dir.path("."))
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("TERM", "xterm-256color")
        .env("HF_HUB_OFFLINE", "1")
        .env("HOME", dir.path("home"))
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .ok()?;
    Some(String::from_utf8(output.stdout).unwrap().replace("\r\n", "\n"))
}

/// A folder with the model `model`.
fn tiny() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir
}

const ESCAPE: char = '\u{1b}';

#[test]
fn colors_are_shown_where_they_are_wanted() {
    let dir = tiny();
    let wrong = "inspect ./nowhere";
    let Some(plain) = on_terminal(&dir, 80, &[], wrong) else {
        return Need::Terminal.is_missing("script is not installed");
    };
    assert!(plain.contains("\u{1b}[1;31merror:\u{1b}[0m `./nowhere`"), "{plain:?}");
    assert!(plain.contains("\u{1b}[1;32mhint:\u{1b}[0m "), "{plain:?}");
    for env in [[("NO_COLOR", "1")], [("TERM", "dumb")], [("CLICOLOR", "0")]] {
        for args in [wrong, "", "--help", "frobnicate", "plan model"] {
            let shown = on_terminal(&dir, 80, &env, args).unwrap();
            assert!(!shown.contains(ESCAPE), "{env:?} {args}: {shown:?}");
        }
    }
    // Into a pipe there are colors where they are forced, and NO_COLOR is stronger.
    let piped = |env: &[(&str, &str)]| dir.gptq_env(&["inspect", "./nowhere"], env).stderr;
    assert!(piped(&[("NO_COLOR", ""), ("CLICOLOR_FORCE", "1")]).starts_with("\u{1b}[1;31merror:"));
    assert!(piped(&[("NO_COLOR", ""), ("CLICOLOR_FORCE", "0")]).starts_with("error:"));
    assert!(piped(&[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")]).starts_with("error:"));
}

/// Bars move the cursor, which TERM=dumb cannot and a file must not.
#[test]
fn a_terminal_that_cannot_move_its_cursor_gets_lines() {
    let dir = tiny();
    let run = |out: &str| format!("quantize model --recipe rtn --device cpu --out {out}");
    let Some(dumb) = on_terminal(&dir, 80, &[("TERM", "dumb")], &run("a")) else {
        return Need::Terminal.is_missing("script is not installed");
    };
    assert!(dumb.contains("\nblock 2/2 ") && !dumb.contains(ESCAPE), "{dumb:?}");
    let bars = on_terminal(&dir, 80, &[], &run("b")).unwrap();
    assert!(bars.contains(ESCAPE) && !bars.contains("\nblock 2/2 "), "{bars:?}");
    let quiet = on_terminal(&dir, 80, &[], &run("c --quiet")).unwrap();
    assert!(!quiet.contains(ESCAPE), "{quiet:?}");
}

#[test]
fn narrow_terminals_get_short_lines() {
    let dir = tiny();
    let Some(_) = on_terminal(&dir, 40, &[], "doctor") else {
        return Need::Terminal.is_missing("script is not installed");
    };
    for args in ["", "plan model", "inspect model", "doctor", "plan model --card A100"] {
        // A path is one word, as long as it is.
        let env = [("NO_COLOR", "1"), ("HOME", "/h")];
        let shown = on_terminal(&dir, 40, &env, args).unwrap();
        let prose = |line: &&str| !line.contains("windows ×") && !line.contains(" memory ");
        let from_table = shown.lines().filter(|l| l.starts_with("  ") || l.starts_with("4bit"));
        for line in from_table.filter(prose) {
            assert!(line.chars().count() <= 40, "{args}: {line}");
        }
    }
    let plan = on_terminal(&dir, 40, &[], "plan model").unwrap();
    assert!(plan.contains("4bit-32g-act\n  bits: 4; group: 32; act-order: yes;\n"), "{plan}");
    // COLUMNS is what the terminal is told to be; in a pipe lines are for programs and stay whole.
    let told = on_terminal(&dir, 200, &[("COLUMNS", "40")], "plan model").unwrap();
    assert!(told.contains("\n  bits: 4; "), "{told}");
    let wide = on_terminal(&dir, 200, &[], "plan model").unwrap();
    assert!(wide.contains("4bit-32g-act ") && !wide.contains("bits: 4"), "{wide}");
    let piped = dir.gptq_env(&["plan", "model"], &[("COLUMNS", "40")]);
    assert!(!piped.ok().contains("bits: 4"), "{}", piped.stdout);
    let help = dir.gptq_env(&["plan", "--help"], &[("COLUMNS", "40")]);
    let options = help.ok().split("Examples:").next().unwrap();
    assert!(options.lines().all(|line| line.chars().count() <= 40), "{options}");
}
