//! `gptq_report.json` of a stranger, shown in every form: Markdown, JSON and the page.
#![no_main]

mod folder;

use std::fs;

use gptq_report::Report;
use gptq_report::markdown::markdown;
use gptq_report::page::page;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let dir = folder::folder();
    fs::write(dir.join("gptq_report.json"), data).expect("the input's file");
    let Ok(report) = Report::open(&[dir.to_owned()]) else { return };
    let page = page(&report, Some(&report)).expect("a page of any report");
    // Whatever the report holds, the page ends and carries no script of it.
    assert!(page.len() < (1 << 20) + 64 * data.len());
    markdown(&report, Some(&report));
    serde_json::to_string(&report).expect("a report is JSON");
});
