//! Tests of recipes as they are written.

use std::fs;

use super::*;

const RECIPE: &str = r#"
    name = "own"
    dataset = "text/own.txt"
    join = "paragraphs"
    windows = 3
    seq_len = 4
    seed = 0
"#;

/// A recipe of these sources; `top` are keys before them.
fn sources(top: &str, sources: &[&str]) -> Result<CalibrationRecipe> {
    let tables: String = sources.iter().map(|keys| format!("[[source]]\n{keys}\n")).collect();
    let text = format!("name = \"own\"\nseq_len = 4\nseed = 0\n{top}\n{tables}");
    CalibrationRecipe::parse(&text, "own.toml")
}

fn counts(recipe: &CalibrationRecipe) -> Vec<usize> {
    recipe.sources.iter().map(|source| source.windows).collect()
}

fn shares(windows: usize, shares: &[f64]) -> Result<Vec<usize>> {
    let tables: Vec<String> = shares
        .iter()
        .map(|share| format!("dataset = \"a.txt\"\njoin = \"card\"\nshare = {share:?}"))
        .collect();
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    sources(&format!("windows = {windows}"), &tables).map(|recipe| counts(&recipe))
}

#[test]
fn built_in_recipes_are_as_published() {
    let open = |name| CalibrationRecipe::open(name).unwrap();
    let card = open("card");
    let only = &card.sources[0];
    assert_eq!(only.dataset.to_string(), "Salesforce/wikitext:wikitext-2-raw-v1:test");
    assert_eq!((only.cut, only.windows), (Cut::Text(Join::Card), 128));
    assert_eq!((card.sources.len(), card.seq_len, card.seed), (1, 4096, 0));
    let clean = open("wikitext2");
    let only = &clean.sources[0];
    assert_eq!(only.dataset.to_string(), "Salesforce/wikitext:wikitext-2-v1:validation");
    assert_eq!((only.cut, only.windows, clean.seq_len), (Cut::Text(Join::Card), 128, 2048));
    let mix = open("mix");
    assert_eq!((counts(&mix), mix.seq_len), (vec![102, 26], 2048));
    assert_eq!(
        mix.unread().name,
        "Salesforce/wikitext:wikitext-2-v1:validation + builtin:addresses"
    );
    for name in CalibrationRecipe::built_in_names() {
        assert_eq!(open(name).name, name);
    }
    assert!(CalibrationRecipe::built_in_names().any(|name| name == CalibrationRecipe::DEFAULT));
}

/// The examples that lie in the repository.
#[test]
fn example_recipes_are_recipes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../calib");
    let open = |name: &str| CalibrationRecipe::open(folder.join(name).to_str().unwrap()).unwrap();
    let chat = open("chat.toml");
    assert_eq!(counts(&chat), [96, 32]);
    assert_eq!(chat.sources[0].cut, Cut::Chats);
    assert!(chat.is_chat() && !open("demo.toml").is_chat());
}

#[test]
fn a_file_takes_its_datasets_from_its_own_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.toml");
    fs::write(&path, RECIPE).unwrap();
    let recipe = CalibrationRecipe::open(path.to_str().unwrap()).unwrap();
    let expected = folder.path().join("text/own.txt");
    assert_eq!(recipe.sources[0].dataset.to_string(), expected.to_str().unwrap());
    assert_eq!(recipe.name, "own");
}

