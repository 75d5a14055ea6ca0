//! What the terminal is like that people read on: its width, and whether it shows colors.
//!
//! Colors follow `NO_COLOR`, `CLICOLOR_FORCE`, `CLICOLOR` and `TERM=dumb` as clap's own messages do.

use std::borrow::Cow;
use std::io::IsTerminal;

use rustix::fd::AsFd;

/// Columns of a terminal; none where the stream is something else.
pub(crate) fn width(stream: &(impl IsTerminal + AsFd)) -> Option<usize> {
    if !stream.is_terminal() {
        return None;
    }
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let asked = || rustix::termios::tcgetwinsize(stream).ok().map(|size| size.ws_col.into());
    said.or_else(asked).filter(|&columns| columns > 0)
}

/// Whether a terminal cannot move its cursor, as an editor's.
pub(crate) fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// Whether what is written to stderr has colors.
fn has_colors() -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if set("NO_COLOR").is_some() {
        return false;
    }
    if set("CLICOLOR_FORCE").is_some_and(|value| value != "0") {
        return true;
    }
    let refused = set("CLICOLOR").is_some_and(|value| value == "0");
    !refused && !is_dumb() && std::io::stderr().is_terminal()
}

/// Lines for stderr, whose first words are painted where colors are shown.
pub(crate) fn painted(text: Cow<'_, str>) -> Cow<'_, str> {
    if has_colors() { paint(&text).into() } else { text }
}

/// In clap's colors: bold and red, yellow or green.
fn paint(text: &str) -> String {
    const WORDS: [(&str, u8); 4] =
        [("error:", 31), ("Caused by:", 31), ("warning:", 33), ("hint:", 32)];
    let line = |line: &str| {
        let word = WORDS.iter().find(|(word, _)| line.starts_with(word));
        word.map_or_else(
            || line.to_owned(),
            |(word, color)| format!("\u{1b}[1;{color}m{word}\u{1b}[0m{}", &line[word.len()..]),
        )
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_words_are_painted() {
        assert_eq!(
            paint("error: no file\nhint: error: not here\nblock 1"),
            "\u{1b}[1;31merror:\u{1b}[0m no file\n\u{1b}[1;32mhint:\u{1b}[0m error: not here\nblock 1"
        );
    }
}
