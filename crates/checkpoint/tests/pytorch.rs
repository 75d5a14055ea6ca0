//! PyTorch's `.bin` files through the public API: read to the value, damaged, hostile, refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

#[allow(dead_code, reason = "shared with the tests of the command")]
#[path = "../../../tests/util/torch_file.rs"]
mod torch_file;

use std::fs;
use std::path::Path;

use gptq_checkpoint::{Checkpoint, DType, Error};
use half::{bf16, f16};
use proptest::prelude::*;
use tempfile::TempDir;
use torch_file::{Item, Pickle, TorchFile, archive};

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}"#;

/// A folder with a configuration and these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open(bytes: &[u8]) -> Result<Checkpoint, Error> {
    Checkpoint::open(folder(&[("pytorch_model.bin", bytes)]).path())
}

/// The reason for which a file is refused; it names the file.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let message = open(bytes).unwrap_err().to_string();
    for part in parts.iter().chain(&["pytorch_model.bin"]) {
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }
}

/// A file whose pickle is this one, with one storage of eight zeros.
fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    archive(&[Item::new("data.pkl", pickle.to_vec()), Item::new("data/0", vec![0; 8])], false)
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// 0, 1, 2, …
fn counted(n: usize) -> Vec<u8> {
    f32s((0..n).map(|i| i as f32))
}

fn small() -> TorchFile {
    let mut file = TorchFile::default();
    file.tensor("a", "FloatStorage", 4, &[2, 3], counted(6));
    file.tensor("b", "HalfStorage", 2, &[4], [0, 60, 0, 64, 0, 66, 0, 68].to_vec());
    file
}

#[test]
fn every_view_has_the_values_that_it_has_in_python() {
    let mut file = TorchFile::default();
    let storage = file.storage("FloatStorage", 4, counted(24));
    file.view("whole", storage, 0, &[(4, 6), (6, 1)]);
    file.view("tail", storage, 20, &[(4, 1)]);
    file.view("transposed", storage, 0, &[(6, 1), (4, 6)]);
    file.view("columns", storage, 2, &[(4, 6), (2, 1)]);
    file.view("diagonal", storage, 0, &[(4, 7)]);
    file.view("permuted", storage, 0, &[(3, 4), (2, 12), (4, 1)]);
    file.view("repeated", storage, 5, &[(3, 0), (2, 1)]);
    file.view("row", storage, 6, &[(1, 77), (6, 1)]);
    file.view("scalar", storage, 23, &[]);
    file.view("empty", storage, 24, &[(0, 6), (6, 1)]);
    file.views[0].parameter = true;
    for zip64 in [false, true] {
        let checkpoint = open(&archive(&file.items(), zip64)).unwrap();
        let check = |name: &str, shape: &[usize], values: &[u8]| {
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!((tensor.dtype, tensor.shape), (DType::F32, shape), "{name}");
            let values: Vec<f32> = values.iter().map(|&v| v.into()).collect();
            assert_eq!(tensor.to_f32(), values, "{name}");
            checkpoint.release(name);
            assert_eq!(checkpoint.tensor(name).unwrap().to_f32(), values, "{name}, read again");
        };
        let all: Vec<u8> = (0..24).collect();
        check("whole", &[4, 6], &all);
        check("tail", &[4], &[20, 21, 22, 23]);
        let turned: Vec<u8> = (0..6).flat_map(|c| (0..4).map(move |r| 6 * r + c)).collect();
        check("transposed", &[6, 4], &turned);
        check("columns", &[4, 2], &[2, 3, 8, 9, 14, 15, 20, 21]);
        check("diagonal", &[4], &[0, 7, 14, 21]);
        let mut permuted = Vec::new();
        for (i, j) in [(0, 0), (0, 12), (4, 0), (4, 12), (8, 0), (8, 12)] {
            permuted.extend((0..4).map(|k| i + j + k));
        }
        check("permuted", &[3, 2, 4], &permuted);
        check("repeated", &[3, 2], &[5, 6, 5, 6, 5, 6]);
        check("row", &[1, 6], &[6, 7, 8, 9, 10, 11]);
        check("scalar", &[], &[23]);
        check("empty", &[0, 6], &[]);
    }
}

