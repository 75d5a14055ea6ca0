//! From text to tokens, with the tokenizer that lies beside a checkpoint.
//!
//! A corpus is encoded as one string, as the reference scripts do: row by row there would be a BOS
//! before each and other tokens at the seams, which moves every window. A long one is given to the
//! tokenizer in overlapping pieces that are joined to the same tokens (see `pieces.rs`).

use std::path::{Path, PathBuf};

use gptq_checkpoint::TOKENIZER_FILE;
use tokenizers::Tokenizer;

use crate::bos::{adds_bos, find_bos};
use crate::error::{Error, Result};
use crate::pieces::{Cut, Placed, encode_in_pieces};
use crate::text_files::{read_if_present, without_mark};

/// A checkpoint's tokenizer, tied to the vocabulary of the model that will read its tokens.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    folder: PathBuf,
    vocab_size: usize,
    bos: Option<u32>,
    frame: Option<Frame>,
    /// What `add_bos_token` of the configuration says, if it is there.
    asked_for_bos: Option<bool>,
}

/// Texts that tokenizers with other normalizers, splits or special tokens take apart otherwise: cases,
/// digits, spaces and line ends, marks, scripts, composed and decomposed letters.
const PROBES: [&str; 6] = [
    "Hello",
    " The quick brown Fox, it's 1234567 times 3.14!",
    "two  spaces,\ta tab\n\nlines \r\nends  ",
    "fn main() { x_1 += a[0] << 2; } // #%@ <s></s><unk>",
    "\u{e9}t\u{e9} e\u{301} \u{fb01} \u{2167} \u{130}",
    "\u{4f60}\u{597d} \u{41f}\u{440}\u{438} \u{645}\u{631} \u{1f642}\u{200d}\u{a0}",
];

/// The special tokens that a tokenizer puts around every text.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    before: Vec<u32>,
    after: Vec<u32>,
}

/// The tokens of a text, or of its beginning.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether the text was read to its end.
    pub whole: bool,
}

