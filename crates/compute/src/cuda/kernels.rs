//! The kernel files, embedded in the binary, and their machine code for one card.
//!
//! To add a kernel, put its file in [`SOURCES`]; headers of our own go to [`HEADERS`]. Every file is
//! compiled as a unit of its own, all of them in parallel when a device is created, or read from
//! the cache.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, sys::CUfunction_attribute};
use cudarc::nvrtc::Ptx;
use rayon::prelude::*;

use super::cache;
use super::error::StageContext;
use super::nvrtc::{Unit, compile, options, version};
use crate::error::Result;
use crate::lock::lock;

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../kernels/", $name)))),*]
    };
}

/// One operation per file.
const SOURCES: &[(&str, &str)] = embedded![
    "adam.cu",
    "add_bias.cu",
    "attention.cu",
    "attention_backward.cu",
    "attention_ruled.cu",
    "coded_join.cu",
    "coded_linear_16.cu",
    "coded_linear_2.cu",
    "coded_linear_3.cu",
    "coded_linear_4.cu",
    "coded_linear_8.cu",
    "coded_stream_2.cu",
    "coded_stream_3.cu",
    "coded_stream_4.cu",
    "coded_stream_8.cu",
    "coded_tiles.cu",
    "combine.cu",
    "convert.cu",
    "dequant.cu",
    "diagonal.cu",
    "dot.cu",
    "finite.cu",
    "fourth_powers.cu",
    "gated_backward.cu",
    "gather_columns.cu",
    "gelu_mul.cu",
    "gptq_block.cu",
    "gptq_try.cu",
    "group_scales.cu",
    "hessian_prep.cu",
    "layer_norm.cu",
    "nll.cu",
    "pack.cu",
    "permute_columns.cu",
    "read_memory.cu",
    "reverse.cu",
    "rms_norm.cu",
    "rms_norm_backward.cu",
    "rope.cu",
    "rope_part.cu",
    "round_groups.cu",
    "scale_gradient.cu",
    "scaled_sum.cu",
    "select_columns.cu",
    "select_rows.cu",
    "silu_mul.cu",
    "softcap.cu",
    "step_attention.cu",
    "step_norm.cu",
    "step_silu.cu",
    "tri_inverse.cu",
    "turn.cu",
    "unpermute.cu",
];

/// Files that kernels may include.
const HEADERS: &[(&str, &str)] = embedded![
    "attention.cuh",
    "bulk.cuh",
    "coded.cuh",
    "coded_linear.cuh",
    "coded_ring.cuh",
    "coded_stream.cuh",
    "dependent.cuh",
    "gated.cuh",
    "gptq.cuh",
    "half.cuh",
    "load.cuh",
    "mma.cuh",
    "ordered.cuh",
    "reduce.cuh"
];

/// What the assembler says of one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelReport {
    /// The file, in `kernels/`.
    pub file: String,
    /// Name of the kernel.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of local memory that a thread's stack takes.
    pub stack: usize,
    /// Bytes that a thread writes to local memory for want of registers.
    pub spill_stores: usize,
    /// Bytes that it reads back.
    pub spill_loads: usize,
    /// Bytes of shared memory of a block, without what a launch adds.
    pub shared: usize,
}

/// Names of all kernel files.
pub fn kernel_files() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|source| source.0)
}

/// Compiles every kernel for an architecture such as `sm_80` or `sm_90a`, without a GPU and without
/// the cache, and reports what each kernel takes.
pub fn compile_all(arch: &str) -> Result<Vec<KernelReport>> {
    let reports: Vec<Vec<KernelReport>> = SOURCES
        .par_iter()
        .map(|&(file, text)| Ok(parse_log(file, &compile(&unit(file, text, arch))?.log)))
        .collect::<Result<_>>()?;
    Ok(reports.concat())
}

fn unit<'a>(file: &'a str, text: &'a str, arch: &'a str) -> Unit<'a> {
    Unit { file, text, headers: HEADERS, options: options(arch), arch }
}

/// The modules of one card and the functions looked up in them.
pub(crate) struct Kernels {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: Mutex<HashMap<(&'static str, &'static str), CudaFunction>>,
}

