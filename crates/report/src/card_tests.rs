use std::fs;

use gptq_checkpoint::loaders::{LoaderVerdict, Seen};
use yaml_rust2::{Yaml, YamlLoader};

use super::*;
use crate::card_loaders::Note;
use crate::samples::{branch, report};

const FACTS: &str = r####"
    name = "Whale: the \"big\" one # 2"
    repository = "my-org/Whale-GPTQ"
    base_model = "sea/Whale"
    author = "Sea | Co <sea>"
    author_link = "https://example.org/sea"
    license = "llama2"
    languages = ["en", "no"]
    datasets = ["sea/songs"]
    quantized_by = "'me'"
    description = "Knows *all* about | water."
    [prompt]
    name = "Orca"
    template = "### System:\n{system_message}\n\n### User:\n{prompt}: ```\n"
"####;

fn facts(text: &str) -> Result<CardFacts> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("facts.toml");
    fs::write(&path, text).unwrap();
    CardFacts::open(&path, None)
}

fn verdict(loader: &'static str, loads: bool, reasons: &[&str]) -> LoaderVerdict {
    let reasons = reasons.iter().map(|&reason| reason.to_owned()).collect();
    LoaderVerdict { loader, loads, reasons, release: "1.0", seen: Seen::Ran }
}

fn loaders() -> Vec<LoaderRow> {
    let report = branches();
    let of = |exllama: LoaderVerdict, kernel: &str| {
        vec![
            exllama,
            verdict("vLLM gptq", true, &["fp16 only"]),
            verdict("HF", true, &["v", kernel]),
        ]
    };
    let four = of(verdict("ExLlama", true, &["fast"]), "fast too");
    let three = of(verdict("ExLlama", false, &["3 bits: none"]), "slow");
    let [main, other] = report.branches.as_slice() else { panic!("{report:?}") };
    loader_rows(&[
        Judged { branch: main, verdicts: four },
        Judged { branch: other, verdicts: three },
    ])
}

fn branches() -> Report {
    let mut three = branch("3bit-128g", 3, Some(128), 19.8, 0.08);
    three.act_order = false;
    report([branch("main", 4, None, 19.0, 0.02), three])
}

fn rendered(report: &Report, this: usize) -> String {
    card(report, (&report.branches[this], "qwen2"), &facts(FACTS).unwrap(), &loaders()).unwrap()
}

/// The header of a card, as a YAML reader sees it.
fn header(card: &str) -> Yaml {
    let rest = card.strip_prefix("---\n").unwrap();
    let (header, _) = rest.split_once("\n---\n").unwrap();
    YamlLoader::load_from_str(header).unwrap().remove(0)
}

#[test]
fn the_header_is_yaml_that_holds_the_facts() {
    let facts = facts(FACTS).unwrap();
    let header = header(&rendered(&branches(), 0));
    let text = |key: &str| header[key].as_str().unwrap_or_else(|| panic!("{key}: {header:?}"));
    assert_eq!(text("model_name"), facts.name);
    assert_eq!(text("model_creator"), facts.author);
    assert_eq!(text("license"), "llama2");
    assert_eq!(text("base_model"), "sea/Whale");
    assert_eq!(text("quantized_by"), "'me'");
    assert_eq!(text("prompt_template"), facts.prompt.unwrap().template);
    assert_eq!(text("model_type"), "qwen2");
    assert_eq!(text("pipeline_tag"), "text-generation");
    // `no` is false in YAML 1.1 unless it is quoted.
    let languages = header["language"].as_vec().unwrap();
    assert_eq!(languages.iter().map(|l| l.as_str().unwrap()).collect::<Vec<_>>(), ["en", "no"]);
    assert_eq!(header["datasets"].as_vec().unwrap().len(), 1);
}

#[test]
fn facts_that_are_absent_leave_no_trace() {
    let bare = "name = \"n\"\nrepository = \"o/n\"\nauthor = \"a\"\nlicense = \"mit\"\n\
                languages = [\"en\"]\ndescription = \"d\"\n";
    let report = branches();
    let this = (&report.branches[0], "llama");
    let card = card(&report, this, &facts(bare).unwrap(), &[]).unwrap();
    let header = header(&card);
    for key in ["base_model", "datasets", "prompt_template", "quantized_by"] {
        assert!(header[key].is_badvalue(), "{key}");
    }
    assert!(!card.contains("## Prompt") && card.contains("Once upon a time"));
    assert!(!card.contains("undefined") && !card.contains("null"), "{card}");
}

#[test]
fn the_table_has_sizes_and_measurements_of_the_reports() {
    let card = rendered(&branches(), 1);
    let rows: Vec<&str> = card.lines().filter(|l| l.contains("/tree/")).collect();
    assert_eq!(
        rows,
        [
            "| [`main`](https://huggingface.co/my-org/Whale-GPTQ/tree/main) | 4 | none | yes | 0.01 \
             | calibration.txt | 512 | 4.04 MB | 19.000 | +1.5 % | 0.0200 | closest to the original |",
            "| **this:** [`3bit-128g`](https://huggingface.co/my-org/Whale-GPTQ/tree/3bit-128g) | 3 | 128 \
             | no | 0.01 | calibration.txt | 512 | 3.31 MB | 19.800 | +5.7 % | 0.0800 | smallest; \
             without act-order, for programs that cannot load it |",
        ]
    );
    assert!(card.contains("The fp16 model has perplexity 18.727"));
    assert!(card.contains("hf download my-org/Whale-GPTQ --revision 3bit-128g"));
    assert!(card.contains("repository, revision = \"my-org/Whale-GPTQ\", \"3bit-128g\""));
    assert!(card.contains("| ExLlama | `main` | fast; not 3 bits: none |"), "{card}");
    assert!(card.contains("| HF | all | v; 4 bits: fast too; 3 bits: slow |"), "{card}");
    assert!(card.contains("| vLLM gptq | all | fp16 only |"), "{card}");
    assert!(card.contains("vllm serve my-org/Whale-GPTQ --revision 3bit-128g"));
    assert!(!card.contains('⚠'));
}

