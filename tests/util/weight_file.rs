//! The weight file of a checkpoint, to be damaged by writing bytes into it: nothing of the code under
//! test has a part in that.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::Workdir;

/// The one weight file of a checkpoint, to be damaged.
pub(crate) struct File {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
    header: Value,
}

impl File {
    pub(crate) fn open(dir: &Path) -> Self {
        let path = dir.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let header = serde_json::from_slice(&bytes[8..8 + Self::length(&bytes)]).unwrap();
        Self { path, bytes, header }
    }

    fn length(bytes: &[u8]) -> usize {
        u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize
    }

    fn range(&self, tensor: &str) -> Range<usize> {
        let offsets = &self.header[tensor]["data_offsets"];
        let start = 8 + Self::length(&self.bytes);
        let at = |i: usize| start + offsets[i].as_u64().unwrap() as usize;
        at(0)..at(1)
    }

    pub(crate) fn shape(&self, tensor: &str) -> [usize; 2] {
        let shape = &self.header[tensor]["shape"];
        [0, 1].map(|i| shape[i].as_u64().unwrap() as usize)
    }

    pub(crate) fn tensor(&mut self, tensor: &str) -> &mut [u8] {
        let range = self.range(tensor);
        &mut self.bytes[range]
    }

    pub(crate) fn write(&self) {
        fs::write(&self.path, &self.bytes).unwrap();
    }

    /// Replaces text in the header by text of the same length.
    pub(crate) fn retell(&mut self, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let end = 8 + Self::length(&self.bytes);
        let header = String::from_utf8(self.bytes[8..end].to_vec()).unwrap();
        assert!(header.contains(from), "{header}");
        self.bytes[8..end].copy_from_slice(header.replace(from, to).as_bytes());
    }
}

/// Puts back what was there after `damage` was looked at.
pub(crate) fn with_damage(
    dir: &Workdir,
    name: &str,
    damage: impl FnOnce(&mut File),
    look: impl FnOnce(),
) {
    let mut file = File::open(&dir.path(name));
    let whole = file.bytes.clone();
    damage(&mut file);
    file.write();
    look();
    fs::write(&file.path, whole).unwrap();
}

impl File {
    /// Changes the codes of a linear, `[in][out]`, by the format's definition: a bit stream down each
    /// column of words.
    pub(crate) fn change_codes(
        &mut self,
        linear: &str,
        bits: usize,
        change: impl FnOnce(&mut Vec<Vec<u8>>),
    ) {
        let name = format!("{linear}.qweight");
        let [words, outputs] = self.shape(&name);
        let bytes = self.tensor(&name);
        let bit = |bytes: &[u8], at: usize, output: usize| {
            let byte = 4 * (at / 32 * outputs + output) + at % 32 / 8;
            (byte, bytes[byte] >> (at % 8) & 1)
        };
        let code = |input: usize, output: usize| {
            (0..bits).map(|b| bit(bytes, input * bits + b, output).1 << b).sum::<u8>()
        };
        let inputs = 32 * words / bits;
        let mut codes: Vec<Vec<u8>> =
            (0..inputs).map(|i| (0..outputs).map(|o| code(i, o)).collect()).collect();
        change(&mut codes);
        for (input, row) in codes.iter().enumerate() {
            for (output, code) in row.iter().enumerate() {
                for b in 0..bits {
                    let at = input * bits + b;
                    let (byte, _) = bit(bytes, at, output);
                    bytes[byte] = bytes[byte] & !(1 << (at % 8)) | (code >> b & 1) << (at % 8);
                }
            }
        }
    }

    /// Changes every value of a tensor of fp16: gets the position and the value.
    pub(crate) fn change_halves(&mut self, tensor: &str, with: impl Fn(usize, f32) -> f32) {
        for (at, value) in self.tensor(tensor).chunks_exact_mut(2).enumerate() {
            let half = half::f16::from_le_bytes([value[0], value[1]]);
            let changed = half::f16::from_f32(with(at, half.to_f32()));
            value.copy_from_slice(&changed.to_le_bytes());
        }
    }

    /// Doubles all scales of a linear, or halves them: one up or down in fp16's exponent.
    pub(crate) fn scale_scales(&mut self, linear: &str, double: bool) {
        for value in self.tensor(&format!("{linear}.scales")).chunks_exact_mut(2) {
            let bits = u16::from_le_bytes([value[0], value[1]]);
            let changed = if double { bits + 0x400 } else { bits - 0x400 };
            value.copy_from_slice(&changed.to_le_bytes());
        }
    }
}

/// Puts one more tensor of f32 values into the weights of a folder.
pub(crate) fn add_tensor(folder: &Path, tensor: &str, values: &[f32]) {
    let file = folder.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let more: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let more = TensorView::new(safetensors::Dtype::F32, vec![values.len()], &more).unwrap();
    let all = stored.tensors().into_iter().chain([(tensor.to_owned(), more)]);
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone();
    fs::write(file, safetensors::serialize(all, metadata).unwrap()).unwrap();
}
