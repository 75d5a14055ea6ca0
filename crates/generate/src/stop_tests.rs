use proptest::prelude::*;

use super::*;

/// All that is shown of the parts, and the stop string.
fn shown(stops: &[&str], parts: &[&str]) -> (String, Option<String>) {
    let mut watch = StopStrings::new(stops.iter().copied()).unwrap();
    let mut text = String::new();
    for part in parts {
        match watch.push(part) {
            Stopping::Text(more) => text += &more,
            Stopping::Stopped { text_before, stop } => {
                assert_eq!(
                    watch.push("more"),
                    Stopping::Stopped { text_before: String::new(), stop: stop.clone() }
                );
                assert_eq!(watch.finish(), "");
                return (text + &text_before, Some(stop));
            }
        }
    }
    (text + &watch.finish(), None)
}

/// The same by looking at every beginning of the text.
fn by_definition(stops: &[&str], text: &str) -> (String, Option<String>) {
    for end in 0..=text.len() {
        let Some(beginning) = text.get(..end) else { continue };
        let ending = stops.iter().filter(|stop| beginning.ends_with(**stop));
        if let Some(stop) = ending.max_by_key(|stop| stop.len()) {
            return (beginning[..end - stop.len()].to_owned(), Some((*stop).to_owned()));
        }
    }
    (text.to_owned(), None)
}

#[test]
fn text_is_held_only_while_it_may_be_a_stop_string() {
    let mut watch = StopStrings::new(["###", "User:"]).unwrap();
    assert_eq!(watch.push("a #"), Stopping::Text("a ".to_owned()));
    assert_eq!(watch.push("# b"), Stopping::Text("## b".to_owned()));
    assert_eq!(watch.push("Us"), Stopping::Text(String::new()));
    assert_eq!(watch.push("Use"), Stopping::Text("Us".to_owned()));
    let stop = "User:".to_owned();
    assert_eq!(watch.push("r: tail"), Stopping::Stopped { text_before: String::new(), stop });
    let mut watch = StopStrings::new(["ab"]).unwrap();
    assert_eq!(watch.push("xa"), Stopping::Text("x".to_owned()));
    assert_eq!(watch.finish(), "a");
}

#[test]
fn the_first_whole_one_stops() {
    assert_eq!(shown(&["b", "abc"], &["xabc"]), ("xa".to_owned(), Some("b".to_owned())));
    assert_eq!(shown(&["c", "abc"], &["xabc"]), ("x".to_owned(), Some("abc".to_owned())));
    assert_eq!(shown(&["aab"], &["aa", "aab"]), ("aa".to_owned(), Some("aab".to_owned())));
    assert_eq!(shown(&[], &["a", "b"]), ("ab".to_owned(), None));
    assert_eq!(shown(&["\u{20ac}"], &["é€"]), ("é".to_owned(), Some("€".to_owned())));
}

#[test]
fn an_empty_one_is_an_error() {
    assert!(matches!(StopStrings::new(["a", ""]), Err(Error::EmptyStop)));
}

proptest! {
    #[test]
    fn cuts_make_no_difference(
        stops in prop::collection::vec("[abé€]{1,4}", 0..4),
        parts in prop::collection::vec("[abcé€\u{82}]{0,5}", 0..8),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let cut: Vec<&str> = parts.iter().map(String::as_str).collect();
        let whole = parts.concat();
        let expected = by_definition(&stops, &whole);
        prop_assert_eq!(&shown(&stops, &cut), &expected);
        prop_assert_eq!(&shown(&stops, &[&whole]), &expected);
        let single: Vec<String> = whole.chars().map(String::from).collect();
        let single: Vec<&str> = single.iter().map(String::as_str).collect();
        prop_assert_eq!(&shown(&stops, &single), &expected);
    }

    #[test]
    fn no_more_is_held_than_a_stop_string_less_a_byte(
        stops in prop::collection::vec("[ab]{1,5}", 1..4),
        text in "[abc]{0,30}",
    ) {
        let most = stops.iter().map(String::len).max().unwrap() - 1;
        let mut watch = StopStrings::new(stops).unwrap();
        let mut given = 0;
        for (place, part) in text.chars().enumerate() {
            match watch.push(&part.to_string()) {
                Stopping::Text(more) => given += more.len(),
                Stopping::Stopped { .. } => break,
            }
            prop_assert!(place + 1 - given <= most);
        }
    }
}
