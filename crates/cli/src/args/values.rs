//! Values that need more than a `FromStr` of a number.

use gptq_quant::Recipe;

/// A recipe that calibrates.
pub(crate) fn parse_calibrated(text: &str) -> Result<Recipe, String> {
    match text.parse::<Recipe>()? {
        recipe if recipe.calibrates() => Ok(recipe),
        _ => Err("round to nearest does not calibrate; use best or autogptq".to_owned()),
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

/// Parses a number above zero.
pub(crate) fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("use a whole number above 0".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use gptq_checkpoint::GroupSize;

    use super::*;

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