impl Kernels {
    /// Compiles or reads all kernels for `arch` and loads them into `context`.
    pub(super) fn load(context: &Arc<CudaContext>, arch: &str) -> Result<Self> {
        let folder = cache::folder();
        let version = version()?;
        let cubins: Vec<_> = SOURCES
            .par_iter()
            .map(|&(file, text)| {
                Ok((file, cubin(folder.as_deref(), version, &unit(file, text, arch))?))
            })
            .collect::<Result<_>>()?;
        let mut modules = HashMap::new();
        for (file, cubin) in cubins {
            let module = context.load_module(Ptx::from_binary(cubin)).stage("kernel loading")?;
            modules.insert(file, module);
        }
        Ok(Self { modules, functions: Mutex::default() })
    }

    /// Kernel `name` of `file`, allowed `shared` bytes of dynamic shared memory.
    ///
    /// # Panics
    /// When no such file is embedded: names are literals in this crate.
    pub(super) fn function(
        &self,
        file: &'static str,
        name: &'static str,
        shared: usize,
    ) -> Result<CudaFunction> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(&(file, name)) {
            return Ok(function.clone());
        }
        let function = self.modules[file].load_function(name).stage(name)?;
        if shared > 0 {
            const SHARED: CUfunction_attribute =
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(SHARED, shared as i32).stage(name)?;
        }
        functions.insert((file, name), function.clone());
        Ok(function)
    }
}

/// Machine code from the cache, or from the compiler.
fn cubin(folder: Option<&Path>, version: (i32, i32), unit: &Unit<'_>) -> Result<Vec<u8>> {
    let Some(folder) = folder else { return Ok(compile(unit)?.cubin) };
    let version = format!("{}.{}", version.0, version.1);
    let mut parts = vec![version.as_bytes(), unit.file.as_bytes(), unit.text.as_bytes()];
    parts.extend(unit.headers.iter().flat_map(|h| [h.0.as_bytes(), h.1.as_bytes()]));
    parts.extend(unit.options.iter().map(String::as_bytes));
    let key = cache::key(&parts);
    if let Some(cubin) = cache::load(folder, &key) {
        return Ok(cubin);
    }
    let compiled = compile(unit)?;
    cache::store(folder, &key, &compiled.cubin);
    Ok(compiled.cubin)
}

/// Reads the assembler's report, a few lines a kernel:
/// ```text
/// ptxas info    : Compiling entry function 'add' for 'sm_80'
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 12 registers, used 1 barriers, 128 bytes smem
/// ```
fn parse_log(file: &str, log: &str) -> Vec<KernelReport> {
    let mut reports: Vec<KernelReport> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or(rest).to_owned();
            reports.push(KernelReport { file: file.to_owned(), kernel, ..Default::default() });
        }
        let Some(report) = reports.last_mut() else { continue };
        for (unit, field) in [
            (" registers", &mut report.registers),
            (" bytes stack frame", &mut report.stack),
            (" bytes spill stores", &mut report.spill_stores),
            (" bytes spill loads", &mut report.spill_loads),
            (" bytes smem", &mut report.shared),
        ] {
            if let Some(value) = number_before(line, unit) {
                *field = value;
            }
        }
    }
    reports
}

/// The number that stands before `unit` in `line`.
fn number_before(line: &str, unit: &str) -> Option<usize> {
    let before = &line[..line.find(unit)?];
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assembler_report_is_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'one' for 'sm_90a'\n\
            ptxas info    : Function properties for one\n    \
            8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem\n\
            ptxas info    : Compiling entry function 'two' for 'sm_90a'\n\
            ptxas info    : Used 12 registers, used 0 barriers\n";
        let reports = parse_log("x.cu", log);
        assert_eq!(reports.len(), 2);
        let one = &reports[0];
        assert_eq!((one.kernel.as_str(), one.registers, one.shared), ("one", 255, 1024));
        assert_eq!((one.stack, one.spill_stores, one.spill_loads), (8, 4, 16));
        assert_eq!((reports[1].kernel.as_str(), reports[1].registers), ("two", 12));
    }
}
