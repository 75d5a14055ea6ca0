//! Tests of windows: where they begin, how sources are mixed, what chat templates are given.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use super::*;
use crate::dataset::{DatasetSpec, Join};
use crate::protocol::Protocol;

/// Words w0 to w63 by their numbers, `<s>` (64) before every text, and `<e>` (65) where it is written.
fn tokenizer(folder: &Path) -> TextTokenizer {
    let added = |id: u32, token: &str| {
        format!(
            r#"{{"id": {id}, "content": "{token}", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}}"#
        )
    };
    let words: String = (0..64).map(|word| format!("\"w{word}\": {word}, ")).collect();
    let text = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [{}, {}], "pre_tokenizer": {{"type": "WhitespaceSplit"}},
            "post_processor": {{"type": "TemplateProcessing",
                "single": [{{"SpecialToken": {{"id": "<s>", "type_id": 0}}}},
                           {{"Sequence": {{"id": "A", "type_id": 0}}}}],
                "pair": [{{"Sequence": {{"id": "A", "type_id": 0}}}},
                         {{"Sequence": {{"id": "B", "type_id": 1}}}}],
                "special_tokens": {{"<s>": {{"id": "<s>", "ids": [64], "tokens": ["<s>"]}}}}}},
            "decoder": null,
            "model": {{"type": "WordLevel", "vocab": {{{words}"<s>": 64, "<e>": 65}},
                       "unk_token": "<e>"}}}}"#,
        added(64, "<s>"),
        added(65, "<e>")
    );
    fs::write(folder.join("tokenizer.json"), text).unwrap();
    TextTokenizer::open(folder, 66).unwrap()
}

/// A folder of sources and a tokenizer.
struct Sources {
    folder: tempfile::TempDir,
    tokenizer: TextTokenizer,
}

impl Sources {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(folder.path());
        Self { folder, tokenizer }
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        fs::write(self.folder.path().join(name), text).unwrap();
        self
    }

    /// The windows of a recipe that ends with `keys`; seed 0, windows of three tokens.
    fn sample(&self, keys: &str) -> Result<Calibration> {
        self.render(keys, Some(&template))
    }

    fn render(&self, keys: &str, chat: Option<&Render<'_>>) -> Result<Calibration> {
        let path = self.folder.path().join("own.toml");
        fs::write(&path, format!("name = \"own\"\nseq_len = 3\nseed = 0\n{keys}")).unwrap();
        let recipe = CalibrationRecipe::open(path.to_str().unwrap())?;
        recipe.sample(&self.tokenizer, chat)
    }
}

/// `<s> w1 <e> w2 <e>`: what each side says, and `<s>` at the beginning. Roles alternate.
fn template(messages: &[Message]) -> Result<String, Unrendered> {
    if messages.iter().zip(messages.iter().skip(1)).any(|(a, b)| a.role == b.role) {
        return Err(Unrendered::Refused("roles must alternate".to_owned()));
    }
    if messages[0].content.contains("broken") {
        return Err(Unrendered::Failed("the template is broken".into()));
    }
    Ok(messages.iter().fold("<s>".to_owned(), |text, m| format!("{text} {} <e>", m.content)))
}

fn words(range: std::ops::Range<usize>) -> String {
    range.map(|word| format!("w{word} ")).collect()
}

fn chat(prompt: &str, response: &str) -> String {
    format!("{{\"prompt\": \"{prompt}\", \"response\": \"{response}\"}}\n")
}

/// Two texts whose offsets are Python's: `random.seed(SEED); [random.randint(0, N - 3 - 1) for …]`.
#[test]
fn the_second_source_is_drawn_with_the_next_seed() {
    let sources = Sources::new();
    // With `<s>` 12 and 10 tokens.
    sources.write("a.txt", &words(0..11)).write("b.txt", &words(20..29));
    let text = |name: &str, windows: usize| {
        format!("[[source]]\ndataset = \"{name}\"\njoin = \"card\"\nwindows = {windows}\n")
    };
    let drawn = sources.sample(&(text("a.txt", 3) + &text("b.txt", 2))).unwrap();
    // Seed 0, randint(0, 8): 6, 6, 0; seed 1, randint(0, 6): 1, 4.
    let place = |source, token| Place { source, start: Start::Token(token) };
    assert_eq!(drawn.places, [place(0, 6), place(1, 1), place(0, 6), place(1, 4), place(0, 0)]);
    assert_eq!(
        drawn.windows,
        [[5, 6, 7], [20, 21, 22], [5, 6, 7], [23, 24, 25], [64, 0, 1]].map(|w| w.to_vec())
    );
    assert_eq!((drawn.tokens(), drawn.longest(), drawn.workload()), (15, 3, (5, 3)));
    let of = |source: usize| (drawn.sources[source].tokens, drawn.sources[source].repeated);
    // The first two windows of a.txt are the same.
    assert_eq!((of(0), of(1)), ((9, 3), (6, 0)));
    assert_eq!(drawn.dataset.each().len(), 2);
    // Alone, the first source is what it always was.
    let alone = sources.sample("dataset = \"a.txt\"\njoin = \"card\"\nwindows = 3\n").unwrap();
    assert_eq!(alone.windows, [[5, 6, 7], [5, 6, 7], [64, 0, 1]].map(|w| w.to_vec()));
    assert!(alone.dataset.sources.is_empty());
}

