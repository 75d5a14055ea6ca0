use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;

/// As Llama 2's: a space is `▁`, what has no token is bytes, and the first space of all is none.
fn sentence_pieces() -> TextTokenizer {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.insert(token, id.into());
    };
    for token in ["<unk>", "<s>", "</s>"] {
        add(token.to_owned());
    }
    for byte in 0..=255u8 {
        add(format!("<0x{byte:02X}>"));
    }
    for token in ["▁", "▁▁", "▁a", "a", "b", "é", "\u{fffd}", "\n"] {
        add(token.to_owned());
    }
    let special = |id: usize, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab, "merges": ["▁ a", "▁ ▁"]},
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    TextTokenizer::open(folder.path(), 1000).unwrap()
}

/// A byte-level BPE.
fn bytes() -> TextTokenizer {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    TextTokenizer::open(&root.join("tests/fixtures/demo-llama"), 1 << 20).unwrap()
}

fn streamed(tokenizer: &TextTokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
    let mut stream = TokenStream::new(tokenizer, prompt).unwrap();
    let mut parts: Vec<_> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    parts.push(stream.finish().unwrap());
    parts
}

fn ids(tokenizer: &TextTokenizer, tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| tokenizer.token_to_id(token).unwrap()).collect()
}

#[test]
fn a_space_is_there_where_a_word_follows_a_text() {
    let tokenizer = sentence_pieces();
    let word = ids(&tokenizer, &["▁a", "b"]);
    assert_eq!(streamed(&tokenizer, &[], &word), ["a", "b", ""]);
    assert_eq!(streamed(&tokenizer, &ids(&tokenizer, &["<s>"]), &word), ["a", "b", ""]);
    let prompt = ids(&tokenizer, &["<s>", "▁a"]);
    assert_eq!(streamed(&tokenizer, &prompt, &word), [" a", "b", ""]);
    // A special token between them hides the text from nobody.
    let prompt = ids(&tokenizer, &["▁a", "</s>"]);
    assert_eq!(streamed(&tokenizer, &prompt, &word), [" a", "b", ""]);
    // The space that is dropped is that of the text's beginning, not of the context's.
    let prompt = ids(&tokenizer, &["b", "▁", "▁"]);
    assert_eq!(streamed(&tokenizer, &prompt, &word), [" a", "b", ""]);
}

#[test]
fn a_character_of_bytes_is_given_when_it_is_whole() {
    let tokenizer = sentence_pieces();
    let euro = ids(&tokenizer, &["a", "<0xE2>", "<0x82>", "<0xAC>", "b"]);
    assert_eq!(streamed(&tokenizer, &[], &euro), ["a", "€b", ""]);
    assert_eq!(streamed(&tokenizer, &[], &euro[..4]), ["a", "€"]);
    assert_eq!(streamed(&tokenizer, &[], &euro[..3]), ["a", "\u{fffd}\u{fffd}"]);
    // A real U+FFFD waits for what follows, or the end.
    let broken = ids(&tokenizer, &["a", "\u{fffd}", "b", "\u{fffd}"]);
    assert_eq!(streamed(&tokenizer, &[], &broken), ["a", "\u{fffd}b", "\u{fffd}"]);
}

#[test]
fn a_character_of_byte_level_tokens_is_given_when_it_is_whole() {
    let tokenizer = bytes();
    let emoji = tokenizer.encode_chat("x🙂y").unwrap();
    let parts = streamed(&tokenizer, &[], &emoji);
    assert_eq!(parts.concat(), "x🙂y");
    assert!(emoji.len() > 4 && parts.iter().all(|part| !part.contains('\u{fffd}')), "{parts:?}");
    // One that the prompt begins is given whole: half of it is no text.
    for cut in 2..emoji.len() - 1 {
        let parts = streamed(&tokenizer, &emoji[..cut], &emoji[cut..]);
        assert_eq!(parts.concat(), "🙂y");
    }
}

#[test]
fn special_and_unknown_tokens_give_no_text() {
    let tokenizer = sentence_pieces();
    let a = ids(&tokenizer, &["a"])[0];
    assert_eq!(streamed(&tokenizer, &[a, 999], &[1, a, 999, 2, a, 2]), ["a", "a", ""]);
    assert_eq!(streamed(&tokenizer, &[], &[1, 2, 999]), [""]);
}

/// All parts together are what decoding everything at once gives.
fn whole(tokenizer: &TextTokenizer, prompt: &str, ids: &[u32]) -> Result<(), TestCaseError> {
    let prompt = tokenizer.encode_chat(prompt).unwrap();
    let before = tokenizer.decode(&prompt, true).unwrap();
    let all = tokenizer.decode(&[prompt.as_slice(), ids].concat(), true).unwrap();
    // A bad byte after a prompt that ends in bytes changes the prompt's text.
    prop_assume!(all.starts_with(&before));
    prop_assert_eq!(streamed(tokenizer, &prompt, ids).concat(), &all[before.len()..]);
    Ok(())
}

proptest! {
    #[test]
    fn sentence_pieces_come_to_the_whole(
        prompt in "(|[ab é€🙂]{1,8})",
        ids in prop::collection::vec(prop_oneof![0..4u32, 100..270u32, 258..268u32], 0..24),
    ) {
        whole(&sentence_pieces(), &prompt, &ids)?;
    }

    #[test]
    fn texts_of_bytes_come_to_the_whole(text in "[ab é€🙂\u{fffd}]{0,12}", cut in 0..12usize) {
        let tokenizer = sentence_pieces();
        let ids = tokenizer.encode_chat(&text).unwrap();
        let cut = cut.min(ids.len());
        let (prompt, ids) = ids.split_at(cut);
        let before = tokenizer.decode(prompt, true).unwrap();
        let all = tokenizer.decode(&[prompt, ids].concat(), true).unwrap();
        prop_assume!(all.starts_with(&before));
        prop_assert_eq!(streamed(&tokenizer, prompt, ids).concat(), &all[before.len()..]);
    }

    #[test]
    fn byte_level_tokens_come_to_the_whole(
        prompt in "(|[ab é€🙂]{1,8})",
        ids in prop::collection::vec(prop_oneof![0..260u32, 0..2050u32], 0..24),
    ) {
        whole(&bytes(), &prompt, &ids)?;
    }
}
