//! How many columns share a scale, as files and people write it.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most columns of a group: more than any model has, and a number that every reader takes.
pub const MAX_GROUP_SIZE: usize = 1 << 28;

/// Consecutive columns that share a scale; `None` is all of them, one scale a row.
///
/// People write `none` or -1 for that, files -1, and reports `null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSize(pub Option<usize>);

/// A group size that no file can say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Group size {0} is not supported; use a number from 1 to {MAX_GROUP_SIZE}, or none (as files say it, \
     -1) for one scale a row"
)]
pub struct BadGroupSize(pub String);

impl GroupSize {
    /// Checks that files can say it.
    ///
    /// # Errors
    /// [`BadGroupSize`] for 0 and for more than [`MAX_GROUP_SIZE`].
    pub fn check(self) -> Result<(), BadGroupSize> {
        match self.0 {
            Some(size) if !(1..=MAX_GROUP_SIZE).contains(&size) => {
                Err(BadGroupSize(size.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// The number in files: -1 for all columns.
    #[must_use]
    pub fn stored(self) -> i64 {
        self.0.map_or(-1, |size| size as i64)
    }
}

impl FromStr for GroupSize {
    type Err = BadGroupSize;

    fn from_str(text: &str) -> Result<Self, BadGroupSize> {
        let bad = || BadGroupSize(text.to_owned());
        let size = match text.trim() {
            "none" | "-1" => Self(None),
            number => Self(Some(number.parse().map_err(|_| bad())?)),
        };
        size.check().map_err(|_| bad())?;
        Ok(size)
    }
}

impl Display for GroupSize {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(size) => Display::fmt(&size, f),
            None => f.pad("none"),
        }
    }
}

impl Serialize for GroupSize {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(to)
    }
}

impl<'de> Deserialize<'de> for GroupSize {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl Visitor<'_> for Reader {
            type Value = GroupSize;

            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("a number of columns, or none")
            }

            // Numbers and strings have one form in text, which the command line reads, too.
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<GroupSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<GroupSize, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<GroupSize, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_bool<E: serde::de::Error>(self, flag: bool) -> Result<GroupSize, E> {
                Err(E::custom(BadGroupSize(flag.to_string())))
            }

            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<GroupSize, E> {
                Err(E::custom(BadGroupSize(format!("{number:?}"))))
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<GroupSize, E> {
                Ok(GroupSize(None))
            }
        }

        from.deserialize_any(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_sizes_have_one_bound_and_two_words_for_none() {
        for (text, size) in
            [("none", None), ("-1", None), ("1", Some(1)), ("268435456", Some(MAX_GROUP_SIZE))]
        {
            let read: GroupSize = text.parse().unwrap();
            assert_eq!(read, GroupSize(size), "{text}");
            read.check().unwrap();
            assert_eq!(read.to_string().parse(), Ok(read));
            assert_eq!(read.stored().to_string().parse(), Ok(read));
            let json = serde_json::to_string(&read).unwrap();
            assert_eq!(serde_json::from_str::<GroupSize>(&json).unwrap(), read, "{json}");
        }
        for wrong in ["0", "-2", "268435457", "18446744073709551616", "1.5", "all", ""] {
            let error = wrong.parse::<GroupSize>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("size {wrong} is")) && error.contains("none"),
                "{error}"
            );
        }
        for size in [0, MAX_GROUP_SIZE + 1, usize::MAX] {
            assert!(GroupSize(Some(size)).check().is_err(), "{size}");
        }
        for (json, shown) in
            [("32.0", "32.0"), ("-2", "-2"), ("\"all\"", "all"), ("true", "size true is")]
        {
            let error = serde_json::from_str::<GroupSize>(json).unwrap_err().to_string();
            assert!(error.contains(shown), "{error}");
        }
    }
}