#[test]
fn any_run_of_windows_holds_every_source_by_its_share() {
    assert_eq!(evenly(&[3]), [0, 0, 0]);
    assert_eq!(evenly(&[2, 2]), [0, 1, 0, 1]);
    assert_eq!(evenly(&[4, 1]), [0, 0, 1, 0, 0]);
    for counts in [vec![102, 26], vec![96, 32], vec![7, 5, 3], vec![50, 1, 1]] {
        let order = evenly(&counts);
        let all = order.len();
        for (source, &count) in counts.iter().enumerate() {
            assert_eq!(order.iter().filter(|&&s| s == source).count(), count);
            let mut seen = 0.0;
            for (index, &of) in order.iter().enumerate() {
                seen += f64::from(u8::from(of == source));
                let due = count as f64 * (index + 1) as f64 / all as f64;
                assert!((seen - due).abs() < 1.5, "{counts:?}: {seen} of {due} at {index}");
            }
        }
    }
}

#[test]
fn a_text_must_exceed_a_window_by_one_token() {
    let sources = Sources::new();
    let keys = "dataset = \"own.txt\"\njoin = \"paragraphs\"\nwindows = 3\n";
    let drawn = sources.write("own.txt", &words(5..8)).sample(keys).unwrap();
    assert_eq!(drawn.windows, vec![vec![64, 5, 6]; 3]);
    assert_eq!(drawn.places, vec![Place { source: 0, start: Start::Token(0) }; 3]);
    assert_eq!(drawn.sources[0].tokens_in_text, Some(4));
    let error = sources.write("own.txt", &words(5..7)).sample(keys).unwrap_err();
    assert!(error.to_string().ends_with("gives 3 tokens but one window needs 4"), "{error}");
    assert_eq!(error.hint().unwrap(), "use a longer text or a smaller seq_len");
}

// python3 -c "import hashlib, struct; p = struct.pack
//   print(hashlib.sha256(p('<4I', 5, 6, 7, 8) * 3).hexdigest())
//   print(hashlib.sha256(p('<I3I', 3, 1, 2, 3) + p('<II', 1, 4)).hexdigest())"
#[test]
fn digests_are_of_tokens_and_where_lengths_differ_of_these_too() {
    assert_eq!(
        digest(&vec![vec![5, 6, 7, 8]; 3], true),
        "5b5b71a62e4e69e465ecc618f3820e449afd344a2d3a55c038d2a9299d82a4a0"
    );
    assert_eq!(
        digest(&[vec![1, 2, 3], vec![4]], false),
        "977161a9d0bade49631811d69b20be9641c9aadbd20294807391e0c8f184d310"
    );
}

/// Rows in the order of `random.seed(0); r = list(range(5)); random.shuffle(r)`: 2, 1, 0, 4, 3.
#[test]
fn packed_conversations_follow_each_other_without_a_second_begin() {
    let sources = Sources::new();
    let rows: String =
        (0..5).map(|i| chat(&format!("w{}", 10 * i), &format!("w{}", 10 * i + 1))).collect();
    sources.write("a.jsonl", &rows);
    let seen = RefCell::new(Vec::new());
    let render = |messages: &[Message]| {
        seen.borrow_mut().push(messages[0].content.clone());
        template(messages)
    };
    let keys = "dataset = \"a.jsonl\"\ntemplate = \"chat\"\nwindows = 3\n";
    let drawn = sources.render(keys, Some(&render)).unwrap();
    // Five tokens a row, `<s> Q <e> A <e>`; nine are needed, so that two rows do.
    assert_eq!(drawn.windows, [[64, 20, 65], [21, 65, 64], [10, 65, 11]].map(|w| w.to_vec()));
    let starts: Vec<Start> = drawn.places.iter().map(|place| place.start).collect();
    assert_eq!(starts, [Start::Row(2), Start::Row(2), Start::Row(1)]);
    // And one more for the window that is held out.
    assert_eq!(*seen.borrow(), ["w20", "w10", "w0"]);
    assert_eq!(drawn.held_out, [[65, 64, 0]]);
    assert!(drawn.is_even());
    assert_eq!((drawn.sources[0].rows, drawn.sources[0].tokens_in_text), (5, None));
    let more = keys.replace("windows = 3", "windows = 9");
    let error = sources.sample(&more).unwrap_err();
    assert!(error.to_string().ends_with("give 25 tokens but 9 windows of 3 need 27"), "{error}");
    assert!(error.hint().unwrap().contains("fewer windows"));
}

