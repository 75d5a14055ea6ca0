//! Tests of dataset names, joins and the layout of the Hub cache.

use super::*;
use crate::needs::shared;

fn spec(text: &str) -> DatasetSpec {
    text.parse().unwrap()
}

/// What `rows` does after it has found the snapshot folder.
fn rows_in(snapshot: &Path, text: &str) -> Result<Vec<String>> {
    let spec = spec(text);
    let Place::Hub(hub) = &spec.place else { panic!("{text} is not on the Hub") };
    spec.rows_of(&spec.files_of_split(hub, snapshot)?)
}

#[test]
fn names_round_trip() {
    for text in [
        "Salesforce/wikitext:wikitext-2-raw-v1:test",
        "wikitext:wikitext-2-v1:validation",
        "allenai/c4:default:train#body",
        "/a b/c.TXT",
        "notes#1/x.txt",
        "x.jsonl#content",
        "../x.parquet",
        "builtin:addresses",
    ] {
        let spec = spec(text);
        assert_eq!(spec.to_string(), text);
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<DatasetSpec>(&json).unwrap(), spec);
    }
}

#[test]
fn bad_names_are_refused() {
    for text in [
        "",
        "wikitext",
        "Salesforce/wikitext:test",
        "a/b/c:d:e",
        "a/b:../..:test",
        "a/b::test",
        "a/b:c:d:e",
        "data.csv",
        "x.txt#text",
        "x.jsonl#",
        "builtin:poems",
        "builtin:addresses#text",
    ] {
        let error = text.parse::<DatasetSpec>().unwrap_err();
        assert!(matches!(error, Error::DatasetSyntax { .. }), "{text}: {error}");
    }
}

#[test]
fn joins() {
    let rows = ["", " = A = \n", "", " b \n"].map(str::to_owned);
    assert_eq!(Join::Card.text(rows.to_vec()), " \n = A = \n \n b \n");
    assert_eq!(Join::Paragraphs.text(rows.to_vec()), "\n\n = A = \n\n\n\n\n b \n");
    for whole in ["any\n\ntext", "a"] {
        for (name, join) in Join::ALL {
            assert_eq!(join.text(vec![whole.to_owned()]), whole);
            assert_eq!((name.parse(), join.to_string()), (Ok(join), name.to_owned()));
        }
    }
    assert_eq!(Join::Card.text(vec![String::new()]), " \n");
    assert!("lines".parse::<Join>().is_err());
}

#[test]
fn rows_that_run_into_the_next_are_counted() {
    let glued = |join: Join, rows: &[&str]| {
        join.glued(&rows.iter().map(|&row| row.to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(glued(Join::Card, &["one", "two", "three\n", "four", " five", "", "six"]), 2);
    assert_eq!(glued(Join::Card, &["one", "two", "three"]), 2);
    assert_eq!(glued(Join::Card, &["one"]), 0);
    assert_eq!(glued(Join::Paragraphs, &["one", "two", "three"]), 0);
}

#[test]
fn file_names_give_split_and_number_of_files() {
    for (name, expected) in [
        ("test-00000-of-00001.parquet", Some(("test", Some(1)))),
        ("train-00002-of-00012-0a1b2c.parquet", Some(("train", Some(12)))),
        ("validation-2-00000-of-00003.parquet", Some(("validation-2", Some(3)))),
        ("test-0.parquet", Some(("test", None))),
        ("test.parquet", None),
        ("test-all.parquet", None),
        ("test-00000-of-00001.json", None),
    ] {
        assert_eq!(parse_file_name(name), expected, "{name}");
    }
}

#[test]
fn missing_splits_say_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path();
    let error = rows_in(snapshot, "a/b:default:test").unwrap_err().to_string();
    assert!(
        error.starts_with(
            "Dataset `a/b:default:test` has no `default/test-*.parquet` or `data/test-*.parquet`"
        ) && error.ends_with("it holds no parquet files"),
        "{error}"
    );
    for file in ["en/train-00000-of-00001.parquet", "data/dev-00000-of-00001.parquet"] {
        let path = snapshot.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let error = rows_in(snapshot, "a/b:en:test").unwrap_err().to_string();
    assert!(error.ends_with("it holds default:dev, en:train"), "{error}");
    let error = rows_in(snapshot, "a/b:de:test").unwrap_err().to_string();
    assert!(error.ends_with("it holds default:dev, en:train"), "{error}");
}

#[test]
fn partly_downloaded_splits_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("en")).unwrap();
    fs::write(folder.path().join("en/test-00001-of-00003.parquet"), "").unwrap();
    let error = rows_in(folder.path(), "a/b:en:test").unwrap_err();
    assert!(matches!(error, Error::SplitIncomplete { found: 1, expected: 3, .. }), "{error}");
}

#[test]
fn local_files_and_their_identity() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.txt"), "one\n\ntwo\n").unwrap();
    fs::write(folder.path().join("a.jsonl"), "{\"body\":\"one\"}\n{\"body\":\"two\"}\n").unwrap();
    let text = spec("a.txt").relative_to(folder.path()).load().unwrap();
    let lines = spec("a.jsonl#body").relative_to(folder.path()).load().unwrap();
    assert_eq!(text.rows, ["one\n\ntwo\n"]);
    assert_eq!(lines.rows, ["one", "two"]);
    assert!(gptq_records::dataset_identity::contaminated(&text.identity, &lines.identity));
    fs::write(folder.path().join("a.txt"), " \n").unwrap();
    let blank = spec("a.txt").relative_to(folder.path()).rows();
    assert!(matches!(blank, Err(Error::NoText { .. })));
}

#[test]
fn wikitext_in_the_cache_is_the_canonical_file() {
    let Some(shared) = shared() else { return };
    let cache = shared.join("hf/hub/datasets--Salesforce--wikitext");
    let revision = fs::read_to_string(cache.join("refs/main")).unwrap();
    let snapshot = cache.join("snapshots").join(revision.trim());
    let rows = rows_in(&snapshot, "Salesforce/wikitext:wikitext-2-raw-v1:test").unwrap();
    assert_eq!(rows.len(), 4358);
    // The size of wiki.test.raw, which the card join restores (format.md §3).
    assert_eq!(Join::Card.text(rows).len(), 1_290_590);
    let error = rows_in(&snapshot, "Salesforce/wikitext:wikitext-2-raw-v1:train").unwrap_err();
    let expected = "it holds wikitext-2-raw-v1:test, wikitext-2-v1:test, wikitext-2-v1:validation";
    assert!(error.to_string().ends_with(expected), "{error}");
}

/// Whoever measures on the file that the program has in itself is told.
#[test]
fn built_in_texts_are_those_of_the_repository() {
    let built_in = spec("builtin:addresses");
    assert_eq!((built_in.hub(), built_in.file(), built_in.is_missing()), (None, None, false));
    let built_in = built_in.load().unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../calib/demo/calibration.txt");
    let file = spec(file.to_str().unwrap()).load().unwrap();
    assert_eq!(built_in.rows, file.rows);
    assert!(gptq_records::dataset_identity::contaminated(&built_in.identity, &file.identity));
    assert_eq!(built_in.identity.portable().name, "builtin:addresses");
    let error = spec("builtin:addresses").conversations().unwrap_err();
    assert!(matches!(error, Error::NoConversations { .. }), "{error}");
}
