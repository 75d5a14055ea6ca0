//! What is done to the words of the command line before clap reads them.

use std::ffi::{OsStr, OsString};

use gptq_text::home::{HomeError, expand_home};

/// Options that may stand alone, so that clap takes a value of theirs after `=` only.
const SWITCHES: [&str; 2] = ["--act-order", "--desc-act"];

/// The words as they are meant: `--act-order false` as `--act-order=false`, and a leading `~/`, which
/// shells leave alone behind `=` and in quotes, as the home folder. `./~/x` means a folder of that
/// name.
///
/// # Errors
/// A `~` where nothing says which folder is home.
pub(crate) fn typed(words: impl IntoIterator<Item = OsString>) -> Result<Vec<OsString>, HomeError> {
    let mut typed: Vec<OsString> = Vec::new();
    for word in words {
        match typed.last_mut() {
            Some(last) if is_switch(last) && (word == "true" || word == "false") => {
                last.push("=");
                last.push(word);
            }
            _ => typed.push(at_home(word)?),
        }
    }
    Ok(typed)
}

fn is_switch(word: &OsStr) -> bool {
    SWITCHES.iter().any(|switch| word == *switch)
}

/// A word with its path, or the path of `--option=~/path`, taken from the home folder. Words that are
/// no Unicode stay as they are: a shell that can type them has expanded them.
fn at_home(word: OsString) -> Result<OsString, HomeError> {
    let Some(text) = word.to_str() else { return Ok(word) };
    let (option, path) = match text.split_once('=') {
        Some((option, path)) if option.starts_with("--") => (Some(option), path),
        _ => (None, text),
    };
    let path = expand_home(path)?;
    Ok(option.map_or_else(|| path.to_string(), |option| format!("{option}={path}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meant(words: &[&str]) -> Vec<String> {
        let words = typed(words.iter().map(OsString::from)).unwrap();
        words.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn switches_take_the_word_after_them() {
        for (words, meaning) in [
            (&["--act-order", "false", "m"][..], &["--act-order=false", "m"][..]),
            (&["--desc-act", "true"][..], &["--desc-act=true"][..]),
            (&["--act-order", "m"][..], &["--act-order", "m"][..]),
            (&["--act-order=true", "false"][..], &["--act-order=true", "false"][..]),
            (&["m", "--act-order"][..], &["m", "--act-order"][..]),
        ] {
            assert_eq!(meant(words), meaning);
        }
    }

    #[test]
    fn paths_at_home_are_found() {
        let home = std::env::var("HOME").unwrap();
        for (word, meaning) in [
            ("~/made", format!("{home}/made")),
            ("--out=~/made", format!("--out={home}/made")),
            ("~", home.clone()),
            ("./~/made", "./~/made".to_owned()),
            ("~made", "~made".to_owned()),
            ("a=~/b", "a=~/b".to_owned()),
        ] {
            assert_eq!(meant(&[word]), [meaning]);
        }
    }
}
