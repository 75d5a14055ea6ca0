//! What a test may need that a machine lacks: the test says so and passes, unless `GPTQ_REQUIRE`
//! names the need (`GPTQ_REQUIRE=gpu,nvrtc`, or `all`), which makes a failure of it.
//!
//! Where `GPTQ_SKIPPED` names a file, every skip is a line of it: the test's output is hidden by
//! the test runner, and a check that ends in "all passed" should say what it did not run.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// What some tests need.
#[allow(dead_code, reason = "each test binary uses a part of it")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Need {
    /// A GPU of compute capability 8.0 or newer.
    Gpu,
    /// Two of them, and NCCL.
    Gpus,
    /// CUDA's run-time compiler, which needs no GPU.
    Nvrtc,
    /// `GPTQ_GPU_TIMING`: times are measured on an idle card only.
    Timing,
    /// `GPTQ_SHARED`: a folder with a warmed Hugging Face cache and published models.
    Shared,
    /// `GPTQ_SMOLLM2` and `HF_HOME`: a published model, and wikitext-2.
    SmolLm2,
    /// The right to mount a small file system.
    Mount,
    /// `strace`, which kills a process at a system call.
    Strace,
    /// util-linux's `script`, which runs a command on a terminal.
    Terminal,
}

impl Need {
    fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Gpus => "gpus",
            Self::Nvrtc => "nvrtc",
            Self::Timing => "timing",
            Self::Shared => "shared",
            Self::SmolLm2 => "smollm2",
            Self::Mount => "mount",
            Self::Strace => "strace",
            Self::Terminal => "terminal",
        }
    }

    /// Says that the running test is skipped, and why; fails it where the need is required.
    #[track_caller]
    #[allow(clippy::print_stdout, reason = "the output of a test")]
    pub(crate) fn is_missing(self, reason: impl Display) {
        let name = self.name();
        let required = std::env::var("GPTQ_REQUIRE").unwrap_or_default();
        let required = required.split(',').any(|r| r == name || r == "all");
        assert!(!required, "GPTQ_REQUIRE asks for {name}: {reason}");
        println!("skipped: {reason}");
        let Some(file) = std::env::var_os("GPTQ_SKIPPED") else { return };
        let thread = std::thread::current();
        let line = format!("{}: {name}: {reason}\n", thread.name().unwrap_or("a test"));
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&file)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        assert!(written.is_ok(), "cannot add to {}: {written:?}", file.display());
    }
}

/// The folder that `GPTQ_SHARED` names, with a warmed Hugging Face cache.
#[allow(dead_code, reason = "each test binary uses a part of it")]
#[track_caller]
pub(crate) fn shared() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("GPTQ_SHARED").map(PathBuf::from) else {
        Need::Shared.is_missing("GPTQ_SHARED is not set");
        return None;
    };
    let cache = folder.join("hf/hub");
    assert!(cache.is_dir(), "GPTQ_SHARED: {} is no folder", cache.display());
    Some(folder)
}