#[test]
fn all_float_types_are_read() {
    let values = [1.5_f32, -2.0, 0.0, 65504.0];
    let halves = |to: fn(f32) -> [u8; 2]| values.into_iter().flat_map(to).collect();
    let mut file = TorchFile::default();
    file.tensor("f32", "FloatStorage", 4, &[2, 2], f32s(values));
    file.tensor("f16", "HalfStorage", 2, &[2, 2], halves(|v| f16::from_f32(v).to_le_bytes()));
    file.tensor("bf16", "BFloat16Storage", 2, &[4], halves(|v| bf16::from_f32(v).to_le_bytes()));
    file.tensor("i64", "LongStorage", 8, &[1], vec![0; 8]);
    file.tensor("bool", "BoolStorage", 1, &[1], vec![1]);
    let checkpoint = open(&file.bytes()).unwrap();
    assert_eq!(checkpoint.tensor("f32").unwrap().to_f32(), values);
    assert_eq!(checkpoint.tensor("f16").unwrap().to_f32(), values);
    let wide = checkpoint.tensor("bf16").unwrap().to_f32();
    assert_eq!(wide, values.map(|v| bf16::from_f32(v).to_f32()));
    // What is there for other uses is no hindrance until it is asked for.
    for (name, dtype) in [("i64", "I64"), ("bool", "BOOL")] {
        assert_eq!(checkpoint.stored_type(name).unwrap().to_string(), dtype);
        let message = checkpoint.tensor(name).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains(dtype), "{message}");
    }
}

