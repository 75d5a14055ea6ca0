//! Results on tasks: read from what lm-evaluation-harness writes, kept in a branch's report.

use std::path::Path;

use gptq_checkpoint::{MANIFEST_FILE, Partial, REPORT_FILE};
use serde_json::Value;

use crate::branch_report::{BranchReport, TaskRecord};
use crate::error::Result;
use crate::manifest::Manifest;

/// Names longer than these are no task's.
const MOST_NAME: usize = 200;
/// A harness's groups have some hundred tasks.
const MOST_RESULTS: usize = 10_000;

/// The results of a run of lm-evaluation-harness, `results_….json`, by task and metric.
///
/// A metric's key is its name and the filter that its answers went through, `acc,none`; beside it is
/// `acc_stderr,none`, which is `N/A` where there is none.
///
/// # Errors
/// What is not as the harness writes it, in a sentence.
pub fn parse_results(text: &[u8], dtype: &str) -> std::result::Result<Vec<TaskRecord>, String> {
    let file: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let results = file["results"].as_object().ok_or("it has no `results`")?;
    let version = file["lm_eval_version"].as_str().filter(|version| version.len() <= MOST_NAME);
    let harness = version.map_or_else(|| "lm_eval".to_owned(), |v| format!("lm_eval {v}"));
    let mut records = Vec::new();
    for (task, values) in results {
        let values = values.as_object().ok_or_else(|| format!("`{task}` has no results"))?;
        for (key, value) in values {
            let Some((metric, filter)) = key.split_once(',') else { continue };
            let Some(value) = value.as_f64().filter(|_| !metric.ends_with("_stderr")) else {
                continue;
            };
            if task.len().max(key.len()) > MOST_NAME || records.len() == MOST_RESULTS {
                return Err("it has more and longer names than a harness gives".to_owned());
            }
            if !value.is_finite() {
                return Err(format!("`{key}` of `{task}` is {value}"));
            }
            let higher = file["higher_is_better"][task][metric].as_bool();
            records.push(TaskRecord {
                task: task.clone(),
                metric: match filter {
                    "none" => metric.to_owned(),
                    _ => format!("{metric} ({filter})"),
                },
                value,
                standard_error: values
                    .get(&format!("{metric}_stderr,{filter}"))
                    .and_then(Value::as_f64)
                    .filter(|error| error.is_finite()),
                higher_is_better: higher.unwrap_or(true),
                samples: file["n-samples"][task]["effective"].as_u64(),
                few_shot: file["n-shot"][task].as_u64(),
                harness: harness.clone(),
                dtype: dtype.to_owned(),
                base: None,
            });
        }
    }
    records.sort_by(|a, b| (&a.task, &a.metric).cmp(&(&b.task, &b.metric)));
    Ok(records)
}

/// Takes results into the report of a branch's folder, and its manifest along: the folder has another
/// name until both are written.
///
/// # Errors
/// [`crate::Error::NoReport`] for a folder that has none, and those of writing.
pub fn record_tasks(dir: &Path, records: Vec<TaskRecord>) -> Result<()> {
    let mut report = BranchReport::read(dir)?;
    let manifest = Manifest::read(dir)?;
    records.into_iter().for_each(|record| report.set_task(record));
    let bytes = report.to_bytes()?;
    let folder = Partial::reopen(dir)?;
    folder.replace(REPORT_FILE, &bytes)?;
    if let Some(manifest) = manifest {
        folder.replace(MANIFEST_FILE, &manifest.with_report(&bytes).to_bytes()?)?;
    }
    folder.publish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_as_the_harness_writes_them() {
        let text = br#"{
            "results": {
                "facts": {"alias": "facts", "sample_len": 40, "acc,none": 0.625,
                          "acc_stderr,none": 0.0775, "acc_norm,none": 0.65},
                "sums": {"alias": "sums", "exact_match,strict-match": 0.25,
                         "exact_match_stderr,strict-match": "N/A"},
                "text": {"alias": "text", "bits_per_byte,none": 1.25,
                         "bits_per_byte_stderr,none": "N/A"}
            },
            "n-shot": {"facts": 0, "sums": 5},
            "n-samples": {"facts": {"original": 40, "effective": 20}},
            "higher_is_better": {"text": {"bits_per_byte": false}},
            "lm_eval_version": "0.4.13"
        }"#;
        let records = parse_results(text, "f32").unwrap();
        let names: Vec<_> = records.iter().map(|r| (r.task.as_str(), r.metric.as_str())).collect();
        let expected = [
            ("facts", "acc"),
            ("facts", "acc_norm"),
            ("sums", "exact_match (strict-match)"),
            ("text", "bits_per_byte"),
        ];
        assert_eq!(names, expected);
        let facts = &records[0];
        assert_eq!((facts.value, facts.standard_error), (0.625, Some(0.0775)));
        assert_eq!((facts.samples, facts.few_shot), (Some(20), Some(0)));
        assert_eq!((facts.harness.as_str(), facts.higher_is_better), ("lm_eval 0.4.13", true));
        assert_eq!((records[2].standard_error, records[2].few_shot), (None, Some(5)));
        assert!(!records[3].higher_is_better);
        for wrong in ["{", "{}", r#"{"results": {"a": 1}}"#] {
            assert!(parse_results(wrong.as_bytes(), "f32").is_err(), "{wrong}");
        }
    }
}