#[test]
fn invalid_recipes_say_why() {
    for (from, to, reason) in [
        ("seed = 0", "sede = 0", "unknown field `sede`"),
        ("seed = 0", "", "missing field `seed`"),
        ("windows = 3", "", "missing field `windows`"),
        ("dataset = \"text/own.txt\"", "", "missing field `dataset`"),
        ("join = \"paragraphs\"", "", "missing field `join`"),
        ("\"paragraphs\"", "\"lines\"", "unknown variant `lines`"),
        ("windows = 3", "windows = 0", "windows must be at least 1"),
        ("seq_len = 4", "seq_len = 0", "seq_len must be at least 1"),
        ("windows = 3", "windows = 1099511627776", "windows is more than 2^24"),
        ("seq_len = 4", "seq_len = 1099511627776", "more than 2^40 tokens"),
        ("text/own.txt", "text/own.csv", "Dataset `text/own.csv` cannot be read"),
        ("seed = 0", "seed = 0\nshare = 1", "unknown field `share`"),
        ("seed = 0", "seed = 0\ntemplate = \"chat\"", "join and template exclude each other"),
        ("seed = 0", "seed = 0\nrows = \"padded\"", "padded rows are not joined"),
        ("join = \"paragraphs\"", "rows = \"packed\"", "packed rows of text need a `join`"),
        ("join = \"paragraphs\"", "template = \"alpaca\"", "unknown variant `alpaca`"),
    ] {
        let error = CalibrationRecipe::parse(&RECIPE.replace(from, to), "own.toml");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("`own.toml` is invalid") && error.contains(reason), "{error}");
    }
    let error = CalibrationRecipe::open("cards").unwrap_err().to_string();
    assert!(error.starts_with("Calibration recipe `cards` is neither built in (wikitext2, mix, "));
    assert!(matches!(CalibrationRecipe::open("no.toml"), Err(Error::Read { .. })));
}

#[test]
fn sources_that_contradict_themselves_say_why() {
    let a = "dataset = \"a.txt\"\njoin = \"card\"\n";
    let with = |key: &str| format!("{a}{key}");
    let (share, windows) = (with("share = 1"), with("windows = 2"));
    for (top, tables, reason) in [
        ("windows = 4", vec![&*share, &*windows], "either each of its sources has a share, or"),
        ("windows = 4", vec![a, &*share], "either each of its sources has a share, or"),
        ("windows = 4", vec![&*windows], "windows stand in its sources and at its top"),
        ("", vec![&*share], "its sources have shares of windows, and it has no windows"),
        ("windows = 4\njoin = \"card\"", vec![&*share], "belong into its [[source]] tables"),
        ("windows = 4", vec!["share = 1\njoin = \"card\""], "missing field `dataset`"),
        (
            "windows = 4",
            vec!["share = 1\ndataset = \"a.txt\""],
            "source `a.txt`: missing field `join`",
        ),
        ("windows = 4", vec![&*with("share = 0")], "source `a.txt`: share must be more than 0"),
        ("windows = 4", vec![&*with("share = nan")], "share must be more than 0"),
        ("windows = 4", vec![&*with("share = inf")], "share must be more than 0"),
        ("", vec![&*with("windows = 0")], "source `a.txt`: windows must be at least 1"),
        ("", vec![&*with("windows = -1")], "invalid value"),
        ("windows = 1", vec![&*share, &*share], "source `a.txt` gets none of the 1 windows"),
        ("windows = 99", vec![&*share; 65], "more than 64 sources"),
    ] {
        let error = sources(top, &tables).unwrap_err().to_string();
        assert!(error.contains("`own.toml` is invalid") && error.contains(reason), "{error}");
    }
}

