//! Compiling one kernel file to machine code with NVRTC.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use cudarc::nvrtc::{result, sys};

use super::error::StageContext;
use super::libraries::Library;
use crate::error::{Error, Result};

const STAGE: &str = "kernel compilation";

/// Machine code of a kernel file and what the assembler said of it.
pub(super) struct Compiled {
    pub(super) cubin: Vec<u8>,
    pub(super) log: String,
}

/// What is compiled: a file, the headers it may include, and the options.
pub(super) struct Unit<'a> {
    pub(super) file: &'a str,
    pub(super) text: &'a str,
    pub(super) headers: &'a [(&'a str, &'a str)],
    pub(super) options: Vec<String>,
    pub(super) arch: &'a str,
}

/// Options of every kernel. No fast-math: where speed needs an approximation, the kernel says so.
pub(super) fn options(arch: &str) -> Vec<String> {
    vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        "--ptxas-options=-v".to_owned(),
    ]
}

/// Version of the compiler, major and minor.
pub(super) fn version() -> Result<(i32, i32)> {
    Library::Nvrtc.require()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is present and both pointers are valid for a write.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().stage(STAGE)?;
    Ok((major, minor))
}

/// Compiles for `arch`, such as `sm_80` or `sm_90a`; needs no GPU.
pub(super) fn compile(unit: &Unit<'_>) -> Result<Compiled> {
    Library::Nvrtc.require()?;
    let program = Program::new(unit)?;
    // SAFETY: the program was created just above and lives until the end of this function.
    let outcome = unsafe { result::compile_program(program.0, &unit.options) };
    let log = program.log()?;
    if outcome.is_err() {
        let (file, arch) = (unit.file.to_owned(), unit.arch.to_owned());
        return Err(Error::KernelCompilation { file, arch, log });
    }
    Ok(Compiled { cubin: program.cubin()?, log })
}

/// A program handle, destroyed on drop.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(unit: &Unit<'_>) -> Result<Self> {
        let owned = |text: &str| {
            CString::new(text).map_err(|_| Error::KernelCompilation {
                file: unit.file.to_owned(),
                arch: unit.arch.to_owned(),
                log: "the source holds a NUL byte".to_owned(),
            })
        };
        let (text, name) = (owned(unit.text)?, owned(unit.file)?);
        let names: Vec<CString> = unit.headers.iter().map(|h| owned(h.0)).collect::<Result<_>>()?;
        let texts: Vec<CString> = unit.headers.iter().map(|h| owned(h.1)).collect::<Result<_>>()?;
        let pointers = |strings: &[CString]| {
            strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>()
        };
        let (header_texts, header_names) = (pointers(&texts), pointers(&names));
        let mut program = ptr::null_mut();
        // SAFETY: all strings are NUL-terminated, both arrays hold `headers.len()` of them, and
        // NVRTC copies what it is given.
        unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                unit.headers.len() as i32,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            )
        }
        .result()
        .stage(STAGE)?;
        Ok(Self(program))
    }

    fn log(&self) -> Result<String> {
        // SAFETY: the handle is valid until drop.
        let bytes = unsafe { result::get_program_log(self.0) }.stage(STAGE)?;
        let bytes: Vec<u8> = bytes.into_iter().map(|c| c as u8).collect();
        let text = CStr::from_bytes_until_nul(&bytes).map(CStr::to_string_lossy);
        Ok(text.map(std::borrow::Cow::into_owned).unwrap_or_default())
    }

    fn cubin(&self) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the handle is valid and was compiled; `size` is valid for a write.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }.result().stage(STAGE)?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: the buffer holds as many bytes as NVRTC asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) }.result().stage(STAGE)?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the handle is valid and not used again. A failure leaks a little memory.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}
