//! Numbers as reports print them.

use gptq_records::branch_report::BranchReport;

/// Decimal unit of all sizes of a table or an axis, so that they can be compared at a glance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Unit {
    pub(crate) name: &'static str,
    bytes: f64,
}

impl Unit {
    /// The largest unit in which the largest size is at least one.
    pub(crate) fn of(sizes: impl IntoIterator<Item = u64>) -> Self {
        match sizes.into_iter().max().unwrap_or(0) {
            0..1_000_000 => Self { name: "kB", bytes: 1e3 },
            1_000_000..1_000_000_000 => Self { name: "MB", bytes: 1e6 },
            _ => Self { name: "GB", bytes: 1e9 },
        }
    }

    pub(crate) fn value(self, bytes: u64) -> f64 {
        bytes as f64 / self.bytes
    }

    /// Two decimals, as model cards give them.
    pub(crate) fn text(self, bytes: u64) -> String {
        format!("{:.2} {}", self.value(bytes), self.name)
    }
}

/// A number with so many decimals, in a few characters whatever it is: as a power of ten where its
/// digits say no more, and a dash where there is no number.
#[must_use]
pub fn number(value: f64, decimals: usize) -> String {
    match value.abs() {
        size if size < 1e15 => {
            let text = format!("{value:.decimals$}");
            // What rounds to zero has no sign.
            let zero = text.bytes().all(|b| matches!(b, b'0' | b'.' | b'-'));
            if zero { text.trim_start_matches('-').to_owned() } else { text }
        }
        size if size.is_finite() => format!("{value:.2e}"),
        _ => "–".to_owned(),
    }
}

/// So many of something.
#[must_use]
pub fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Perplexities have three decimals; those of a model that no longer speaks need none.
pub(crate) fn perplexity(value: f64) -> String {
    number(value, if value < 1000.0 { 3 } else { 0 })
}

/// KL divergences have four.
pub(crate) fn kl(value: f64) -> String {
    number(value, 4)
}

/// A relative change with its sign, in percent. Minus is a minus sign, not a hyphen.
pub(crate) fn percent(ratio: f64) -> String {
    signed(100.0 * ratio, 1) + " %"
}

/// A number with its sign; no sign where it rounds to zero.
pub(crate) fn signed(value: f64, decimals: usize) -> String {
    let text = number(value.abs(), decimals);
    let zero = text.bytes().all(|b| matches!(b, b'0' | b'.'));
    match value {
        _ if zero || !value.is_finite() => text,
        _ if value < 0.0 => format!("−{text}"),
        _ => format!("+{text}"),
    }
}

/// A count with its thousands apart.
pub(crate) fn count(value: usize) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Decimal gigabytes, with two decimals as model cards give them.
#[must_use]
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

/// `128`, or `none`.
#[must_use]
pub fn group(group_size: Option<usize>) -> String {
    gptq_checkpoint::GroupSize(group_size).to_string()
}

/// `yes` or `no`.
#[must_use]
pub fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// What a branch is called beside a mark whose color shows its bits and whose shape its act-order:
/// its group size, with the recipe where recipes differ.
pub(crate) fn short_label(branch: &BranchReport, with_recipe: bool) -> String {
    let group = branch.group_size.map_or_else(|| "no groups".to_owned(), |n| format!("{n}g"));
    if with_recipe { format!("{group} {}", branch.recipe) } else { group }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_table_share_a_unit() {
        let unit = Unit::of([3_389_600, 2_621_300]);
        assert_eq!(unit.text(3_389_600), "3.39 MB");
        assert_eq!(unit.text(900_000), "0.90 MB");
        assert_eq!(Unit::of([35_332_232_296]).text(35_332_232_296), "35.33 GB");
        assert_eq!(Unit::of([]).name, "kB");
    }

    #[test]
    fn changes_carry_their_sign_unless_they_round_to_nothing() {
        assert_eq!(percent(0.0123), "+1.2 %");
        assert_eq!(percent(-0.5), "−50.0 %");
        assert_eq!(percent(-0.000_1), "0.0 %");
        assert_eq!(signed(-0.000_4, 4), "−0.0004");
        assert_eq!([perplexity(1e300), kl(-1e300)], ["1.00e300", "-1.00e300"]);
        assert_eq!([percent(f64::INFINITY), signed(f64::NAN, 1)], ["– %", "–"]);
        assert_eq!(
            [7, 999, 1000, 20_440, 1_234_567].map(count),
            ["7", "999", "1,000", "20,440", "1,234,567"]
        );
    }
}