#[test]
fn shares_are_of_their_sum_and_windows_add_up() {
    assert_eq!(shares(128, &[0.8, 0.2]).unwrap(), [102, 26]);
    assert_eq!(shares(128, &[8.0, 2.0]).unwrap(), [102, 26]);
    assert_eq!(shares(10, &[1.0, 1.0, 1.0]).unwrap(), [4, 3, 3]);
    assert_eq!(shares(4, &[0.8, 0.2]).unwrap(), [3, 1]);
    assert_eq!(shares(7, &[1.0]).unwrap(), [7]);
    // 3.5, 1.75 and 1.75: the later two lack more.
    assert_eq!(shares(7, &[2.0, 1.0, 1.0]).unwrap(), [3, 2, 2]);
    // Of tenths, which are no binary fractions, too; and of any size.
    assert_eq!(shares(10, &[0.2, 0.3, 0.7, 0.6, 0.2]).unwrap(), [1, 2, 3, 3, 1]);
    assert_eq!(shares(100, &[0.8, 0.8, 0.6, 0.2]).unwrap(), [34, 33, 25, 8]);
    assert_eq!(shares(8, &[1.7e308, 0.3e308]).unwrap(), [7, 1]);
    assert_eq!(shares(8, &[5e307, 1e307]).unwrap(), [7, 1]);
    assert!(shares(1 << 25, &[1.0]).unwrap_err().to_string().contains("2^24"));
    for windows in 3..200 {
        let counts = shares(windows, &[0.37, 0.33, 0.3]).unwrap();
        assert_eq!(counts.iter().sum::<usize>(), windows);
        for (count, share) in counts.iter().zip([0.37, 0.33, 0.3]) {
            assert!((*count as f64 - share * windows as f64).abs() < 1.0, "{windows}: {counts:?}");
        }
    }
    let tables = [
        "dataset = \"a.txt\"\njoin = \"card\"\nwindows = 5",
        "dataset = \"b.jsonl\"\nrows = \"padded\"\ntemplate = \"chat\"\nwindows = 3",
    ];
    let recipe = sources("", &tables).unwrap();
    assert_eq!((counts(&recipe), recipe.windows()), (vec![5, 3], 8));
    assert_eq!(recipe.sources[1].cut, Cut::ChatRows);
}

#[test]
fn overrides_replace_only_what_they_name() {
    let recipe = CalibrationRecipe::parse(RECIPE, "own").unwrap();
    assert_eq!(recipe.clone().with(CalibrationOverrides::default()).unwrap(), recipe);
    let overrides = CalibrationOverrides {
        dataset: Some("b.txt".parse().unwrap()),
        join: Some(Join::Card),
        windows: Some(7),
        seq_len: Some(8),
        seed: Some(9),
    };
    let changed = recipe.clone().with(overrides).unwrap();
    assert_eq!((changed.windows(), changed.seq_len, changed.seed), (7, 8, 9));
    assert_eq!(recipe.sources[0].cut, Cut::Text(Join::Paragraphs));
    assert_eq!(changed.sources[0].cut, Cut::Text(Join::Card));
    assert_eq!(changed.sources[0].dataset.to_string(), "b.txt");
    let none = CalibrationOverrides { windows: Some(0), ..Default::default() };
    assert!(recipe.with(none).is_err());
}

#[test]
fn overrides_of_several_sources_keep_their_shares_or_replace_them() {
    let mix = || CalibrationRecipe::open("mix").unwrap();
    let fewer = CalibrationOverrides { windows: Some(10), ..Default::default() };
    assert_eq!(counts(&mix().with(fewer).unwrap()), [8, 2]);
    let one = CalibrationOverrides { windows: Some(1), ..Default::default() };
    let error = mix().with(one).unwrap_err().to_string();
    assert!(error.contains("`mix` is invalid: source `builtin:addresses` gets none"), "{error}");
    let joined = CalibrationOverrides { join: Some(Join::Paragraphs), ..Default::default() };
    let cuts: Vec<Cut> = mix().with(joined).unwrap().sources.iter().map(|s| s.cut).collect();
    assert_eq!(cuts, [Cut::Text(Join::Paragraphs); 2]);
    let dataset: Option<DatasetSpec> = Some("b.txt".parse().unwrap());
    let replaced = CalibrationOverrides { dataset, ..Default::default() };
    let replaced = mix().with(replaced).unwrap();
    assert_eq!((counts(&replaced), replaced.sources[0].cut), (vec![128], Cut::Text(Join::Card)));
    let chat = sources("windows = 4", &["dataset = \"a.jsonl\"\ntemplate = \"chat\"\nshare = 1"]);
    let joined = CalibrationOverrides { join: Some(Join::Paragraphs), ..Default::default() };
    let error = chat.unwrap().with(joined).unwrap_err().to_string();
    assert!(error.contains("none of its sources joins rows"), "{error}");
}
