//! The book: how to use `gptq`, page by page.
//!
//! 1. [Install](install): build it, look at the machine, completions and manual pages.
//! 2. [From the published card to your own nine branches](nine_branches): the whole way, start to end.
//! 3. [When to use this, and when something else](choosing): GPTQModel, AutoRound, llm-compressor.
//! 4. [Sources and models](sources): families, weight files, data sets, the Hub.
//! 5. [Recipes](recipes): how codes and scales are chosen, and what each choice is worth.
//! 6. [Calibration](calibration): the text, its windows, a recipe of your own.
//! 7. [Formats and loaders](formats): what is written, what is read, who loads it.
//! 8. [Verify](verify): every check of a folder, and the accuracy gate.
//! 9. [GPUs, several GPUs, several hosts](gpus): memory, ranks, sweeps that are interrupted or split.
//! 10. [Generate, serve and eval](text): text, OpenAI's HTTP interface, lm-evaluation-harness.
//! 11. [JSON outputs](json): results for programs, exit codes.
//!
//! The pages are the files of `crates/cli/docs`. Blocks marked `sh` are run by `tests/docs.rs` on the
//! embedded model, in the root of the repository as a page shows them, one after the other; what needs
//! more than a computer says so behind `needs-`, and its options are held against the command line by a
//! test of this module.

/// A page from its file. In the files, links to other pages are `[text][page]`, with `[page]: page.md`
/// at the end for readers of the repository; the first definition counts, which is the one here.
#[cfg(doc)]
macro_rules! pages {
    ($($page:ident)*) => { $(
        #[doc = "[install]: self::install\n[nine_branches]: self::nine_branches"]
        #[doc = "[choosing]: self::choosing\n[sources]: self::sources\n[recipes]: self::recipes"]
        #[doc = "[calibration]: self::calibration\n[formats]: self::formats\n[verify]: self::verify"]
        #[doc = "[gpus]: self::gpus\n[text]: self::text\n[json]: self::json\n"]
        #[doc = include_str!(concat!("../docs/", stringify!($page), ".md"))]
        mod $page {}
    )* };
}

#[cfg(doc)]
pages! { install nine_branches choosing sources recipes calibration formats verify gpus text json }

#[cfg(test)]
#[allow(dead_code, reason = "tests/docs.rs uses the rest of it")]
#[path = "../../../tests/docs_support/mod.rs"]
mod docs_support;

#[cfg(test)]
mod tests {
    use super::docs_support::{blocks, pages, recorded_commands};
    use crate::args::{parse, typed};

    /// Whatever a block needs: no option of a command in it is wrong.
    #[test]
    fn every_command_in_the_documents_can_be_typed() {
        let mut parsed = 0;
        for page in pages() {
            for block in blocks(&page) {
                for words in recorded_commands(&block) {
                    let Some(words) = of_gptq(&words) else { continue };
                    let line = words.join(" ");
                    let words = typed(words.into_iter().map(Into::into)).unwrap();
                    if let Err(error) = parse(words) {
                        let kind = error.kind();
                        use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
                        let shown = matches!(kind, DisplayHelp | DisplayVersion);
                        assert!(shown, "{}: {line}\n{error}", block.place());
                    }
                    parsed += 1;
                }
            }
        }
        assert!(parsed > 60, "{parsed} commands");
    }

    /// The words from `gptq` on, behind whatever launches it; of `cargo run`, those behind `--`.
    fn of_gptq(words: &[String]) -> Option<Vec<String>> {
        let own = |word: &String| word == "gptq" || word.ends_with("/gptq");
        if words[0] == "cargo" {
            if words[1] != "run" {
                return None;
            }
            let rest = words.iter().skip_while(|word| *word != "--").skip(1).cloned();
            return Some(std::iter::once("gptq".to_owned()).chain(rest).collect());
        }
        // A package's name, as of `uv tool install gptq`, is no command.
        let at = words.iter().position(own)?;
        (at == 0 || matches!(words[0].as_str(), "torchrun" | "srun" | "mpirun" | "uvx"))
            .then(|| words[at..].to_vec())
    }
}