#[test]
fn padded_conversations_are_windows_of_their_own_and_pads_are_not_there() {
    let sources = Sources::new();
    let long = words(1..9);
    sources.write("a.jsonl", &(chat(&long, "w1") + &chat("w2", "w3") + &chat("w4", "w5")));
    let keys = "dataset = \"a.jsonl\"\ntemplate = \"chat\"\nrows = \"padded\"\nwindows = 3\n";
    let drawn = sources.sample(keys).unwrap();
    // random.seed(0); r = list(range(3)); random.shuffle(r): 0, 2, 1. Cut at three tokens.
    assert_eq!(drawn.windows, [[64, 1, 2], [64, 4, 65], [64, 2, 65]].map(|w| w.to_vec()));
    let path = sources.folder.path().join("own.toml");
    let overrides = CalibrationOverrides { seq_len: Some(7), ..Default::default() };
    let recipe = CalibrationRecipe::open(path.to_str().unwrap()).unwrap().with(overrides).unwrap();
    let drawn = recipe.sample(&sources.tokenizer, Some(&template)).unwrap();
    let lengths: Vec<usize> = drawn.windows.iter().map(Vec::len).collect();
    assert_eq!((lengths, drawn.seq_len, drawn.longest()), (vec![7, 5, 5], 7, 7));
    assert!(!drawn.is_even());
    assert_eq!((drawn.tokens(), drawn.workload()), (17, (3, 7)));
    let more = CalibrationOverrides { windows: Some(4), ..Default::default() };
    let error = recipe.with(more).unwrap().sample(&sources.tokenizer, Some(&template)).unwrap_err();
    assert!(matches!(error, Error::TooFewRows { rows: 3, windows: 4, .. }), "{error}");
}

#[test]
fn padded_rows_of_text_begin_as_texts_do() {
    let sources = Sources::new();
    sources.write("a.jsonl", "{\"text\": \"w1\"}\n{\"text\": \" \"}\n{\"text\": \"w3 w4 w5\"}\n");
    let keys = "dataset = \"a.jsonl\"\nrows = \"padded\"\nwindows = 2\n";
    let drawn = sources.sample(keys).unwrap();
    assert_eq!(drawn.windows, [vec![64, 1], vec![64, 3, 4]]);
}

#[test]
fn conversations_that_the_template_refuses_are_counted_and_others_taken() {
    let sources = Sources::new();
    let twice = "{\"messages\": [{\"role\": \"user\", \"content\": \"w1\"}, \
                 {\"role\": \"user\", \"content\": \"w2\"}]}\n";
    let good = "{\"messages\": [{\"role\": \"user\", \"content\": \"w3 w4\"}]}\n";
    let keys = "dataset = \"a.jsonl\"\ntemplate = \"chat\"\nwindows = 1\n";
    let drawn = sources.write("a.jsonl", &(twice.repeat(4) + good)).sample(keys).unwrap();
    assert_eq!(drawn.windows, [[64, 3, 4]].map(|w| w.to_vec()));
    // The shuffle has the good one fourth.
    assert_eq!(drawn.sources[0].refused, Some((3, "roles must alternate".to_owned())));
    let error = sources.write("a.jsonl", twice).sample(keys).unwrap_err();
    assert!(error.to_string().ends_with("a.jsonl`: roles must alternate"), "{error}");
    let error = sources.write("a.jsonl", &chat("broken", "w1")).sample(keys).unwrap_err();
    assert!(error.to_string().starts_with("Conversation 1 of `"), "{error}");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("is broken"));
    let error = sources.render(keys, None).unwrap_err();
    assert!(error.to_string().contains("the model has no chat template"), "{error}");
    assert!(error.hint().unwrap().contains("without `template`"));
}

