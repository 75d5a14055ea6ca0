//! Stop strings in a text that streams.
//!
//! A text comes in parts, and a stop string may be cut by them: text that may be the beginning of one
//! is held back until it is known, which is never more than the longest stop string less a byte. The
//! cuts make no difference to what comes out.

use std::collections::VecDeque;

use crate::error::{Error, Result};

/// What is known of a text after its next part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopping {
    /// Goes on. The text is what can be shown; empty where all is held back.
    Text(String),
    /// A stop string was found. The text is what stands before it and was not yet given; nothing
    /// that comes later belongs to it.
    Stopped {
        /// What can still be shown.
        text_before: String,
        /// The stop string that was found.
        stop: String,
    },
}

/// Strings that end a text, which are no part of it.
///
/// The one that is whole first ends the text; of several that end at the same place, the longest,
/// which begins first.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<Stop>,
    /// Text that may be the beginning of a stop string.
    held: VecDeque<u8>,
    /// The stop string that was found.
    found: Option<usize>,
}

/// A stop string with how far it has been seen, as Knuth, Morris and Pratt find words.
#[derive(Clone, Debug)]
struct Stop {
    text: String,
    /// For each length of a beginning, the length of the longest shorter one that it ends with.
    shorter: Vec<usize>,
    /// How many of its bytes are the text's last ones.
    seen: usize,
}

impl StopStrings {
    /// Watches for these strings; with none, all text passes at once.
    ///
    /// # Errors
    /// [`Error::EmptyStop`].
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Result<Self> {
        let stops = stops.into_iter().map(|stop| Stop::new(stop.into())).collect::<Result<_>>()?;
        Ok(Self { stops, held: VecDeque::new(), found: None })
    }

    /// Takes the next part of the text, and gives what can be shown. After a stop string was found,
    /// says so again, with no text.
    pub fn push(&mut self, part: &str) -> Stopping {
        let mut shown = Vec::new();
        for &byte in part.as_bytes() {
            if self.found.is_some() {
                break;
            }
            self.held.push_back(byte);
            self.take(byte, &mut shown);
        }
        // Stop strings are whole characters, so what stands before one, or before its beginning, is.
        let text = String::from_utf8_lossy(&shown).into_owned();
        match self.found {
            Some(found) => {
                Stopping::Stopped { text_before: text, stop: self.stops[found].text.clone() }
            }
            None => Stopping::Text(text),
        }
    }

    fn take(&mut self, byte: u8, shown: &mut Vec<u8>) {
        for stop in &mut self.stops {
            stop.take(byte);
        }
        let places = 0..self.stops.len();
        let whole = places.filter(|&place| self.stops[place].is_whole());
        self.found = whole.max_by_key(|&place| self.stops[place].seen);
        let kept = match self.found {
            Some(found) => self.stops[found].seen,
            None => self.stops.iter().map(|stop| stop.seen).max().unwrap_or(0),
        };
        shown.extend(self.held.drain(..self.held.len() - kept));
        if self.found.is_some() {
            self.held.clear();
        }
    }

    /// What was held back, now that the text has ended; empty after a stop string was found.
    #[must_use]
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&Vec::from(self.held)).into_owned()
    }
}

impl Stop {
    fn new(text: String) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::EmptyStop);
        }
        let mut stop = Self { shorter: vec![0; text.len() + 1], text, seen: 0 };
        for place in 1..stop.text.len() {
            let byte = stop.text.as_bytes()[place];
            stop.take(byte);
            stop.shorter[place + 1] = stop.seen;
        }
        stop.seen = 0;
        Ok(stop)
    }

    fn is_whole(&self) -> bool {
        self.seen == self.text.len()
    }

    fn take(&mut self, byte: u8) {
        let text = self.text.as_bytes();
        while self.seen > 0 && text.get(self.seen) != Some(&byte) {
            self.seen = self.shorter[self.seen];
        }
        self.seen += usize::from(text[self.seen] == byte);
    }
}

#[cfg(test)]
#[path = "stop_tests.rs"]
mod tests;