impl TextTokenizer {
    /// Loads `tokenizer.json` from a checkpoint folder and finds its BOS token.
    ///
    /// `vocab_size` is the number of rows of the model's embedding.
    ///
    /// # Errors
    /// When `tokenizer.json` is absent or invalid, or when the configuration files beside it are
    /// invalid or name a BOS token that the tokenizer does not know.
    pub fn open(folder: &Path, vocab_size: usize) -> Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let Some(bytes) = read_if_present(&path)? else {
            return Err(Error::TokenizerMissing { folder: folder.to_owned() });
        };
        let invalid = |error: tokenizers::Error| Error::TokenizerInvalid {
            path: path.clone(),
            reason: error.to_string(),
        };
        let mut tokenizer = Tokenizer::from_bytes(without_mark(&bytes)).map_err(invalid)?;
        // Some checkpoints ship a tokenizer set up for training batches; a corpus must neither be
        // cut to their length nor filled up to it.
        tokenizer.with_truncation(None).map_err(invalid)?;
        tokenizer.with_padding(None);
        let bos = find_bos(folder, &tokenizer)?;
        let frame = Frame::of(&tokenizer);
        let asked_for_bos = adds_bos(folder)?;
        Ok(Self { tokenizer, folder: folder.to_owned(), vocab_size, bos, frame, asked_for_bos })
    }

    /// The BOS token of the model, if it has one. That encoding a text begins with it is not
    /// implied: some tokenizers know a BOS and add none.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The BOS token, if texts are to begin with it: `add_bos_token` of the tokenizer's
    /// configuration says so, or without a word of it encoding puts one there. What llama.cpp goes
    /// by; SmolLM2 names a BOS and adds none.
    #[must_use]
    pub fn added_bos(&self) -> Option<u32> {
        let first = self.frame.as_ref().and_then(|frame| frame.before.first());
        let added = self.asked_for_bos.unwrap_or(first.is_some() && first == self.bos.as_ref());
        self.bos.filter(|_| added)
    }

    /// Whether both were read from files that say the same, so that no text needs to be encoded to see
    /// that they make the same tokens of it.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let written = |of: &Self| of.tokenizer.to_string(false).ok();
        (self.vocab_size, self.bos, self.asked_for_bos)
            == (other.vocab_size, other.bos, other.asked_for_bos)
            && self.frame == other.frame
            && written(self).is_some_and(|mine| written(other) == Some(mine))
    }

    /// How the tokens that it makes of a text differ from another tokenizer's, in words; `None` where
    /// they do not. Files of one tokenizer differ by the program that wrote them, so vocabularies and
    /// merges are compared as they are understood, and all else by what becomes of a text that has
    /// something of everything. Tokens added to those of `base` change no text without them.
    #[must_use]
    pub fn difference(&self, base: &Self) -> Option<String> {
        let (mine, theirs) = (&self.tokenizer, &base.tokenizer);
        let known = theirs.get_vocab(true);
        let other = |(token, id): &(&String, &u32)| mine.token_to_id(token) != Some(**id);
        if let Some((token, id)) = known.iter().filter(other).min_by_key(|(_, id)| **id) {
            let mine = self.tokenizer.id_to_token(*id);
            return Some(match mine {
                Some(mine) => format!("has `{mine}` as token {id}, where the base's has `{token}`"),
                None => format!("lacks the base's token {id}, `{token}`"),
            });
        }
        let model = |of: &Tokenizer| serde_json::to_value(of.get_model()).ok();
        if mine.get_vocab_size(false) != theirs.get_vocab_size(false)
            || model(mine) != model(theirs)
        {
            return Some("has another vocabulary or other merges than the base's".to_owned());
        }
        if self.added_bos() != base.added_bos() {
            let describe =
                |bos: Option<u32>| bos.map_or_else(|| "none".to_owned(), |id| id.to_string());
            return Some(format!(
                "begins texts with BOS {}, the base's with {} (see tokenizer_config.json)",
                describe(self.added_bos()),
                describe(base.added_bos())
            ));
        }
        let ids =
            |of: &Tokenizer, text: &str| Some(of.encode_fast(text, true).ok()?.get_ids().to_vec());
        let text = PROBES.into_iter().find(|text| ids(mine, text) != ids(theirs, text))?;
        Some(format!("makes other tokens of {text:?} than the base's"))
    }

    /// Encodes a text, with the special tokens the tokenizer adds by itself.
    ///
    /// # Errors
    /// When the tokenizer fails, or gives a token that the model has no embedding for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_at_least(text, usize::MAX)?.ids)
    }

    /// As [`encode`](Self::encode), but a long text need not be read on when there are `enough`
    /// tokens; those that are given are its first.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_at_least(&self, text: &str, enough: usize) -> Result<Encoded> {
        self.encode_cut(text, enough, Cut::USUAL)
    }

    /// Encodes a text that says itself where its special tokens are, as a rendered chat template
    /// does: those written in it are recognized, and none is added. What a person writes into a
    /// chat is part of that text, as it is for transformers.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| Error::Encode {
            folder: self.folder.clone(),
            reason: error.to_string(),
        })?;
        Ok(self.in_vocabulary(Encoded { ids: encoding.get_ids().to_vec(), whole: true })?.ids)
    }

    /// The text of tokens, with or without the special ones. Numbers that stand for no token, which
    /// padded vocabularies have, give no text; bytes that are no UTF-8 give U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special).map_err(|error| Error::Decode {
            folder: self.folder.clone(),
            reason: error.to_string(),
        })
    }

    /// The number of a token by its text, as `<|im_end|>`.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// A token as the vocabulary writes it: `Ġthe`, `<0x0A>`, `<|im_end|>`.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Whether decoding may skip the token: it is one of those that frame a text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        let token = self.tokenizer.id_to_token(id);
        token.is_some_and(|token| self.tokenizer.get_added_vocabulary().is_special_token(&token))
    }

    fn encode_cut(&self, text: &str, enough: usize, cut: Cut) -> Result<Encoded> {
        let failed = |error: tokenizers::Error| Error::Encode {
            folder: self.folder.clone(),
            reason: error.to_string(),
        };
        let encoded = match &self.frame {
            Some(frame) if text.len() > cut.piece => {
                let enough = enough.saturating_sub(frame.before.len());
                let placed = |part: &str| self.placed(part);
                let (tokens, whole) =
                    encode_in_pieces(text, cut, enough, placed).map_err(failed)?;
                let mut ids = frame.before.clone();
                ids.extend(tokens);
                if whole {
                    ids.extend(&frame.after);
                }
                Encoded { ids, whole }
            }
            _ => {
                let encoding = self.tokenizer.encode_fast(text, true).map_err(failed)?;
                Encoded { ids: encoding.get_ids().to_vec(), whole: true }
            }
        };
        self.in_vocabulary(encoded)
    }

    /// The same tokens, if the model has an embedding for each.
    fn in_vocabulary(&self, encoded: Encoded) -> Result<Encoded> {
        match encoded.ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&token) => Err(Error::TokenOutsideVocabulary {
                folder: self.folder.clone(),
                token,
                vocab_size: self.vocab_size,
            }),
            None => Ok(encoded),
        }
    }

    /// Tokens of a text without special ones around it, and where they stand in it.
    fn placed(&self, text: &str) -> Result<Vec<Placed>, tokenizers::Error> {
        let encoding = self.tokenizer.encode(text, false)?;
        let places = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(places.map(|(&id, &(start, end))| Placed { id, start, end }).collect())
    }
}