/// The published branches' windows, cut from the real text by the real tokenizer.
#[test]
fn card_recipe_reproduces_the_published_windows() {
    let Some(shared) = crate::needs::shared() else { return };
    let hub = shared.join("hf/hub");
    let snapshot = |repo: &str| {
        let revision = fs::read_to_string(hub.join(repo).join("refs/main")).unwrap();
        hub.join(repo).join("snapshots").join(revision.trim())
    };
    let model = snapshot("models--stabilityai--StableBeluga2");
    let tokenizer = TextTokenizer::open(&model, 32_000).unwrap();
    assert_eq!(tokenizer.bos(), Some(1));
    // By the path of its file, so that the test does not depend on HF_HOME.
    let file = snapshot("datasets--Salesforce--wikitext")
        .join("wikitext-2-raw-v1/test-00000-of-00001.parquet");
    let dataset: DatasetSpec = file.to_str().unwrap().parse().unwrap();
    let overrides = CalibrationOverrides { dataset: Some(dataset.clone()), ..Default::default() };
    let card = CalibrationRecipe::open("card").unwrap().with(overrides).unwrap();

    let calibration = card.sample(&tokenizer, None).unwrap();
    assert_eq!(calibration.sources[0].tokens_in_text, Some(335_688));
    let offsets: Vec<usize> = calibration
        .places
        .iter()
        .map(|place| match place.start {
            Start::Token(token) => token,
            Start::Row(row) => panic!("row {row}"),
        })
        .collect();
    assert_eq!(offsets[..6], [201979, 220500, 21225, 135746, 268055, 254766]);
    assert_eq!(offsets.iter().min(), Some(&599));
    assert_eq!(offsets.iter().max(), Some(&330_378));
    assert_eq!(
        calibration.sha256,
        "34b7533d44aeb79631ca1cc86b5032f75462a8580cb9086e067d08cf8b53cada"
    );

    let text = Join::Paragraphs.text(dataset.rows().unwrap());
    let ids = tokenizer.encode(&text).unwrap();
    assert_eq!(ids.len(), 341_469);
    let windows = Protocol::Paper.windows(&ids, 2048, tokenizer.bos(), None).unwrap();
    assert_eq!(windows.len(), 166);
}

/// As many as an eighth, where the text has room between and beside the windows, none of whose tokens they hold.
#[test]
fn windows_that_are_held_out_share_no_token_with_the_others() {
    let sources = Sources::new();
    sources.write("a.txt", &words(0..60));
    let keys =
        |windows: usize| format!("dataset = \"a.txt\"\njoin = \"card\"\nwindows = {windows}\n");
    for windows in [1, 2, 5, 9] {
        let drawn = sources.sample(&keys(windows)).unwrap();
        assert_eq!(drawn.held_out.len(), windows.div_ceil(HELD_OUT), "{windows}");
        let mut seen: Vec<u32> = drawn.windows.concat();
        seen.extend(drawn.held_out.concat());
        let held = |window: &Vec<u32>| {
            window.iter().all(|id| seen.iter().filter(|s| *s == id).count() == 1)
        };
        assert!(drawn.held_out.iter().all(held), "{:?}, {:?}", drawn.windows, drawn.held_out);
    }
    // Where windows cover the text, none is left.
    assert!(sources.sample(&keys(400)).unwrap().held_out.is_empty());
    assert_eq!(between(&[3, 20, 4], 30, 3, 9), [0, 7, 10, 13, 16, 23, 26]);
    assert_eq!(between(&[3, 20, 4], 30, 3, 2), [7, 23]);
    assert_eq!(between(&[0], 4, 4, 1), [0; 0]);
}

/// Rows and conversations behind those that the windows took; what gives no text is passed over.
#[test]
fn rows_that_are_held_out_are_those_behind_the_others() {
    let sources = Sources::new();
    let rows: String = (0..3).map(|row| format!("{{\"text\": \"w{row}\"}}\n")).collect();
    sources.write("a.jsonl", &rows);
    let text = |windows: usize| {
        let keys = format!("dataset = \"a.jsonl\"\nrows = \"padded\"\nwindows = {windows}\n");
        sources.sample(&keys).unwrap()
    };
    // random.seed(0); r = list(range(3)); random.shuffle(r): 0, 2, 1.
    assert_eq!((text(1).windows, text(1).held_out), (vec![vec![64, 0]], vec![vec![64, 2]]));
    assert_eq!(text(3).held_out, [[0; 0]; 0]);
    let chats = chat("w1", "w2") + &chat("w3 w4 w5", "w6") + &chat("broken", "w9");
    sources.write("b.jsonl", &chats);
    let chats = |rows: &str| {
        sources.sample(&format!(
            "dataset = \"b.jsonl\"\ntemplate = \"chat\"\nrows = \"{rows}\"\nwindows = 1\n"
        ))
    };
    let padded = chats("padded").unwrap();
    let all = |ids: &str| sources.tokenizer.encode_chat(ids).unwrap();
    let first = template(&[Message::new("user", "w1"), Message::new("assistant", "w2")]).unwrap();
    let third =
        template(&[Message::new("user", "w3 w4 w5"), Message::new("assistant", "w6")]).unwrap();
    assert_eq!(padded.windows, [all(&first)[..3].to_vec()]);
    assert_eq!(padded.held_out, [all(&third)[..3].to_vec()]);
    let packed = chats("packed").unwrap();
    let stream = [all(&first), all(&third)].concat();
    assert_eq!((&packed.windows[0][..], &packed.held_out[0][..]), (&stream[..3], &stream[3..6]));
    assert_eq!(packed.sources[0].refused, None);
}
