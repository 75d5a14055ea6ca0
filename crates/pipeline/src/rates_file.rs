//! What `gptq bench` has measured on the devices of a machine: `rates.json` beside the kernel cache.
//!
//! A home may be shared by machines and edited by anyone, so it is read as data from outside: a number
//! that no rate can be, or more than benches would ever write, and the file counts for nothing.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use gptq_records::atomic_file;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::stage_rates::Rates;

/// Its name in the cache.
const FILE: &str = "rates.json";
const FORMAT: u32 = 1;

/// Records that are kept, the newest.
const MOST_RECORDS: usize = 256;
/// Bytes of a name.
const LONGEST: usize = 256;
/// Operations a second that no device reaches.
const MOST_RATE: f64 = 1e19;
/// Devices that no run has, and a width that no model has.
const MOST_COUNT: usize = 1 << 20;

/// Rates of a device with a block of some width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its kind.
    pub(crate) device: String,
    /// Name of the block's shapes.
    pub(crate) width: String,
    /// Width of its residual stream.
    pub(crate) hidden: usize,
    /// Devices that worked together.
    pub(crate) ranks: usize,
    /// The day, as `2026-11-24`.
    pub(crate) date: String,
    /// Operations a second.
    pub(crate) rates: Rates,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    records: Vec<Record>,
}

impl Record {
    fn is_sound(&self) -> bool {
        let names = [&self.device, &self.width, &self.date];
        let counts = [self.hidden, self.ranks];
        names.iter().all(|name| name.len() <= LONGEST)
            && counts.iter().all(|count| (1..=MOST_COUNT).contains(count))
            && self.rates.values().all(|&rate| rate > 0.0 && rate <= MOST_RATE)
    }

    /// Whether both are of the same thing.
    fn replaces(&self, other: &Self) -> bool {
        (&self.device, &self.width, self.ranks) == (&other.device, &other.width, other.ranks)
    }
}

/// The file, where there is a cache.
pub(crate) fn path() -> Option<PathBuf> {
    Some(gptq_compute::cache_folder()?.join(FILE))
}

/// All records of a file; none where there is no file.
///
/// # Errors
/// [`Error::Rates`] for what is no file of rates.
pub(crate) fn read(path: &Path) -> Result<Vec<Record>> {
    let wrong = |message: String| Error::Rates { path: path.to_owned(), message };
    let bytes = match gptq_checkpoint::read_small(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(wrong(e.to_string())),
    };
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    if stored.format != FORMAT {
        return Err(wrong(format!("its format is {}, not {FORMAT}", stored.format)));
    }
    if stored.records.len() > MOST_RECORDS {
        return Err(wrong(format!("it has more than {MOST_RECORDS} records")));
    }
    match stored.records.iter().position(|record| !record.is_sound()) {
        Some(record) => Err(wrong(format!("record {record} has a value that none can have"))),
        None => Ok(stored.records),
    }
}

/// Puts a record into a file, over what was measured of the same before: of a stage that it does not
/// have, the rate stays. A file that cannot be read is replaced.
///
/// # Errors
/// A file that cannot be written, and a record that could not be read again.
pub(crate) fn keep(path: &Path, mut record: Record) -> Result<()> {
    if !record.is_sound() {
        let message = "a measured rate is one that none can be".to_owned();
        return Err(Error::Rates { path: path.to_owned(), message });
    }
    let mut records = read(path).unwrap_or_default();
    if let Some(at) = records.iter().position(|other| record.replaces(other)) {
        let mut rates = records.remove(at).rates;
        rates.append(&mut record.rates);
        record.rates = rates;
    }
    records.push(record);
    let stored = Stored { format: FORMAT, records: newest(records) };
    let text = serde_json::to_string_pretty(&stored)
        .map_err(|e| Error::Rates { path: path.to_owned(), message: e.to_string() })?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(gptq_records::Error::io("create", folder))?;
    }
    Ok(atomic_file::replace(path, (text + "\n").as_bytes())?)
}

