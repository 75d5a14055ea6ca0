//! NCCL's functions, looked up in the library that was opened.
//!
//! NCCL is opened here rather than by cudarc, which looks for `libnccl.so` alone: its packages hold
//! `libnccl.so.2`, and the bare name comes with the headers.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};
use libloading::Library as Opened;

/// What this program calls of NCCL.
pub(super) struct Api {
    pub(super) get_version: unsafe extern "C" fn(*mut c_int) -> ncclResult_t,
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    pub(super) init_rank:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> ncclResult_t,
    pub(super) abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    pub(super) async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    pub(super) last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    pub(super) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
    pub(super) send: unsafe extern "C" fn(
        *const c_void,
        usize,
        ncclDataType_t,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
    pub(super) recv: unsafe extern "C" fn(
        *mut c_void,
        usize,
        ncclDataType_t,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
    pub(super) group_start: unsafe extern "C" fn() -> ncclResult_t,
    pub(super) group_end: unsafe extern "C" fn() -> ncclResult_t,
}

pub(super) static API: OnceLock<Api> = OnceLock::new();

/// Takes the functions of an opened NCCL, which stays open; false when it lacks one.
pub(super) fn adopt(library: Opened) -> bool {
    // SAFETY: the symbols are NCCL's, whose signatures have been these since version 2.7.
    let api = unsafe { functions(&library) };
    match api {
        Ok(api) => {
            std::mem::forget(library);
            // Another thread may have been faster with the same functions.
            let _ = API.set(api);
            true
        }
        Err(_) => false,
    }
}

/// # Safety
/// The library is NCCL 2.
unsafe fn functions(library: &Opened) -> std::result::Result<Api, libloading::Error> {
    macro_rules! symbol {
        ($name:literal) => {
            // SAFETY: the caller's contract; the field's type is the function's.
            *unsafe { library.get(concat!($name, "\0").as_bytes()) }?
        };
    }
    Ok(Api {
        get_version: symbol!("ncclGetVersion"),
        get_unique_id: symbol!("ncclGetUniqueId"),
        init_rank: symbol!("ncclCommInitRank"),
        abort: symbol!("ncclCommAbort"),
        async_error: symbol!("ncclCommGetAsyncError"),
        last_error: symbol!("ncclGetLastError"),
        all_reduce: symbol!("ncclAllReduce"),
        send: symbol!("ncclSend"),
        recv: symbol!("ncclRecv"),
        group_start: symbol!("ncclGroupStart"),
        group_end: symbol!("ncclGroupEnd"),
    })
}
