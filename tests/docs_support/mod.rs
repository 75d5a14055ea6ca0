//! The command blocks of README.md and of the book's pages, and what a shell makes of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a block may say that it needs, behind `needs-`. The computer that runs the tests lacks it.
const NEEDS: [&str; 9] =
    ["gpu", "gpus", "hosts", "network", "minutes", "install", "wheel", "lm_eval", "server"];

/// A fenced block that begins with ```` ```sh ```` or ```` ```console ````.
pub(crate) struct Block {
    page: String,
    line: usize,
    /// Lines after `$ ` are typed, the others are what was printed.
    console: bool,
    needs: bool,
    text: String,
}

impl Block {
    /// Where the block stands, for messages.
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.page, self.line)
    }

    /// True where every computer can run it.
    pub(crate) fn runs_here(&self) -> bool {
        !self.needs
    }

    /// What is typed.
    pub(crate) fn script(&self) -> String {
        if !self.console {
            return self.text.clone();
        }
        let typed = self.text.lines().filter_map(|line| line.strip_prefix("$ "));
        typed.map(|line| format!("{line}\n")).collect()
    }

    /// What a console block shows as printed.
    pub(crate) fn printed(&self) -> Option<String> {
        let printed = || self.text.lines().filter(|line| !line.starts_with("$ "));
        self.console.then(|| printed().map(|line| format!("{line}\n")).collect())
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// README.md and the files of the book, by name.
pub(crate) fn pages() -> Vec<PathBuf> {
    let root = repository();
    let files = fs::read_dir(root.join("crates/cli/docs")).unwrap();
    let mut pages: Vec<PathBuf> = files.map(|entry| entry.unwrap().path()).collect();
    pages.push(root.join("README.md"));
    pages.sort();
    assert!(pages.iter().all(|page| page.extension().is_some_and(|e| e == "md")), "{pages:?}");
    pages
}

/// The command blocks of a page.
pub(crate) fn blocks(page: &Path) -> Vec<Block> {
    let text = fs::read_to_string(page).unwrap();
    let name = page.strip_prefix(repository()).unwrap().display().to_string();
    let mut blocks = Vec::new();
    // The fence of the block that is read: of what is typed or of something else.
    let mut open: Option<Option<Block>> = None;
    for (i, line) in text.lines().enumerate() {
        let fence = line.trim_start().strip_prefix("```");
        open = match (open, fence) {
            (None, None) => None,
            (None, Some(words)) => Some(opened(words, &name, i + 1)),
            (Some(block), Some(_)) => {
                blocks.extend(block);
                None
            }
            (Some(mut block), None) => {
                if let Some(block) = &mut block {
                    block.text += &format!("{line}\n");
                }
                Some(block)
            }
        };
    }
    assert!(open.is_none(), "{name}: a fence is not closed");
    blocks
}

/// A block whose fence says that it holds commands.
fn opened(words: &str, page: &str, line: usize) -> Option<Block> {
    let (kind, attributes) = words.split_once(' ').unwrap_or((words, ""));
    if kind != "sh" && kind != "console" {
        // Nothing that a shell runs may stand in a block that no test looks at.
        let known = ["toml", "text", "json", "python", "yaml"];
        assert!(known.contains(&kind), "{page}:{line}: a block of `{kind}`");
        return None;
    }
    let needs = attributes.strip_prefix("needs-");
    assert_eq!(needs.is_none(), attributes.is_empty(), "{page}:{line}: {attributes}");
    assert!(needs.is_none_or(|need| NEEDS.contains(&need)), "{page}:{line}: {attributes}");
    let (page, needs) = (page.to_owned(), needs.is_some());
    Some(Block { page, line, console: kind == "console", needs, text: String::new() })
}

/// The words of every program that a block starts, as bash takes its text apart, without starting any:
/// with nothing in PATH, each is a command that is not found, which bash hands to a function.
pub(crate) fn recorded_commands(block: &Block) -> Vec<Vec<String>> {
    const HANDLER: &str = r#"PATH=/nonexistent
        command_not_found_handle() { printf '%s\0' "$@" $'\x1e' >> "$RECORD"; }
"#;
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("record");
    fs::write(&record, "").unwrap();
    let output = Command::new("bash")
        .args(["--norc", "-uc", &(HANDLER.to_owned() + &block.script() + "\nwait\n")])
        .current_dir(dir.path())
        .env("HOME", dir.path())
        .env("RECORD", &record)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("syntax error"), "{}: {errors}", block.place());
    let words = fs::read_to_string(&record).unwrap();
    let commands = words.split("\u{1e}\0").filter(|words| !words.is_empty());
    commands.map(|words| words.split_terminator('\0').map(str::to_owned).collect()).collect()
}
