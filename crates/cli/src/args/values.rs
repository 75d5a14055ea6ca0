//! Values that need more than a `FromStr` of a number.

use std::str::FromStr;

use gptq_quant::Recipe;

/// Attempts after failed ones, where nobody asks for another number.
pub(crate) const RETRIES: u32 = 5;

/// A recipe that calibrates.
pub(crate) fn parse_calibrated(text: &str) -> Result<Recipe, String> {
    match text.parse::<Recipe>()? {
        recipe if recipe.calibrates() => Ok(recipe),
        _ => Err("round to nearest does not calibrate; use best, tuned or autogptq".to_owned()),
    }
}

/// Parses `5GB`, `500MB`, `2GiB` or plain bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(format!("`{unit}` is no unit; use B, MB, GB, MiB or GiB")),
    };
    match number.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(factor)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("use a whole number and a unit, such as 5GB".to_owned()),
    }
}

/// Parses the bits of a weight.
pub(crate) fn parse_bits(text: &str) -> Result<u8, String> {
    text.parse().map_err(|_| "use 2, 3, 4 or 8".to_owned())
}

/// Parses a whole number of an unsigned type. What the standard library says of a wrong one does not
/// say what would be right.
pub(crate) fn parse_whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| match 8 * size_of::<T>() {
        bits @ ..64 => format!("use a whole number from 0 to {}", (1_u64 << bits) - 1),
        bits => format!("use a whole number from 0 on, below 2^{bits}"),
    })
}

/// Parses a number.
pub(crate) fn parse_number(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_| "use a number".to_owned())
}

/// Parses a number above zero.
pub(crate) fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("use a whole number above 0".to_owned()),
    }
}

/// Parses a limit that something can be above: NaN and infinity would switch it off.
pub(crate) fn parse_limit(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(limit) if limit.is_finite() && limit >= 0.0 => Ok(limit),
        _ => Err("use a number from 0 on".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use gptq_checkpoint::GroupSize;

    use super::*;

    #[test]
    fn whole_numbers_have_the_bounds_of_their_type() {
        assert_eq!(parse_whole::<u16>("65535"), Ok(u16::MAX));
        assert_eq!(parse_whole::<u64>("18446744073709551615"), Ok(u64::MAX));
        for wrong in ["", "x", "-1", "1.5", "65536"] {
            let told = parse_whole::<u16>(wrong).unwrap_err();
            assert_eq!(told, "use a whole number from 0 to 65535");
        }
        assert!(parse_whole::<u64>("x").unwrap_err().ends_with(" from 0 on, below 2^64"));
    }

    #[test]
    fn limits_are_numbers_that_something_can_exceed() {
        assert_eq!(parse_limit("0"), Ok(0.0));
        assert_eq!(parse_limit("1.5e-3"), Ok(1.5e-3));
        for wrong in ["nan", "NaN", "inf", "infinity", "-1", "-inf", "1e400", "", "x"] {
            assert!(parse_limit(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_and_groups_are_read_as_typed() {
        assert_eq!(parse_bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert_eq!(parse_bytes("123"), Ok(123));
        for wrong in ["", "GB", "0", "5 apples", "-1GB", "99999999999999GB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!("none".parse(), Ok(GroupSize(None)));
        assert_eq!("128".parse(), Ok(GroupSize(Some(128))));
        assert_eq!("-1".parse(), Ok(GroupSize(None)));
        assert!("0".parse::<GroupSize>().is_err());
    }
}
