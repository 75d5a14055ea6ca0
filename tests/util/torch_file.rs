//! Files as `torch.save` writes them, made without Python: for tests to read, and to damage.
//!
//! Bytes need not equal PyTorch's, but the structure does: an archive of stored entries in one
//! folder, aligned to 64 bytes, zip64 or not, with a pickle of protocol 2 that memoises what it
//! repeats.

use std::collections::HashMap;

/// One tensor: a view of a storage.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) name: String,
    /// Index of its storage.
    pub(crate) storage: usize,
    pub(crate) offset: i64,
    pub(crate) shape: Vec<i64>,
    pub(crate) strides: Vec<i64>,
    /// Wrapped as `torch.nn.Parameter`.
    pub(crate) parameter: bool,
}

/// One storage, such as a `FloatStorage`.
#[derive(Clone)]
pub(crate) struct Storage {
    pub(crate) kind: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// Elements that the pickle claims.
    pub(crate) elements: i64,
}

/// A state dict to be written.
#[derive(Clone, Default)]
pub(crate) struct TorchFile {
    pub(crate) storages: Vec<Storage>,
    pub(crate) views: Vec<View>,
}

impl TorchFile {
    /// Adds a storage of elements of `size` bytes; gives its index.
    pub(crate) fn storage(&mut self, kind: &'static str, size: usize, bytes: Vec<u8>) -> usize {
        let elements = (bytes.len() / size) as i64;
        self.storages.push(Storage { kind, bytes, elements });
        self.storages.len() - 1
    }

    /// Adds a view of a storage.
    pub(crate) fn view(&mut self, name: &str, storage: usize, offset: i64, dims: &[(i64, i64)]) {
        let (shape, strides) = dims.iter().copied().unzip();
        let name = name.to_owned();
        self.views.push(View { name, storage, offset, shape, strides, parameter: false });
    }

    /// Adds a tensor that fills a storage of its own.
    pub(crate) fn tensor(
        &mut self,
        name: &str,
        kind: &'static str,
        size: usize,
        shape: &[usize],
        bytes: Vec<u8>,
    ) {
        let storage = self.storage(kind, size, bytes);
        let mut dims: Vec<(i64, i64)> = shape.iter().map(|&d| (d as i64, 1)).collect();
        for i in (1..dims.len()).rev() {
            dims[i - 1].1 = dims[i].1 * dims[i].0;
        }
        self.view(name, storage, 0, &dims);
    }

    /// The pickle.
    pub(crate) fn pickle(&self) -> Vec<u8> {
        let mut p = Pickle::new();
        p.ordered_dict();
        p.op(b'(');
        for view in &self.views {
            p.text(&view.name);
            if view.parameter {
                p.global("torch._utils", "_rebuild_parameter").op(b'(');
            }
            let storage = &self.storages[view.storage];
            p.global("torch._utils", "_rebuild_tensor_v2").op(b'(');
            p.persistent(storage.kind, &view.storage.to_string(), storage.elements);
            p.int(view.offset).sizes(&view.shape).sizes(&view.strides);
            p.op(0x89).ordered_dict().op(b't').op(b'R');
            if view.parameter {
                p.op(0x89).ordered_dict().op(b't').op(b'R');
            }
        }
        p.op(b'u');
        // What a module's state dict carries beside its tensors.
        p.op(b'}').text("_metadata").ordered_dict().op(b'(').text("").op(b'}');
        p.text("version").int(1).op(b's').op(b'u').op(b's').op(b'b');
        p.op(b'.');
        p.0
    }

    /// The archive's entries.
    pub(crate) fn items(&self) -> Vec<Item> {
        let mut items =
            vec![Item::new("data.pkl", self.pickle()), Item::new("byteorder", b"little".to_vec())];
        for (key, storage) in self.storages.iter().enumerate() {
            items.push(Item::new(&format!("data/{key}"), storage.bytes.clone()));
        }
        items.push(Item::new("version", b"3\n".to_vec()));
        items.push(Item::new(".data/serialization_id", b"1234".to_vec()));
        items
    }

    /// The file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        archive(&self.items(), false)
    }
}

/// A pickle under construction.
pub(crate) struct Pickle(pub(crate) Vec<u8>, HashMap<Vec<u8>, u32>);

impl Pickle {
    pub(crate) fn new() -> Self {
        Self(vec![0x80, 2], HashMap::new())
    }

    pub(crate) fn op(&mut self, opcode: u8) -> &mut Self {
        self.0.push(opcode);
        self
    }

    /// Writes a value, or where it is known, its place in the memo.
    fn memoised(&mut self, bytes: Vec<u8>) -> &mut Self {
        let next = self.1.len() as u32;
        if let Some(&index) = self.1.get(&bytes) {
            self.indexed(b'h', b'j', index);
        } else {
            self.0.extend(&bytes);
            self.indexed(b'q', b'r', next);
            self.1.insert(bytes, next);
        }
        self
    }

