//! From tokens to a text that stops: what is shown depends on the tokens and on nothing else.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::path::Path;
use std::sync::LazyLock;

use gptq_generate::{StopStrings, Stopping, TokenStream};
use gptq_text::tokens::TextTokenizer;
use proptest::prelude::*;

static TOKENIZER: LazyLock<TextTokenizer> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/demo-llama");
    TextTokenizer::open(&folder, 1 << 20).unwrap()
});

/// What a person sees of these tokens.
fn shown(prompt: &[u32], ids: &[u32], stops: &[String]) -> String {
    let mut stream = TokenStream::new(&TOKENIZER, prompt).unwrap();
    let mut watch = StopStrings::new(stops.to_vec()).unwrap();
    let mut text = String::new();
    let mut take = |part: &str| match watch.push(part) {
        Stopping::Text(more) => {
            text += &more;
            false
        }
        Stopping::Stopped { text_before, .. } => {
            text += &text_before;
            true
        }
    };
    let stopped = ids.iter().any(|&id| stream.push(id).unwrap().is_some_and(|part| take(&part)));
    if !stopped && !take(&stream.finish().unwrap()) {
        text += &watch.finish();
    }
    text
}

/// The same of the whole text: what stands before the stop string that ends first.
fn cut(text: &str, stops: &[String]) -> String {
    let ends =
        stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)));
    ends.min().map_or(text, |(_, at)| &text[..at]).to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]
    #[test]
    fn a_text_stops_at_the_same_place_however_its_tokens_cut_it(
        prompt in "(|[ab é€🙂]{1,4})",
        text in "([ab é€🙂]|the |and ){0,16}",
        noise in prop::collection::vec(0..2050u32, 0..4),
        stops in prop::collection::vec("[ab é€🙂]{1,3}", 0..3),
    ) {
        let prompt = TOKENIZER.encode_chat(&prompt).unwrap();
        let mut ids = TOKENIZER.encode_chat(&text).unwrap();
        ids.extend(noise);
        let before = TOKENIZER.decode(&prompt, true).unwrap();
        let all = TOKENIZER.decode(&[prompt.as_slice(), &ids].concat(), true).unwrap();
        prop_assume!(all.starts_with(&before));
        prop_assert_eq!(shown(&prompt, &ids, &stops), cut(&all[before.len()..], &stops));
    }
}
