//! When a request that failed is made again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::stop::Stop;
use crate::{Error, Progress, Result};

/// Waits grow from one second to this.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The Hub counts its limits in windows of five minutes. Five waits that double from here outlast
/// one, where it does not say how long to wait.
const FIRST_WAIT_AT_A_LIMIT: Duration = Duration::from_secs(10);

/// The longest pause that a server may ask for; the Hub's limit on commits is one of an hour.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// Why a request brought nothing.
pub(crate) enum Failure {
    /// May work in a while.
    Transient { reason: String, pause: Pause },
    /// The storage refuses a link, as it does when the link's time is over: a new one may work.
    Expired { reason: String },
    /// Will fail again.
    Fatal(Error),
}

/// How long to wait after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// A little, and longer each time.
    Growing,
    /// A limit was met, and nobody said for how long.
    Limit,
    /// What the server asks for.
    Asked(Duration),
}

impl Failure {
    /// One that a short wait may cure.
    pub(crate) fn transient(reason: impl Into<String>) -> Self {
        Self::Transient { reason: reason.into(), pause: Pause::Growing }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

/// Counts fruitless attempts and waits between them, each time twice as long.
pub(crate) struct Patience<'a> {
    retries: u32,
    failed: u32,
    stop: &'a Stop,
}

impl<'a> Patience<'a> {
    pub(crate) fn new(retries: u32, stop: &'a Stop) -> Self {
        Self { retries, failed: 0, stop }
    }

    /// Something arrived.
    pub(crate) fn restore(&mut self) {
        self.failed = 0;
    }

    /// Waits before the next attempt, or gives up. Once the whole is stopped, there is no waiting.
    pub(crate) fn spend(
        &mut self,
        what: &str,
        failure: Failure,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (reason, pause) = match failure {
            Failure::Fatal(error) => return Err(error),
            Failure::Transient { reason, pause } => (reason, pause),
            Failure::Expired { reason } => (reason, Pause::Growing),
        };
        self.failed += 1;
        if self.failed > self.retries {
            return Err(Error::Network { what: what.to_owned(), reason, attempts: self.failed });
        }
        let wait = wait(pause, self.failed);
        progress.note(&format!("{what}: {reason}; trying again in {} s", wait.as_secs()));
        self.stop.wait(wait);
        Ok(())
    }
}

/// The time before the attempt that follows `failed` fruitless ones.
fn wait(pause: Pause, failed: u32) -> Duration {
    let doubled = 1 << (failed - 1).min(10);
    match pause {
        Pause::Growing => Duration::from_secs(doubled).min(LONGEST_WAIT),
        Pause::Limit => (FIRST_WAIT_AT_A_LIMIT * doubled as u32).min(LONGEST_PAUSE),
        Pause::Asked(time) => time.clamp(Duration::from_secs(1), LONGEST_PAUSE),
    }
}

/// How long the server of an answer wants to be left alone.
pub(crate) fn pause(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Pause {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let asked = text(RETRY_AFTER.as_str())
        .and_then(|value| seconds(value).or_else(|| until(value, now)))
        .or_else(|| text("ratelimit").and_then(reset));
    match asked {
        Some(seconds) => Pause::Asked(Duration::from_secs(seconds)),
        None if status == StatusCode::TOO_MANY_REQUESTS => Pause::Limit,
        None => Pause::Growing,
    }
}

/// A number of seconds; one that is too large to be written is a long time, too.
fn seconds(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

/// The seconds of `"api";r=0;t=55`, after which the limit that was used up starts anew.
fn reset(header: &str) -> Option<u64> {
    let parameter = |name: &str| {
        let mut parts = header.split([';', ',']).map(|part| part.replace(' ', ""));
        parts.find_map(|part| seconds(part.strip_prefix(name)?))
    };
    (parameter("r=")? == 0).then(|| parameter("t="))?
}

/// The seconds until a date such as `Wed, 21 Oct 2015 07:28:00 GMT`.
fn until(date: &str, now: SystemTime) -> Option<u64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let (_, date) = date.trim().split_once(", ")?;
    let [day, month, year, time, "GMT"] = date.split(' ').collect::<Vec<_>>()[..] else {
        return None;
    };
    let month = MONTHS.find(month).filter(|at| month.len() == 3 && at % 3 == 0)? as u64 / 3 + 1;
    let (day, year) = (seconds(day)?, seconds(year)?);
    let [hour, minute, second] = time.split(':').map(seconds).collect::<Vec<_>>()[..] else {
        return None;
    };
    if !(1..=31).contains(&day) || !(1970..=9999).contains(&year) {
        return None;
    }
    // Days since 1970 in a calendar whose years begin in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let at = (days - 719_468) * 86_400 + hour? * 3600 + minute? * 60 + second?;
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(at.saturating_sub(now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::tests::Impatient;

    #[test]
    fn a_stop_ends_a_wait() {
        let (start, asked) = (std::time::Instant::now(), Impatient(Stop::new()));
        let pause = Pause::Asked(LONGEST_PAUSE);
        let failure = Failure::Transient { reason: "busy".to_owned(), pause };
        Patience::new(1, &asked.0).spend("a file", failure, &asked).unwrap();
        assert!(start.elapsed() < LONGEST_PAUSE / 10);
    }

    /// The date's seconds are those of `date -d '21 Oct 2015 07:28 UTC' +%s`.
    #[test]
    fn servers_say_how_long_to_wait_in_three_ways() {
        let now = UNIX_EPOCH + Duration::from_secs(1_445_412_480 - 90);
        let pause = |status: u16, name: &'static str, value: &str| {
            let headers = HeaderMap::from_iter([(
                reqwest::header::HeaderName::from_static(name),
                value.parse().unwrap(),
            )]);
            pause(StatusCode::from_u16(status).unwrap(), &headers, now)
        };
        let asked = |seconds| Pause::Asked(Duration::from_secs(seconds));
        assert_eq!(pause(503, "retry-after", "120"), asked(120));
        assert_eq!(pause(503, "retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"), asked(90));
        assert_eq!(pause(503, "retry-after", "Wed, 21 Oct 2009 07:28:00 GMT"), asked(0));
        assert_eq!(pause(429, "ratelimit", "\"api\";r=0;t=55"), asked(55));
        assert_eq!(pause(429, "ratelimit", "\"api\"; r = 0; t = 55"), asked(55));
        // There is something left, so it was another limit.
        assert_eq!(pause(429, "ratelimit", "\"api\";r=7;t=55"), Pause::Limit);
        for wrong in ["soon", "-1", "Wed, 21 Okt 2015 07:28:00 GMT", "Wed, 0 Oct 2015 07:28:00 GMT"]
        {
            assert_eq!(pause(503, "retry-after", wrong), Pause::Growing, "{wrong}");
        }
        assert_eq!(wait(pause(503, "retry-after", &"9".repeat(30)), 1), LONGEST_PAUSE);
    }

    #[test]
    fn waits_outlast_what_they_are_for() {
        let all = |pause| -> u64 { (1..=5).map(|failed| wait(pause, failed).as_secs()).sum() };
        assert_eq!(all(Pause::Growing), 1 + 2 + 4 + 8 + 16);
        assert!(all(Pause::Limit) > 300, "a window of the Hub's limits");
        assert_eq!(wait(Pause::Growing, 40), LONGEST_WAIT);
        assert_eq!(wait(Pause::Limit, 40), LONGEST_PAUSE);
    }
}