fn newest(mut records: Vec<Record>) -> Vec<Record> {
    records.split_off(records.len().saturating_sub(MOST_RECORDS))
}

/// The day in UTC.
pub(crate) fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date(since.as_secs() / 86_400)
}

/// A day by its number from 1970 on (years that begin in March, in eras of 400).
fn date(day: u64) -> String {
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + next)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::stage_rates::Stage;

    fn record(width: &str, rates: &[(Stage, f64)]) -> Record {
        Record {
            device: "cpu".to_owned(),
            width: width.to_owned(),
            hidden: 256,
            ranks: 1,
            date: date(20_785),
            rates: rates.iter().copied().collect(),
        }
    }

    #[test]
    fn a_later_benchmark_adds_to_an_earlier_one_and_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gptq/rates.json");
        assert_eq!(read(&path).unwrap(), []);
        keep(&path, record("tiny", &[(Stage::Forward, 1e9), (Stage::Solve, 2e9)])).unwrap();
        keep(&path, record("7b", &[(Stage::Forward, 5e9)])).unwrap();
        keep(&path, record("tiny", &[(Stage::Forward, 3e9), (Stage::SolveTrial, 4e9)])).unwrap();
        let tiny = [(Stage::Forward, 3e9), (Stage::Solve, 2e9), (Stage::SolveTrial, 4e9)];
        assert_eq!(
            read(&path).unwrap(),
            [record("7b", &[(Stage::Forward, 5e9)]), record("tiny", &tiny)]
        );
        assert_eq!(fs::read_dir(dir.path().join("gptq")).unwrap().count(), 1);
        let many = vec![record("tiny", &[]); MOST_RECORDS + 3];
        assert_eq!(newest(many).len(), MOST_RECORDS);
    }

    #[test]
    fn what_no_benchmark_writes_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rates.json");
        let of = |rate: &str, ranks: &str, device: &str| {
            format!(
                r#"{{"format":1,"records":[{{"device":"{device}","width":"tiny","hidden":256,
                "ranks":{ranks},"date":"2026-11-24","rates":{{"forward":{rate}}}}}]}}"#
            )
        };
        fs::write(&path, of("1e9", "1", "cpu")).unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
        let long = "x".repeat(LONGEST + 1);
        let many = vec![record("tiny", &[]); MOST_RECORDS + 1];
        let many = serde_json::to_string(&Stored { format: FORMAT, records: many }).unwrap();
        for wrong in [
            of("0", "1", "cpu"),
            of("-1e9", "1", "cpu"),
            of("1e400", "1", "cpu"),
            of("1e30", "1", "cpu"),
            of("null", "1", "cpu"),
            of("NaN", "1", "cpu"),
            of("1e9", "0", "cpu"),
            of("1e9", "99999999999", "cpu"),
            of("1e9", "1", &long),
            of("1e9", "1", "cpu").replace("\"format\":1", "\"format\":2"),
            of("1e9", "1", "cpu").replace("forward", "fast"),
            many,
            "[".repeat(100_000),
            String::new(),
        ] {
            fs::write(&path, &wrong).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("rates.json"), "{error}");
            // It is no reason not to measure again.
            keep(&path, record("tiny", &[(Stage::Forward, 1e9)])).unwrap();
            assert_eq!(read(&path).unwrap().len(), 1);
        }
        assert!(keep(&path, record("tiny", &[(Stage::Forward, f64::INFINITY)])).is_err());
        // A folder in its place is none, either.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(read(&path).is_err() && keep(&path, record("tiny", &[])).is_err());
    }

    #[test]
    fn days_have_dates() {
        for (day, expected) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (20_785, "2026-11-28"),
            (47_540, "2100-02-28"),
        ] {
            assert_eq!(date(day), expected, "{day}");
        }
    }
}