impl Frame {
    /// Read off a letter's encoding; `None` where the tokenizer does something else than to put
    /// tokens around it.
    fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let encode = |special| {
            let encoding = tokenizer.encode_fast("a", special).ok()?;
            Some(encoding.get_ids().to_vec())
        };
        let (bare, framed) = (encode(false)?, encode(true)?);
        if bare.is_empty() {
            return None;
        }
        let at = framed.windows(bare.len()).position(|part| part == bare)?;
        let (before, after) = (framed[..at].to_vec(), framed[at + bare.len()..].to_vec());
        Some(Self { before, after })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Words a, b, c and `<s>`, with a truncation that must not apply and a BOS that is added.
    const TOKENIZER: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2, "c": 3},
                  "unk_token": "a"}
    }"#;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn bos(files: &[(&str, &str)]) -> Result<Option<u32>> {
        let folder = folder(files);
        fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
        TextTokenizer::open(folder.path(), 4).map(|tokenizer| tokenizer.bos())
    }

    #[test]
    fn a_text_is_neither_truncated_nor_padded() {
        let folder = folder(&[("tokenizer.json", TOKENIZER)]);
        let tokenizer = TextTokenizer::open(folder.path(), 4).unwrap();
        assert_eq!(tokenizer.encode("c b a b").unwrap(), [0, 3, 2, 1, 2]);
        assert_eq!(tokenizer.encode(&"a ".repeat(20)).unwrap().len(), 21);
    }

    #[test]
    fn a_bos_is_added_where_encoding_or_the_configuration_says_so() {
        let added = |tokenizer: &str, config: &str| {
            let files = [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)];
            let folder = folder(&files);
            TextTokenizer::open(folder.path(), 4).map(|tokenizer| tokenizer.added_bos())
        };
        let start = TOKENIZER.find("\"post_processor\"").unwrap();
        let end = TOKENIZER.find("\"decoder\"").unwrap();
        let none =
            format!("{}\"post_processor\": null, {}", &TOKENIZER[..start], &TOKENIZER[end..]);
        let named = r#"{"bos_token": "<s>"}"#;
        assert_eq!(added(TOKENIZER, named).unwrap(), Some(0));
        // SmolLM2's kind: named, and never used.
        assert_eq!(added(&none, named).unwrap(), None);
        let says = |adds: &str| format!(r#"{{"bos_token": "<s>", "add_bos_token": {adds}}}"#);
        assert_eq!(added(&none, &says("true")).unwrap(), Some(0));
        assert_eq!(added(&none, &says("null")).unwrap(), None);
        assert_eq!(added(TOKENIZER, &says("false")).unwrap(), None);
        assert_eq!(added(TOKENIZER, r#"{"bos_token": null}"#).unwrap(), None);
        // Another token than the BOS is put before every text.
        assert_eq!(added(TOKENIZER, r#"{"bos_token": "c"}"#).unwrap(), None);
        let error = added(TOKENIZER, &says("1")).unwrap_err().to_string();
        assert!(error.contains("add_bos_token is 1"), "{error}");
    }

    /// A byte order mark before a JSON file is no part of it.
    #[test]
    fn files_with_a_byte_order_mark_are_read() {
        let folder = folder(&[
            ("tokenizer.json", &format!("\u{feff}{TOKENIZER}")),
            ("tokenizer_config.json", "\u{feff}{\"bos_token\": \"<s>\"}"),
        ]);
        assert_eq!(TextTokenizer::open(folder.path(), 4).unwrap().bos(), Some(0));
    }

    /// Bytes of SplitMix64's outputs.
    struct Random(u64);

    impl Random {
        fn below(&mut self, most: usize) -> usize {
            (crate::split_mix::split_mix(&mut self.0) % most as u64) as usize
        }

        /// What texts are made of, and what tokenizers stumble over.
        fn text(&mut self, length: usize) -> String {
            const PARTS: [&str; 22] = [
                " ", " ", " ", "\n", "\n\n", "  ", "\t", "\r\n", ".", ", ", "'s", "the", "and",
                "ing", "e", "a", "Zürich", "漢字", "🙂", "é", "<s>", "<unk>",
            ];
            let mut text = String::new();
            while text.len() < length {
                match self.below(40) {
                    0 => text.push_str(&"ab".repeat(1 + self.below(200))),
                    1 => text.push_str(&" ".repeat(1 + self.below(300))),
                    2 => text.push_str(&"=".repeat(1 + self.below(100))),
                    3 => text.push_str(&self.below(usize::MAX).to_string()),
                    4 => text.push(char::from_u32(self.below(0xD7FF) as u32).unwrap_or(' ')),
                    5..20 => {
                        for _ in 0..1 + self.below(9) {
                            text.push(char::from(b'a' + self.below(26) as u8));
                        }
                        text.push(' ');
                    }
                    _ => text.push_str(PARTS[self.below(PARTS.len())]),
                }
            }
            text
        }
    }

    fn pieces_give_the_whole(folder: &Path) {
        let tokenizer = TextTokenizer::open(folder, 1 << 20).unwrap();
        assert!(tokenizer.frame.is_some());
        let mut random = Random(7);
        for round in 0..25 {
            let text = random.text(4000 + 400 * round);
            let whole = tokenizer.tokenizer.encode_fast(text.as_str(), true).unwrap();
            let cut = Cut { piece: 300 + random.below(2000), overlap: 30 + random.below(500) };
            let encoded = tokenizer.encode_cut(&text, usize::MAX, cut).unwrap();
            assert!(encoded.whole);
            assert!(encoded.ids == whole.get_ids(), "round {round}, {cut:?}, {}", folder.display());
            let first = tokenizer.encode_cut(&text, 100, cut).unwrap().ids;
            assert!(first.len() >= 100 && whole.get_ids().starts_with(&first), "round {round}");
        }
    }

    #[test]
    fn pieces_give_the_tokens_of_the_whole_text() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        pieces_give_the_whole(&root.join("tests/fixtures/demo-llama"));
        let words = folder(&[("tokenizer.json", TOKENIZER)]);
        pieces_give_the_whole(words.path());
        let Some(shared) = crate::needs::shared() else { return };
        let snapshots = shared.join("hf/hub/models--stabilityai--StableBeluga2/snapshots");
        for folder in fs::read_dir(snapshots).into_iter().flatten() {
            pieces_give_the_whole(&folder.unwrap().path());
        }
        let smollm2 = shared.join("models/smollm2-135m");
        if smollm2.is_dir() {
            pieces_give_the_whole(&smollm2);
        }
    }

    #[test]
    fn a_chats_text_gets_no_token_that_it_does_not_name() {
        let folder = folder(&[("tokenizer.json", TOKENIZER)]);
        let tokenizer = TextTokenizer::open(folder.path(), 4).unwrap();
        assert_eq!(tokenizer.encode_chat("a b").unwrap(), [1, 2]);
        assert_eq!(tokenizer.encode_chat("<s>a<s>").unwrap(), [0, 1, 0]);
        let narrow = TextTokenizer::open(folder.path(), 3).unwrap();
        assert!(matches!(narrow.encode_chat("c"), Err(Error::TokenOutsideVocabulary { .. })));
    }

    #[test]
    fn tokens_have_texts_and_numbers() {
        let folder = folder(&[("tokenizer.json", TOKENIZER)]);
        let tokenizer = TextTokenizer::open(folder.path(), 4).unwrap();
        assert_eq!(tokenizer.decode(&[0, 1, 2, 9], false).unwrap(), "<s> a b");
        assert_eq!(tokenizer.decode(&[0, 1, 2, 9], true).unwrap(), "a b");
        assert_eq!(tokenizer.token_to_id("<s>"), Some(0));
        assert_eq!(tokenizer.token_to_id("<e>"), None);
        assert_eq!(tokenizer.id_to_token(3).as_deref(), Some("c"));
        assert_eq!(tokenizer.id_to_token(4), None);
        assert_eq!([0, 1, 4].map(|id| tokenizer.is_special(id)), [true, false, false]);
    }

    #[test]
    fn tokens_beyond_the_vocabulary_are_refused() {
        let folder = folder(&[("tokenizer.json", TOKENIZER)]);
        let tokenizer = TextTokenizer::open(folder.path(), 3).unwrap();
        assert_eq!(tokenizer.encode("a b").unwrap(), [0, 1, 2]);
        let error = tokenizer.encode("a b c").unwrap_err();
        assert!(
            matches!(error, Error::TokenOutsideVocabulary { token: 3, vocab_size: 3, .. }),
            "{error}"
        );
    }

    #[test]
    fn bos_comes_from_the_tokenizer_config_first() {
        let config = ("config.json", r#"{"bos_token_id": 3}"#);
        let tokenizer = |content| [("tokenizer_config.json", content), config];
        assert_eq!(bos(&[]).unwrap(), None);
        assert_eq!(bos(&[config]).unwrap(), Some(3));
        assert_eq!(bos(&[("config.json", r#"{"bos_token_id": null}"#)]).unwrap(), None);
        let inner = r#"{"bos_token_id": null, "text_config": {"bos_token_id": 2}}"#;
        assert_eq!(bos(&[("config.json", inner)]).unwrap(), Some(2));
        assert_eq!(bos(&tokenizer("{}")).unwrap(), Some(3));
        assert_eq!(bos(&tokenizer(r#"{"bos_token": "<s>"}"#)).unwrap(), Some(0));
        assert_eq!(bos(&tokenizer(r#"{"bos_token": {"content": "b"}}"#)).unwrap(), Some(2));
        assert_eq!(bos(&tokenizer(r#"{"bos_token": null}"#)).unwrap(), None);
    }

    #[test]
    fn a_wrong_bos_names_the_file() {
        for (file, content) in [
            ("tokenizer_config.json", r#"{"bos_token": "<bos>"}"#),
            ("tokenizer_config.json", r#"{"bos_token": 1}"#),
            ("tokenizer_config.json", "[]"),
            ("config.json", r#"{"bos_token_id": -1}"#),
            ("config.json", r#"{"text_config": {"bos_token_id": -1}}"#),
            ("config.json", "{"),
        ] {
            let error = bos(&[(file, content)]).unwrap_err();
            assert!(matches!(error, Error::ConfigInvalid { .. }), "{content}: {error}");
            assert!(error.to_string().contains(file), "{error}");
        }
    }

    #[test]
    fn an_absent_or_broken_tokenizer_says_what_is_needed() {
        let absent = TextTokenizer::open(folder(&[]).path(), 4).map(|_| ()).unwrap_err();
        assert!(absent.to_string().contains("has no tokenizer.json, which is needed"));
        let broken = folder(&[("tokenizer.json", "{}")]);
        let error = TextTokenizer::open(broken.path(), 4).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::TokenizerInvalid { .. }), "{error}");
    }
}