#[test]
fn a_note_tells_whom_it_is_about_unless_it_is_all() {
    let made = [("a", 4), ("b", 4), ("c", 3), ("d", 2), ("e", 2), ("f", 4)]
        .map(|(name, bits)| branch(name, bits, Some(32), 19.0, 0.02));
    let notes = |verdicts: &[LoaderVerdict]| -> Vec<String> {
        let judged = made.iter().zip(verdicts);
        let judged: Vec<Judged<'_>> = judged
            .map(|(branch, verdict)| Judged { branch, verdicts: vec![verdict.clone()] })
            .collect();
        let text = |note: &Note| {
            let whose = note.whose.clone().unwrap_or_else(|| note.branches.concat());
            let not = if note.not { "not " } else { "" };
            format!("{not}{whose}|{}", note.text)
        };
        loader_rows(&judged)[0].notes.iter().map(text).collect()
    };
    let verdicts = [
        verdict("x", true, &["all", "some", "four"]),
        verdict("x", true, &["all", "four"]),
        verdict("x", true, &["all", "some"]),
        verdict("x", false, &["2 bits: none", "shards"]),
        verdict("x", false, &["2 bits: none", "narrow"]),
        // Others of its width are loaded.
        verdict("x", false, &["narrow"]),
    ];
    let loaded = ["|all", "ac|some", "4 bits|four"];
    let refused = ["not |2 bits: none", "not d|shards", "not ef|narrow"];
    assert_eq!(notes(&verdicts), [loaded, refused].concat());
    assert_eq!(notes(&verdicts[..4])[3..], ["not |2 bits: none", "not 2 bits|shards"]);
    let odd = [verdict("x", true, &[]), verdict("x", false, &["shards"])];
    assert_eq!(notes(&odd), ["not the others|shards"]);
    let none = [verdict("x", false, &["shards", "4 bits: none"])];
    assert_eq!(notes(&none), ["|shards", "|4 bits: none"]);
}

#[test]
fn the_dense_model_is_named_after_its_weights() {
    let mut report = branches();
    for branch in &mut report.branches {
        branch.source_dtype = gptq_records::source_dtype::SourceDtype::Fp32;
    }
    let card = rendered(&report, 0);
    assert!(card.contains("| Perplexity | to fp32 | KL |"), "{card}");
    assert!(card.contains("The fp32 model has perplexity 18.727"), "{card}");
    assert!(
        card.contains("divergence from the fp32 model") && card.contains("- Source dtype: fp32")
    );
}

#[test]
fn a_contaminated_text_is_flagged() {
    let mut report = branches();
    report.branches[0].evaluations[0].contaminated = true;
    let card = rendered(&report, 0);
    assert!(card.contains("| 19.000 ⚠ |") && card.contains("> ⚠ Calibrated on the text"), "{card}");
    report.branches[0].evaluations.clear();
    report.branches[1].evaluations.clear();
    assert!(rendered(&report, 0).contains("These branches were not measured."));
}

#[test]
fn text_of_the_facts_is_text_in_the_card() {
    let card = rendered(&branches(), 0);
    assert!(card.contains(r"Knows \*all\* about \| water."), "{card}");
    assert!(card.contains(r"[Sea \| Co \<sea\>](<https://example.org/sea>)"), "{card}");
    // The prompt holds a fence; its own is longer.
    assert!(card.contains("````\n### System:\n{system_message}"), "{card}");
}

#[test]
fn mistakes_in_the_facts_are_named() {
    for (from, to, reason) in [
        ("my-org/Whale-GPTQ", "Whale-GPTQ", "of the form ORG/NAME"),
        ("sea/Whale\"", "sea/Whale; rm -rf\"", "of the form ORG/NAME"),
        ("license =", "licence =", "unknown field `licence`"),
        ("{prompt}", "{question}", "no {prompt}"),
    ] {
        let error = facts(&FACTS.replace(from, to)).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("facts.toml"), "{error}");
    }
    let missing = CardFacts::open(Path::new("nowhere.toml"), None).unwrap_err();
    assert!(matches!(missing, Error::Records(gptq_records::Error::Io { .. })));
}

#[test]
fn the_facts_in_the_repository_are_valid() {
    let cards = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/cards");
    for (file, repository) in [("stablebeluga2.toml", None), ("demo.toml", Some("org/name"))] {
        let facts = CardFacts::open(&cards.join(file), repository).unwrap();
        let report = branches();
        let card = card(&report, (&report.branches[0], "llama"), &facts, &[]).unwrap();
        assert_eq!(header(&card)["model_name"].as_str(), Some(facts.name.as_str()));
        assert_eq!(repository.unwrap_or("my-org/StableBeluga2-70B-GPTQ"), facts.repository);
    }
}
