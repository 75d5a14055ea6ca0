//! What is done to the words of the command line before clap reads them.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use anyhow::Result;
use gptq_text::home::expand_home;

use crate::hint::advised;

/// Options that may stand alone, so that clap takes a value of theirs after `=` only.
const SWITCHES: [&str; 2] = ["--act-order", "--desc-act"];

/// Options whose values are texts, in which anything may stand.
const TEXTS: [&str; 3] = ["--prompt", "--system", "--stop"];

/// The words as they are meant: `--act-order false` as `--act-order=false`, and a leading `~/`, which
/// shells leave alone behind `=` and in quotes, as the home folder. `./~/x` means a folder of that
/// name.
///
/// # Errors
/// A `~` where nothing says which folder is home, and a path of Windows.
pub(crate) fn typed(words: impl IntoIterator<Item = OsString>) -> Result<Vec<OsString>> {
    let mut typed: Vec<OsString> = Vec::new();
    for word in words {
        match typed.last_mut() {
            Some(last) if is_switch(last) && (word == "true" || word == "false") => {
                last.push("=");
                last.push(word);
            }
            Some(last) if TEXTS.iter().any(|option| last == option) => typed.push(at_home(word)?),
            _ => {
                refuse_windows(&word)?;
                typed.push(at_home(word)?);
            }
        }
    }
    Ok(typed)
}

fn is_switch(word: &OsStr) -> bool {
    SWITCHES.iter().any(|switch| word == *switch)
}

/// A word with its path, or the path of `--option=~/path`, taken from the home folder. Words that are
/// no Unicode stay as they are: a shell that can type them has expanded them.
fn at_home(word: OsString) -> Result<OsString> {
    let Some(text) = word.to_str() else { return Ok(word) };
    let (option, path) = match text.split_once('=') {
        Some((option, path)) if option.starts_with("--") => (Some(option), path),
        _ => (None, text),
    };
    let path = expand_home(path)?;
    Ok(option.map_or_else(|| path.to_string(), |option| format!("{option}={path}")).into())
}

/// A path such as `C:\models\x`: read as one of this system it would be a strange name in the current
/// folder, or no Hub id. A file that has this name is meant, of course.
fn refuse_windows(word: &OsStr) -> Result<()> {
    let Some(text) = word.to_str() else { return Ok(()) };
    let path = match text.split_once('=') {
        Some((option, _)) if TEXTS.contains(&option) => return Ok(()),
        Some((option, path)) if option.starts_with("--") => path,
        _ => text,
    };
    let mut letters = path.chars();
    let (drive, colon, slash) = (letters.next(), letters.next(), letters.next());
    let share = path.starts_with("\\\\");
    let on_drive = drive.is_some_and(|c| c.is_ascii_alphabetic())
        && colon == Some(':')
        && matches!(slash, Some('\\' | '/'));
    if !(share || on_drive) || Path::new(path).exists() {
        return Ok(());
    }
    let hint = match drive {
        Some(drive) if on_drive => {
            let rest = letters.as_str().replace('\\', "/");
            format!("under WSL it is /mnt/{}/{rest}", drive.to_ascii_lowercase())
        }
        _ => "copy or mount it where this system can read it".to_owned(),
    };
    Err(advised(format!("`{path}` is a path of Windows, and this is another system"), hint))
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
    fn paths_of_windows_are_refused_and_texts_are_not() {
        for word in ["C:\\models\\x", "d:/x", "--out=C:\\x", "\\\\host\\share"] {
            assert!(typed([OsString::from(word)]).is_err(), "{word}");
        }
        for words in [
            &["--prompt", "C:\\x is"][..],
            &["--system=C:\\x"],
            &["a:b:c", "c:x", "org/name", "--tasks=c:", "C:"],
        ] {
            assert_eq!(meant(words), words);
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
