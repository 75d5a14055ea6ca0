//! Every kernel compiles for the oldest architecture supported and for Hopper, and spills nothing.
//!
//! Needs NVRTC but no GPU: name the folder of `libnvrtc.so.13` in `GPTQ_CUDA_LIB` or in
//! `LD_LIBRARY_PATH`. Without it the test says so and passes, unless `GPTQ_REQUIRE_NVRTC=1`.

use gptq_compute::cuda::{Library, compile_all, kernel_files};

/// Kernels that may spill, and how many bytes a thread; all others may not.
const SPILL_BUDGET: &[(&str, usize)] = &[];

#[test]
fn all_kernels_compile_without_spills() {
    if !Library::Nvrtc.is_present() {
        let required = std::env::var("GPTQ_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
        assert!(!required, "NVRTC was not found: {}", Library::Nvrtc.hint());
        println!("skipped: NVRTC was not found; {}", Library::Nvrtc.hint());
        return;
    }
    for arch in ["sm_80", "sm_90a"] {
        let reports = compile_all(arch).unwrap();
        for file in kernel_files() {
            assert!(reports.iter().any(|r| r.file == file), "{file} holds no kernel");
        }
        println!("{arch:>28}  registers  stack  spills  shared");
        for r in &reports {
            let spills = r.spill_stores + r.spill_loads;
            println!(
                "{:>28}  {:9}  {:5}  {spills:6}  {:6}",
                r.kernel, r.registers, r.stack, r.shared
            );
            let budget = SPILL_BUDGET.iter().find(|b| b.0 == r.kernel).map_or(0, |b| b.1);
            assert!(spills <= budget, "{} for {arch} spills {spills} bytes", r.kernel);
            assert!(r.registers > 0, "no report of {} for {arch}", r.kernel);
        }
    }
}
