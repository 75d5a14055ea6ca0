//! Every kernel compiles for the oldest architecture supported and for Hopper, and spills nothing.
//!
//! Needs NVRTC but no GPU: name the folder of `libnvrtc.so.13` in `GPTQ_CUDA_LIB` or in
//! `LD_LIBRARY_PATH`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

#[path = "../../../tests/util/needs.rs"]
mod needs;

use gptq_compute::cuda::{Library, compile_all, kernel_files};

/// Kernels that may spill, and how many bytes a thread; all others may not.
const SPILL_BUDGET: &[(&str, usize)] = &[];

#[test]
fn all_kernels_compile_for_the_oldest_card_without_spills() {
    compile_without_spills("sm_80");
}

#[test]
fn all_kernels_compile_for_hopper_without_spills() {
    compile_without_spills("sm_90a");
}

fn compile_without_spills(arch: &str) {
    if !Library::Nvrtc.is_present() {
        let hint = Library::Nvrtc.hint();
        needs::Need::Nvrtc.is_missing(format!("NVRTC was not found: {hint}"));
        return;
    }
    let reports = compile_all(arch).unwrap();
    for file in kernel_files() {
        // Streams need bulk copies, which the oldest card has not.
        let here = arch != "sm_80" || !file.starts_with("coded_stream_");
        assert_eq!(reports.iter().any(|r| r.file == file), here, "kernels of {file}");
    }
    println!("{arch:>28}  registers  stack  spills  shared");
    for r in &reports {
        let spills = r.spill_stores + r.spill_loads;
        println!("{:>28}  {:9}  {:5}  {spills:6}  {:6}", r.kernel, r.registers, r.stack, r.shared);
        let budget = SPILL_BUDGET.iter().find(|b| b.0 == r.kernel).map_or(0, |b| b.1);
        assert!(spills <= budget, "{} for {arch} spills {spills} bytes", r.kernel);
        assert!(r.registers > 0, "no report of {} for {arch}", r.kernel);
    }
}
