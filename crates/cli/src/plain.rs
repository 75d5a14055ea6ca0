//! Text for a terminal: what files and the Hub call things must not command it.
//!
//! A tensor's name may hold an escape sequence that sets the clipboard, or marks that turn the order of
//! letters around. All that people read is made plain here, where it is printed. JSON is no terminal's
//! business and escapes by its own rules.

use std::borrow::Cow;

/// Lines with every control character but their ends and tabs spelled out, as `\u{1b}`.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    spelled(text, |c| is_command(c) && !matches!(c, '\n' | '\t'))
}

/// A word within a line, which has no ends of lines of its own.
pub(crate) fn plain_word(text: &str) -> Cow<'_, str> {
    spelled(text, is_command)
}

fn spelled(text: &str, spell: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&spell) {
        return text.into();
    }
    let mut spelled = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match spell(c) {
            true => spelled.extend(c.escape_unicode()),
            false => spelled.push(c),
        }
    }
    spelled.into()
}

/// Control characters, separators of lines, and marks of direction.
fn is_command(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_spelled_out_and_text_is_left_alone() {
        for (text, shown) in [
            ("w\u{1b}]52;c;x\u{7}", "w\\u{1b}]52;c;x\\u{7}"),
            ("a\rb\u{9b}0m\u{7f}", "a\\u{d}b\\u{9b}0m\\u{7f}"),
            ("gpj.\u{202e}exe\u{2069}", "gpj.\\u{202e}exe\\u{2069}"),
            ("one\n\ttwo × drei – \u{0645}", "one\n\ttwo × drei – \u{0645}"),
        ] {
            assert_eq!(plain(text), shown);
            assert_eq!(plain(&plain(text)), shown);
        }
        assert_eq!(plain_word("a\nerror: b\tc"), "a\\u{a}error: b\\u{9}c");
        assert!(matches!(plain("a\nb"), Cow::Borrowed(_)));
    }
}
