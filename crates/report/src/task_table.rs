//! Results on tasks side by side, for the report and for cards.

use std::collections::BTreeSet;

use gptq_records::branch_report::TaskRecord;
use serde::Serialize;

use crate::compare::Comparison;
use crate::units;
use crate::verdict::task_name;

/// Branches and their results.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct TaskTable {
    /// Tasks with their metrics.
    pub(crate) columns: Vec<String>,
    /// A name and what is in each column: first the dense model, where it was measured, too.
    pub(crate) rows: Vec<(String, Vec<String>)>,
    /// What measured them, in a sentence.
    pub(crate) harnesses: String,
}

impl TaskTable {
    /// The table of a comparison; `None` where no branch has results.
    pub(crate) fn of(comparison: &Comparison<'_>) -> Option<Self> {
        let records = || comparison.rows.iter().flat_map(|row| &row.branch.tasks);
        let columns: BTreeSet<String> = records().map(task_name).collect();
        if columns.is_empty() {
            return None;
        }
        let columns: Vec<String> = columns.into_iter().collect();
        let mut rows = Vec::new();
        // What branches say of the dense model is one value, or none that could be shown.
        let base: Vec<Option<f64>> = columns.iter().map(|name| base_of(name, records())).collect();
        if base.iter().any(Option::is_some) {
            let cells = base.iter().map(|value| value.map_or_else(String::new, shown));
            rows.push((comparison.base_name().to_owned(), cells.collect()));
        }
        for row in &comparison.rows {
            let cell = |name: &String| {
                let record = row.branch.tasks.iter().find(|record| task_name(record) == *name);
                record.map_or_else(String::new, |record| match record.standard_error {
                    Some(error) => format!("{} ± {}", shown(record.value), shown(error)),
                    None => shown(record.value),
                })
            };
            rows.push((row.branch.branch.clone(), columns.iter().map(cell).collect()));
        }
        let harnesses: BTreeSet<&str> = records().map(|r| r.harness.as_str()).collect();
        let harnesses = harnesses.into_iter().collect::<Vec<_>>().join(", ");
        let harnesses = format!("Tasks: {harnesses}; ± is the standard error over questions.");
        Some(Self { columns, rows, harnesses })
    }
}

fn base_of<'a>(name: &str, records: impl Iterator<Item = &'a TaskRecord>) -> Option<f64> {
    let mut values = records.filter(|record| task_name(record) == name).filter_map(|r| r.base);
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}

fn shown(value: f64) -> String {
    units::number(value, 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::comparisons;
    use crate::samples::{branch, report};

    #[test]
    fn every_task_has_a_column_and_the_dense_model_a_row() {
        let mut all = report([
            branch("4bit", 4, Some(128), 19.0, 0.01),
            branch("3bit", 3, Some(128), 20.0, 0.08),
        ]);
        assert_eq!(TaskTable::of(&comparisons(&all, None)[0]), None);
        let record = |value: f64, base| TaskRecord {
            task: "facts".to_owned(),
            metric: "acc".to_owned(),
            value,
            standard_error: Some(0.025),
            higher_is_better: true,
            samples: Some(400),
            few_shot: Some(0),
            harness: "lm_eval 0.4.9".to_owned(),
            dtype: "f32".to_owned(),
            base,
        };
        all.branches[0].set_task(record(0.71, Some(0.72)));
        let table = TaskTable::of(&comparisons(&all, None)[0]).unwrap();
        assert_eq!(table.columns, ["facts acc"]);
        let rows: Vec<(&str, &str)> =
            table.rows.iter().map(|(name, cells)| (name.as_str(), cells[0].as_str())).collect();
        assert_eq!(rows, [("fp16", "0.7200"), ("4bit", "0.7100 ± 0.0250"), ("3bit", "")]);
        // Two values of one model are none.
        all.branches[1].set_task(record(0.60, Some(0.73)));
        let table = TaskTable::of(&comparisons(&all, None)[0]).unwrap();
        assert_eq!(table.rows[0].0, "4bit");
    }
}
