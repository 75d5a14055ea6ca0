//! What a state dict's pickle calls things by name: functions and types of PyTorch, and the opcodes.

use safetensors::Dtype;

/// The globals that a state dict may refer to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Global {
    OrderedDict,
    /// `_rebuild_tensor_v2`, or with an explicit type `_rebuild_tensor_v3`.
    RebuildTensor {
        typed: bool,
    },
    RebuildParameter,
    /// A storage of this type; `None` is one of bytes.
    Storage(Option<Dtype>),
    Dtype(Dtype),
}

impl Global {
    pub(crate) fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor { typed: false },
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensor { typed: true },
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch.storage" | "torch", "UntypedStorage") => Self::Storage(None),
            ("torch", _) => {
                let storage = name.strip_suffix("Storage").map(|kind| (storage_dtype(kind), true));
                match storage.unwrap_or_else(|| (named_dtype(name), false)) {
                    (Some(dtype), true) => Self::Storage(Some(dtype)),
                    (Some(dtype), false) => Self::Dtype(dtype),
                    (None, _) => return None,
                }
            }
            _ => return None,
        })
    }
}

/// Types by the storage class's name without `Storage`.
fn storage_dtype(kind: &str) -> Option<Dtype> {
    Some(match kind {
        "Float" => Dtype::F32,
        "Half" => Dtype::F16,
        "BFloat16" => Dtype::BF16,
        "Double" => Dtype::F64,
        "Long" => Dtype::I64,
        "Int" => Dtype::I32,
        "Short" => Dtype::I16,
        "Char" => Dtype::I8,
        "Byte" => Dtype::U8,
        "Bool" => Dtype::BOOL,
        _ => return None,
    })
}

/// Types by PyTorch's name: those that have no storage class of their own.
fn named_dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        _ => return None,
    })
}

/// Bytes of a value; no type here is smaller than a byte.
pub(crate) fn size(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Python's names of opcodes that other pickles use.
pub(crate) fn opcode_name(opcode: u8) -> Option<&'static str> {
    Some(match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        0x82..=0x84 => "EXT",
        0x93 => "STACK_GLOBAL",
        0x95 => "FRAME",
        b'P' => "PERSID",
        b'I' => "INT",
        b'L' => "LONG",
        0x8b => "LONG4",
        b'F' => "FLOAT",
        b'G' => "BINFLOAT",
        b'S' => "STRING",
        b'T' => "BINSTRING",
        b'U' => "SHORT_BINSTRING",
        b'V' => "UNICODE",
        b'B' | b'C' | 0x8e | 0x96 => "BYTES",
        b'0' => "POP",
        b'1' => "POP_MARK",
        b'2' => "DUP",
        b'd' => "DICT",
        b'l' => "LIST",
        b'g' => "GET",
        b'p' => "PUT",
        0x8f..=0x91 => "SET",
        _ => return None,
    })
}