#[test]
fn shards_are_found_by_their_index() {
    let mut second = TorchFile::default();
    second.tensor("c", "FloatStorage", 4, &[1], counted(1));
    let index = r#"{"weight_map": {"a": "1.bin", "b": "1.bin", "c": "2.bin"}}"#;
    let files = |index: &'static str| {
        folder(&[
            ("pytorch_model.bin.index.json", index.as_bytes()),
            ("1.bin", &small().bytes()),
            ("2.bin", &second.bytes()),
        ])
    };
    let dir = files(index);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32(), [1.0, 2.0, 3.0, 4.0]);

    let fails = |dir: &Path, part: &str| {
        let message = Checkpoint::open(dir).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("bin.index.json"), "{message}");
    };
    fs::remove_file(dir.path().join("2.bin")).unwrap();
    fails(dir.path(), "2.bin");
    // A tensor that its shard lacks is missed by whoever asks for it.
    let dir = files(r#"{"weight_map": {"a": "1.bin", "c": "1.bin"}}"#);
    let message = Checkpoint::open(dir.path()).unwrap().tensor("c").unwrap_err().to_string();
    assert!(message.contains("`c`") && message.contains("bin.index.json"), "{message}");
    fails(files(r#"{"weight_map": {"a": "../1.bin"}}"#).path(), "../1.bin");
}

#[test]
fn safetensors_come_first() {
    let safe = safetensors::serialize(
        std::iter::empty::<(&str, safetensors::tensor::TensorView<'_>)>(),
        None,
    );
    let dir = folder(&[("pytorch_model.bin", b"damaged"), ("model.safetensors", &safe.unwrap())]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().count(), 0);
}

#[test]
fn other_files_are_distinguished_from_damaged_ones() {
    let legacy = [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
    refused(&legacy, &["before 1.6"]);
    refused(b"", &["no ZIP archive"]);
    refused(b"<!doctype html>", &["no ZIP archive"]);
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", &["Git LFS pointer"]);
}

#[test]
fn a_truncated_archive_is_an_error_at_every_length() {
    for zip64 in [false, true] {
        let whole = archive(&small().items(), zip64);
        for len in 0..whole.len() {
            refused(&whole[..len], &["cannot be read as PyTorch weights"]);
        }
        let mut longer = whole.clone();
        longer.push(0);
        refused(&longer, &["truncated"]);
    }
}

// ---- Hostile pickles ----

/// `GLOBAL(argument)`, as a reduce attack is written by hand.
fn call(module: &str, name: &str, argument: &str) -> Vec<u8> {
    let mut p = Pickle::new();
    p.global(module, name).text(argument).op(0x85).op(b'R').op(b'.');
    p.0
}

#[test]
fn os_system_is_refused() {
    for module in ["os", "posix", "nt"] {
        let file = with_pickle(&call(module, "system", "touch /tmp/owned"));
        refused(&file, &[&format!("`{module}.system`")]);
    }
}

#[test]
fn builtins_eval_is_refused() {
    for (module, name) in [
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"),
        ("torch", "Storage"),
        ("torch", "nn.Module"),
        ("torch._utils", "_rebuild_qtensor"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections ", "OrderedDict"),
    ] {
        refused(&with_pickle(&call(module, name, "1")), &[&format!("`{module}.{name}`")]);
    }
}

#[test]
fn what_a_call_returns_is_not_called() {
    // OrderedDict()(): the result of a reduce as the function of the next.
    let mut p = Pickle::new();
    p.ordered_dict().op(b')').op(b'R').op(b'.');
    refused(&with_pickle(&p.0), &["calls what is no global"]);
    // A type or storage as a function, and known functions with other arguments.
    for (module, name) in
        [("torch", "FloatStorage"), ("torch", "uint16"), ("torch._utils", "_rebuild_parameter")]
    {
        refused(&with_pickle(&call(module, name, "x")), &["it calls"]);
    }
    refused(&with_pickle(&call("collections", "OrderedDict", "x")), &["OrderedDict"]);
    refused(&with_pickle(&call("torch._utils", "_rebuild_tensor_v2", "x")), &["tensor"]);
}

#[test]
fn other_opcodes_are_named() {
    let with = |bytes: &[u8]| with_pickle(&[&[0x80, 2], bytes].concat());
    refused(&with(b"(S'touch'\nios\nsystem\n."), &["0x53 (STRING)"]);
    refused(&with(b"ios\nsystem\n."), &["0x69 (INST)"]);
    refused(&with(b"(cos\nsystem\no."), &["`os.system`"]);
    refused(&with(b"}o."), &["0x6f (OBJ)"]);
    refused(&with(b")\x81."), &["0x81 (NEWOBJ)"]);
    refused(&with(b"X\x02\0\0\0osX\x06\0\0\0system\x93."), &["0x93 (STACK_GLOBAL)"]);
    refused(&with(b"\x82\x01."), &["0x82 (EXT)"]);
    refused(&with(b"Pid\n."), &["0x50 (PERSID)"]);
    refused(&with(b"\xff"), &["0xff (unknown)"]);
    refused(&with_pickle(&[0x80, 4, 0x95]), &["protocol 4"]);
}

#[test]
fn malformed_pickles_are_refused() {
    let with = |bytes: &[u8]| with_pickle(&[&[0x80, 2], bytes].concat());
    for (bytes, part) in [
        (&b""[..], "truncated"),
        (b".", "stack is empty"),
        (b"(.", "stack is empty"),
        (b"N(q\0.", "stack is empty"),
        (b"u.", "lacks a MARK"),
        (b"h\x07.", "memo has no value 7"),
        (b"N.", "no dictionary"),
        (b"}K\x01K\x02s.", "a key of its dictionary is no name"),
        (b"}X\x01\0\0\0aK\x02s.", "`a` is no tensor"),
        (b"}(X\x01\0\0\0au.", "sets items"),
        (b"N(NNu.", "sets items"),
        (b"}Nb.", "sets attributes"),
        (b"N}b.", "sets items"),
        (b"NNa.", "appends to what is no list"),
        (b"X\xff\xff\xff\xffa.", "truncated"),
        (b"X\x01\0\0\0\xff.", "UTF-8"),
        (b"cos", "truncated"),
        (b"\x8a\x09123456789.", "integer is too large"),
        (b"NQ.", "storage in an unknown way"),
        (b"NNR.", "calls what is no global"),
    ] {
        refused(&with(bytes), &[part]);
    }
}

#[test]
fn memo_bombs_cost_nothing() {
    // A billion laughs: each tuple holds the one before twice.
    let mut p = Pickle::new();
    p.op(b')').op(b'q').op(0);
    for _ in 0..1_000_000 {
        p.0.extend([b'h', 0, b'h', 0, 0x86, b'q', 0]);
    }
    p.op(b'.');
    refused(&with_pickle(&p.0), &["no dictionary"]);
    // Depth.
    let mut p = Pickle::new();
    p.op(b')');
    p.0.extend([0x85; 1_000_000]);
    p.op(b'.');
    refused(&with_pickle(&p.0), &["no dictionary"]);
    // A place in the memo that a vector would have to grow to.
    refused(&with_pickle(b"\x80\x02Nr\xff\xff\xff\xff."), &["no dictionary"]);
    // A shape of a million dimensions, used again and again.
    let mut p = Pickle::new();
    p.op(b'(');
    p.0.extend([b'K', 1].repeat(1_000_000));
    p.op(b't').op(b'q').op(0).global("torch._utils", "_rebuild_tensor_v2").op(b'(');
    p.persistent("FloatStorage", "0", 2);
    p.int(0).op(b'h').op(0).op(b'h').op(0).op(0x89).op(b'}').op(b't').op(b'R').op(b'.');
    refused(&with_pickle(&p.0), &["impossible arguments"]);
    // Nor is anything read that no model needs.
    refused(&with_pickle(&vec![b'('; 9 << 20]), &["more than the 8388608 allowed"]);
}

// ---- Hostile archives ----

#[test]
fn compressed_entries_are_refused() {
    let mut items = small().items();
    items[2].method = 8;
    refused(&archive(&items, false), &["`archive/data/0`", "compressed"]);
    // Quine bombs name the same bytes many times over.
    let mut items = small().items();
    items[2].size += 64;
    refused(&archive(&items, false), &["`archive/data/0` overlaps"]);
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for name in ["../../etc/passwd", "/etc/passwd", "archive/../x", "c:\\x", "archive//x", "a\0b"] {
        let mut items = small().items();
        items[3].name = name.to_owned();
        refused(&archive(&items, true), &["a name that PyTorch never writes"]);
    }
    let mut items = small().items();
    items[3].name = "other/data/1".to_owned();
    refused(&archive(&items, false), &["several folders"]);
}

#[test]
fn duplicated_names_are_refused() {
    let mut items = small().items();
    items.push(items[2].clone());
    refused(&archive(&items, false), &["`archive/data/0` appears twice"]);
    let mut file = small();
    file.views[1].name = "a".to_owned();
    refused(&file.bytes(), &["tensor `a` appears twice"]);
}

#[test]
fn storages_of_another_size_are_refused() {
    for elements in [5, 7, -1, i64::MAX] {
        let mut file = small();
        file.storages[0].elements = elements;
        refused(&file.bytes(), &[]);
    }
    let mut file = small();
    file.storages[0].elements = 7;
    refused(&file.bytes(), &["tensor `a`", "28 bytes", "24"]);
    let mut items = small().items();
    items.remove(3);
    refused(&archive(&items, false), &["tensor `b`", "`data/1`"]);
    items.remove(0);
    refused(&archive(&items, false), &["`data.pkl`"]);
    let mut items = small().items();
    items[1].bytes = b"big".to_vec();
    items[1].size = 3;
    refused(&archive(&items, false), &["little-endian"]);
}

#[test]
fn views_outside_of_their_storage_are_refused() {
    let huge = 1 << 40;
    for (offset, dims) in [
        (1, &[(2, 3), (3, 1)][..]),
        (0, &[(3, 3), (3, 1)]),
        (0, &[(2, 4), (3, 1)]),
        (7, &[(0, 1)]),
        // More values than the storage has, all of them within.
        (0, &[(7, 0)]),
        (0, &[(huge, 0), (huge, 0)]),
        (0, &[(2, huge), (2, huge)]),
        (0, &[(2, i64::MAX), (2, i64::MAX), (2, i64::MAX)]),
        (-1, &[(1, 1)]),
        (0, &[(-1, 1)]),
        (5, &[(2, -1)]),
    ] {
        let mut file = small();
        file.view("c", 0, offset, dims);
        let message = open(&file.bytes()).unwrap_err().to_string();
        let named =
            message.contains("tensor `c` of shape") || message.contains("rebuilds a tensor");
        assert!(named, "{dims:?}: {message}");
    }
}

#[test]
fn directories_that_contradict_themselves_are_refused() {
    let whole = archive(&small().items(), true);
    // The end record at the very end, the one of zip64 and its locator before it.
    let end = whole.len() - 22;
    let wide = end - 20 - 56;
    for (at, value) in [
        // Count, size and start in the narrow record, then in the wide one; the locator's target.
        (end + 10, 3),
        (end + 12, 3),
        (end + 16, 3),
        (wide + 32, 3),
        (wide + 40, 3),
        (wide + 48, 3),
        (wide + 55, 255),
        (end - 12, 3),
        (end - 5, 255),
    ] {
        let mut file = whole.clone();
        file[at] = value;
        refused(&file, &[]);
    }
}

// ---- Properties ----

/// Reads everything that a folder can give, as a run would.
fn read_all(dir: &Path) -> Result<usize, Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut values = 0;
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            values += tensor.to_f32().len();
            checkpoint.release(name);
        }
    }
    Ok(values)
}

fn safetensors_file(tensors: &[(String, [usize; 2])], values: usize) -> Vec<u8> {
    let entries: Vec<String> = tensors
        .iter()
        .map(|(name, [from, to])| {
            let shape = to.saturating_sub(*from) / 4;
            format!(r#""{name}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{from},{to}]}}"#)
        })
        .collect();
    let json = format!("{{{}}}", entries.join(","));
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &vec![0; values]].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever bytes change, a file is read or refused, and what is read is no larger than it.
    #[test]
    fn damage_is_an_error_or_harmless(
        zip64: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = small();
        file.view("t", 0, 0, &[(3, 1), (2, 3)]);
        let safe = safetensors_file(&[("a".to_owned(), [0, 8]), ("b".to_owned(), [8, 12])], 12);
        for (name, mut bytes) in
            [("pytorch_model.bin", archive(&file.items(), zip64)), ("model.safetensors", safe)]
        {
            for (at, value) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let dir = folder(&[(name, &bytes)]);
            if let Ok(values) = read_all(dir.path()) {
                prop_assert!(values <= 3 * bytes.len(), "{values} values of {} bytes", bytes.len());
            }
        }
    }

    /// Ranges that do not tile a safetensors file, and names that repeat, are refused.
    #[test]
    fn safetensors_must_tile(
        mut sizes in prop::collection::vec(1..5_usize, 1..5),
        moved in any::<prop::sample::Index>(),
        by in prop_oneof![-8..0_i64, 1..9_i64],
        what in 0..4_u8,
    ) {
        let mut tensors = Vec::new();
        let mut end = 0;
        for (i, size) in sizes.drain(..).enumerate() {
            tensors.push((format!("t{i}"), [end, end + 4 * size]));
            end += 4 * size;
        }
        let dir = folder(&[("model.safetensors", &safetensors_file(&tensors, end))]);
        prop_assert_eq!(read_all(dir.path()).unwrap(), end / 4);
        let i = moved.index(tensors.len());
        let shifted = |v: usize| (v as i64 + by).max(0) as usize;
        let mut values = end;
        match what {
            // Out of range, or overlapping the neighbor.
            0 => tensors[i].1 = tensors[i].1.map(shifted),
            1 => tensors[i].1[1] = shifted(tensors[i].1[1]),
            2 => tensors.push(tensors[i].clone()),
            _ => values = shifted(end),
        }
        let dir = folder(&[("model.safetensors", &safetensors_file(&tensors, values))]);
        prop_assert!(Checkpoint::open(dir.path()).is_err());
    }

    /// Any view is either within its storage and read to the value, or refused.
    #[test]
    fn views_are_read_right_or_refused(
        offset in 0..8_i64,
        dims in prop::collection::vec((0..5_i64, 0..7_i64), 0..4),
    ) {
        let mut file = TorchFile::default();
        let storage = file.storage("FloatStorage", 4, counted(24));
        file.view("v", storage, offset, &dims);
        // The definition, in Python's terms.
        let mut expected = vec![offset];
        for &(size, stride) in &dims {
            let step = |at: i64| (0..size).map(move |i| at + i * stride);
            expected = expected.into_iter().flat_map(step).collect();
        }
        let fits = expected.len() <= 24 && expected.iter().all(|&at| at < 24);
        match open(&file.bytes()) {
            Ok(checkpoint) => {
                prop_assert!(fits);
                let values: Vec<f32> = expected.iter().map(|&at| at as f32).collect();
                prop_assert_eq!(checkpoint.tensor("v").unwrap().to_f32(), values);
            }
            Err(error) => prop_assert!(!fits && error.to_string().contains("`v`"), "{error}"),
        }
    }
}
