//! Long texts, encoded in pieces whose tokens are those of the whole.
//!
//! A tokenizer takes a hundred bytes of memory for each byte of the text that it is given, so a long
//! text is given to it in pieces. Each piece begins within the one before it, and they are joined
//! where both give the same tokens at the same places for a stretch.
//!
//! Why that is the encoding of the whole: merges never cross a border between tokens of the result,
//! so the tokens of either side are what that side gives alone; and whether a border between two
//! sides stands depends on nothing but the two tokens that meet there. (A merge over the border
//! would join what these two are made of, and would happen as well if they stood alone.) So one
//! token in common on each side would do for byte-pair encoding. Splitters that cut a text into
//! words before look at a few characters around; a stretch of many tokens in common says that both
//! pieces were cut alike there, and from there on. Where no such stretch is found, as within a
//! megabyte of one letter, the pieces grow, in the end to the whole text.

/// How a text is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// Bytes of a piece, beside what it shares with the one before.
    pub(crate) piece: usize,
    /// Bytes that a piece shares with the one before, at first.
    pub(crate) overlap: usize,
}

impl Cut {
    /// Little enough to take some tens of megabytes, and enough for the overlap not to matter.
    pub(crate) const USUAL: Self = Self { piece: 1 << 18, overlap: 1 << 12 };
}

/// Tokens that two pieces must have in common to be joined.
const STRETCH: usize = 32;

/// A token and the bytes of the text that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) id: u32,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// A piece of the text with its tokens, of which those from `from` on are not settled yet.
struct Piece {
    start: usize,
    end: usize,
    tokens: Vec<Placed>,
    from: usize,
}

/// The tokens of a text, or its first ones when there are `enough`, and whether these are all.
/// `encode` gives the tokens of a part, with places in that part.
pub(crate) fn encode_in_pieces<E>(
    text: &str,
    cut: Cut,
    enough: usize,
    encode: impl Fn(&str) -> Result<Vec<Placed>, E>,
) -> Result<(Vec<u32>, bool), E> {
    let piece = |start: usize, end: usize| {
        let mut tokens = encode(&text[start..end])?;
        for token in &mut tokens {
            token.start += start;
            token.end += start;
        }
        Ok(Piece { start, end, tokens, from: 0 })
    };
    let ids = |tokens: &[Placed]| tokens.iter().map(|token| token.id).collect::<Vec<u32>>();
    let mut settled: Vec<u32> = Vec::new();
    let mut last = piece(0, text.ceil_char_boundary(cut.piece))?;
    while last.end < text.len() && settled.len() < enough {
        let mut overlap = cut.overlap;
        last = loop {
            let wanted = last.end.saturating_sub(overlap).max(last.start);
            let start = text.floor_char_boundary(wanted);
            // One that had to begin far back also goes on far, or a long word would be read again
            // for each piece of it.
            let more = cut.piece.max(last.end - start);
            let mut next = piece(start, text.ceil_char_boundary(last.end.saturating_add(more)))?;
            if let Some((upto, from)) = border(&last, &next) {
                settled.extend(ids(&last.tokens[last.from..upto]));
                next.from = from;
                break next;
            }
            if start == last.start {
                // From the text's start on there is nothing before that could matter.
                settled.clear();
                break if start == 0 { next } else { piece(0, text.len())? };
            }
            overlap = overlap.saturating_mul(8);
        };
    }
    let whole = last.end == text.len();
    if whole {
        settled.extend(ids(&last.tokens[last.from..]));
    }
    Ok((settled, whole))
}

/// Where the tokens of a piece end and those of the next one take over.
fn border(last: &Piece, next: &Piece) -> Option<(usize, usize)> {
    let (one, other) = (&last.tokens, &next.tokens);
    let mut i = one.partition_point(|token| token.start < next.start);
    let (mut j, mut equal) = (0, 0);
    while let (Some(a), Some(b)) = (one.get(i), other.get(j)) {
        if a == b {
            equal += 1;
        } else {
            equal = 0;
        }
        let behind = if equal > 0 { std::cmp::Ordering::Equal } else { a.start.cmp(&b.start) };
        i += usize::from(behind.is_le());
        j += usize::from(behind.is_ge());
        if equal >= STRETCH && i >= last.from + STRETCH / 2 {
            return Some((i - STRETCH / 2, j - STRETCH / 2));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Words of a text, with the number of a word's letters as its id.
    #[expect(clippy::unnecessary_wraps, reason = "the form of a tokenizer")]
    fn words(text: &str) -> Result<Vec<Placed>, ()> {
        let mut tokens = Vec::new();
        let mut start = 0;
        for word in text.split_inclusive(' ') {
            let end = start + word.len();
            tokens.push(Placed { id: word.len() as u32, start, end });
            start = end;
        }
        Ok(tokens)
    }

    const SMALL: Cut = Cut { piece: 1000, overlap: 200 };

    fn whole(text: &str) -> Vec<u32> {
        words(text).unwrap().iter().map(|token| token.id).collect()
    }

    #[test]
    fn pieces_grow_over_what_cannot_be_joined() {
        let ordinary = "ä bc def ghij klm no p ".repeat(60);
        let long = "x".repeat(7000);
        for text in [
            ordinary.repeat(5),
            long.clone(),
            format!("{ordinary}{long} {ordinary}"),
            format!("{long} {ordinary}{long}"),
            format!("{ordinary}{}{ordinary}", long.replace('x', "yyyyyyyyyyyyyyyyyy ")),
        ] {
            let longest = Cell::new(0);
            let encode = |part: &str| {
                longest.set(longest.get().max(part.len()));
                words(part)
            };
            let (ids, all) = encode_in_pieces(&text, SMALL, usize::MAX, encode).unwrap();
            assert_eq!(ids, whole(&text));
            assert!(all);
            // Long words take longer pieces, as fewer of them are in common.
            assert!(text.contains(['x', 'y']) || longest.get() < 1500, "{}", longest.get());
        }
    }

    #[test]
    fn no_more_is_read_than_is_asked_for() {
        let text = "a bc def ghij ".repeat(5000);
        let read = Cell::new(0);
        let encode = |part: &str| {
            read.set(read.get() + part.len());
            words(part)
        };
        let (ids, all) = encode_in_pieces(&text, SMALL, 900, encode).unwrap();
        assert!(!all && ids.len() >= 900);
        assert_eq!(ids[..900], whole(&text)[..900]);
        assert!(read.get() < 10_000, "{}", read.get());
        let (ids, all) = encode_in_pieces("a bc", SMALL, 1, words).unwrap();
        assert_eq!((ids, all), (vec![2, 2], true));
    }
}