    fn indexed(&mut self, short: u8, long: u8, index: u32) {
        match u8::try_from(index) {
            Ok(index) => self.0.extend([short, index]),
            Err(_) => {
                self.0.push(long);
                self.0.extend(index.to_le_bytes());
            }
        }
    }

    pub(crate) fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.memoised(format!("c{module}\n{name}\n").into_bytes())
    }

    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        let mut bytes = vec![b'X'];
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        self.memoised(bytes)
    }

    pub(crate) fn int(&mut self, value: i64) -> &mut Self {
        if let Ok(small) = u8::try_from(value) {
            self.0.extend([b'K', small]);
        } else if let Ok(small) = u16::try_from(value) {
            self.0.push(b'M');
            self.0.extend(small.to_le_bytes());
        } else if let Ok(small) = i32::try_from(value) {
            self.0.push(b'J');
            self.0.extend(small.to_le_bytes());
        } else {
            self.0.extend([0x8a, 8]);
            self.0.extend(value.to_le_bytes());
        }
        self
    }

    fn sizes(&mut self, sizes: &[i64]) -> &mut Self {
        if sizes.len() > 3 {
            self.op(b'(');
        }
        for &size in sizes {
            self.int(size);
        }
        match sizes.len() {
            0 => self.op(b')'),
            n @ 1..=3 => self.op(0x84 + n as u8),
            _ => self.op(b't'),
        }
    }

    pub(crate) fn ordered_dict(&mut self) -> &mut Self {
        self.global("collections", "OrderedDict").op(b')').op(b'R')
    }

    pub(crate) fn persistent(&mut self, kind: &str, key: &str, elements: i64) -> &mut Self {
        self.op(b'(').text("storage");
        match kind.rsplit_once('.') {
            Some((module, name)) => self.global(module, name),
            None => self.global("torch", kind),
        };
        self.text(key).text("cpu").int(elements).op(b't').op(b'Q')
    }
}

/// An entry of an archive, with what it claims of itself.
#[derive(Clone)]
pub(crate) struct Item {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) method: u16,
    /// Size in the directory.
    pub(crate) size: u64,
}

impl Item {
    /// An entry in the folder that PyTorch calls `archive`.
    pub(crate) fn new(name: &str, bytes: Vec<u8>) -> Self {
        let size = bytes.len() as u64;
        Self { name: format!("archive/{name}"), bytes, method: 0, size }
    }
}

/// The archive, with 64-bit sizes everywhere or nowhere.
pub(crate) fn archive(items: &[Item], zip64: bool) -> Vec<u8> {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    for item in items {
        let local = file.len();
        file.extend(b"PK\x03\x04\0\0\0\0");
        file.extend(item.method.to_le_bytes());
        // Time, date, sum and sizes: PyTorch's reader takes them from the directory, as ours does.
        file.extend([0; 16]);
        file.extend((item.name.len() as u16).to_le_bytes());
        let padding = 63 - (local + 30 + item.name.len() + 4 + 63) % 64;
        file.extend((padding as u16 + 4).to_le_bytes());
        file.extend(item.name.as_bytes());
        file.extend(b"FB");
        file.extend((padding as u16).to_le_bytes());
        file.resize(file.len() + padding, b'Z');
        file.extend(&item.bytes);
        central(&mut directory, item, local as u64, zip64);
    }
    let (start, count) = (file.len() as u64, items.len() as u64);
    let size = directory.len() as u64;
    file.extend(directory);
    if zip64 {
        let end = file.len() as u64;
        file.extend(b"PK\x06\x06");
        file.extend(44_u64.to_le_bytes());
        file.extend([0; 12]);
        for value in [count, count, size, start] {
            file.extend(value.to_le_bytes());
        }
        file.extend(b"PK\x06\x07\0\0\0\0");
        file.extend(end.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
    }
    let narrow = |value: u64| if zip64 { u32::MAX } else { value as u32 };
    file.extend(b"PK\x05\x06\0\0\0\0");
    for _ in 0..2 {
        file.extend((if zip64 { u16::MAX } else { count as u16 }).to_le_bytes());
    }
    file.extend(narrow(size).to_le_bytes());
    file.extend(narrow(start).to_le_bytes());
    file.extend([0; 2]);
    file
}

fn central(directory: &mut Vec<u8>, item: &Item, local: u64, zip64: bool) {
    let narrow = |value: u64| if zip64 { u32::MAX } else { value as u32 };
    directory.extend(b"PK\x01\x02\0\0\0\0\0\0");
    directory.extend(item.method.to_le_bytes());
    directory.extend([0; 8]);
    directory.extend(narrow(item.size).to_le_bytes());
    directory.extend(narrow(item.size).to_le_bytes());
    directory.extend((item.name.len() as u16).to_le_bytes());
    directory.extend((if zip64 { 28_u16 } else { 0 }).to_le_bytes());
    directory.extend([0; 10]);
    directory.extend(narrow(local).to_le_bytes());
    directory.extend(item.name.as_bytes());
    if zip64 {
        directory.extend([1, 0, 24, 0]);
        for value in [item.size, item.size, local] {
            directory.extend(value.to_le_bytes());
        }
    }
}
