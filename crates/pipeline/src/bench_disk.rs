//! The ends of a run that are no arithmetic: a block's tensors read, its linears written, what was
//! written summed. Each goes the way of a run, and stands beside the least that its bytes take:
//!
//! | | as a run does it | floor |
//! | --- | --- | --- |
//! | read | [`Model::load_block`]: mapped, checked, converted, uploaded | one read after the other |
//! | write | [`CheckpointWriter`]: every tensor to its place, summed on the way; synced | one write, synced |
//! | hash | the sum that `verify` makes, tensors side by side | as many equal parts as cores, in memory |
//!
//! Files are made in a folder of the caller's, whose disk is meant, and are gone afterwards. Before a
//! read the system is asked to forget the file; one in a tmpfs stays in memory, for the floor as well.

use std::collections::BTreeMap;
use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use gptq_checkpoint::{
    Bits, CONFIG_FILE, Checkpoint, CheckpointWriter, GptqLinear, Layout, ModelConfig, Partial,
    Sealed,
};
use gptq_compute::Device;
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, split_mix};
use gptq_records::digest::{of_weights, sha256};
use half::f16;
use rayon::prelude::*;
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use serde_json::{Map, json};

use crate::bench::{Width, halves};
use crate::error::{Error, Result};
use crate::host_memory::ensure;
use crate::write::{copy_dense, quantize_config};

/// Rounds; the least of each counts, as a disk has moods.
const ROUNDS: usize = 3;
/// Bytes of a plain read.
const PIECE: usize = 1 << 20;
/// Name of the folder that files are made in, but for its end.
const FOLDER: &str = "gptq-bench";
const SOURCE: &str = "model.safetensors";

/// Bytes that went somewhere.
#[derive(Clone, Debug, Serialize)]
pub struct Transfer {
    /// `read`, `write` or `hash`.
    pub operation: &'static str,
    /// Bytes of the files.
    pub bytes: u64,
    /// Seconds, the least of a few rounds.
    pub seconds: f64,
    /// Bytes a second.
    pub rate: f64,
    /// Bytes a second of the floor.
    pub floor_rate: f64,
    /// The rate over the floor's.
    pub fraction: f64,
}

/// A block and its quantized linears, in memory and on the disk.
struct Files<'a> {
    device: &'a Device,
    spec: &'a QuantSpec,
    /// Removed when it is dropped.
    folder: Partial,
    linears: Vec<(String, GptqLinear)>,
}

/// Reads, writes and sums a synthetic block in `dir`.
///
/// # Errors
/// A block that does not fit in memory, and files that cannot be made.
pub fn bench_disk(
    device: &Device,
    width: Width,
    spec: &QuantSpec,
    dir: &Path,
) -> Result<[Transfer; 3]> {
    let weights: usize = width.sides().iter().map(|(rows, cols)| rows * cols).sum();
    // In f32 as read on the CPU, its codes, and what was written.
    ensure("A block on its way from and to the disk", 6 * weights as u64, "use a smaller --width")?;
    let files = Files {
        device,
        spec,
        folder: Partial::create(&dir.join(FOLDER))?,
        linears: quantized(width, spec)?,
    };
    files.make_source(width)?;
    let source = Checkpoint::open(files.folder.path())?;
    let written = {
        let sealed = files.write(&source)?;
        let path = weight_file(&sealed);
        std::fs::read(&path).map_err(gptq_records::Error::io("read", &path))?
    };
    let mut least = [f64::INFINITY; 6];
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let sealed = files.write(&source)?;
        let write = start.elapsed().as_secs_f64();
        let path = weight_file(&sealed);
        let failed = |why| gptq_records::Error::io("read", &path)(std::io::Error::other(why));
        let hash = timed(|| Ok(of_weights(&path).map_err(failed)?))?;
        // Given back before as much is written again.
        drop(sealed);
        let round = [
            files.read(&source)?,
            timed(|| files.read_plainly())?,
            write,
            files.write_plainly(&written)?,
            hash,
            timed(|| {
                hash_in_memory(&written);
                Ok(())
            })?,
        ];
        least.iter_mut().zip(round).for_each(|(least, seconds)| *least = least.min(seconds));
    }
    let [read, plain_read, write, plain_write, hash, memory] = least;
    let made = written.len() as u64;
    Ok([
        transfer("read", files.source_bytes()?, read, plain_read),
        transfer("write", made, write, plain_write),
        transfer("hash", made, hash, memory),
    ])
}

fn transfer(operation: &'static str, bytes: u64, seconds: f64, floor: f64) -> Transfer {
    let rate = bytes as f64 / seconds;
    let floor_rate = bytes as f64 / floor;
    Transfer { operation, bytes, seconds, rate, floor_rate, fraction: rate / floor_rate }
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let start = Instant::now();
    black_box(work()?);
    Ok(start.elapsed().as_secs_f64())
}

impl Files<'_> {
    fn source(&self) -> PathBuf {
        self.folder.path().join(SOURCE)
    }

    fn source_bytes(&self) -> Result<u64> {
        let path = self.source();
        let meta = std::fs::metadata(&path).map_err(gptq_records::Error::io("inspect", &path))?;
        Ok(meta.len())
    }

    /// Writes a dense model of one block, tensor by tensor.
    fn make_source(&self, width: Width) -> Result<()> {
        let text = width.config_text();
        self.folder.replace(CONFIG_FILE, text.as_bytes())?;
        let model = ModelConfig::parse(&text, &self.folder.path().join(CONFIG_FILE))?;
        let (mut header, mut end) = (Map::new(), 0);
        let tensors = model.dense_tensors();
        for (name, shape) in &tensors {
            let start = end;
            end += 2 * shape.iter().product::<usize>();
            let entry = json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
            header.insert(name.clone(), entry);
        }
        let header = json!(header).to_string();
        let path = self.source();
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            for (seed, (_, shape)) in tensors.iter().enumerate() {
                let values = halves(1, shape.iter().product(), seed as u64, 0.05);
                file.write_all(bytemuck::cast_slice(&values))?;
            }
            file.sync_all()
        };
        Ok(write().map_err(gptq_records::Error::io("write", &path))?)
    }

    /// Asks the system to read the source from the disk, the next time.
    fn forget_source(&self) -> Result<()> {
        let path = self.source();
        let ask = || Ok(fadvise(File::open(&path)?, 0, None, Advice::DontNeed)?);
        Ok(ask().map_err(gptq_records::Error::io("read", &path))?)
    }

    /// Seconds of a block on its way to the device.
    fn read(&self, source: &Checkpoint) -> Result<f64> {
        let model = Model::new(source, self.device.clone(), SourcePrecision::Half, 1)?;
        self.forget_source()?;
        timed(|| {
            let block = model.load_block(0)?;
            self.device.synchronize("reading a block")?;
            Ok(block)
        })
    }

    fn read_plainly(&self) -> Result<u64> {
        self.forget_source()?;
        let path = self.source();
        let read = || {
            let (mut file, mut buffer, mut bytes) = (File::open(&path)?, vec![0; PIECE], 0);
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok(bytes),
                    count => bytes += count as u64,
                }
            }
        };
        Ok(read().map_err(gptq_records::Error::io("read", &path))?)
    }

    /// Writes a checkpoint, whose folder has no name and goes with the answer.
    fn write(&self, source: &Checkpoint) -> Result<Sealed> {
        let out = self.folder.path().join("made");
        let config = quantize_config(self.spec)?;
        let metadata = BTreeMap::new();
        let mut writer =
            CheckpointWriter::create(&out, source, &config, Layout::Modern, &metadata, None)?;
        copy_dense(source, None, |_| true, &mut writer)?;
        for (name, linear) in &self.linears {
            writer.write_linear(name, linear)?;
        }
        Ok(writer.seal()?)
    }

    /// Seconds of the same bytes in one write.
    fn write_plainly(&self, bytes: &[u8]) -> Result<f64> {
        let path = self.folder.path().join("plain");
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        let failed = gptq_records::Error::io("write", &path);
        let start = Instant::now();
        write().map_err(failed)?;
        let seconds = start.elapsed().as_secs_f64();
        std::fs::remove_file(&path).map_err(gptq_records::Error::io("remove", &path))?;
        Ok(seconds)
    }
}

/// The one weight file of a written block.
fn weight_file(sealed: &Sealed) -> PathBuf {
    let name = sealed.files.first().map_or("", |file| &file.file_name);
    sealed.folder.path().join(name)
}

fn hash_in_memory(bytes: &[u8]) {
    let part = bytes.len().div_ceil(rayon::current_num_threads()).max(1);
    bytes.par_chunks(part).for_each(|part| {
        black_box(sha256(part));
    });
}

/// The block's linears with codes of noise.
fn quantized(width: Width, spec: &QuantSpec) -> Result<Vec<(String, GptqLinear)>> {
    let bits = Bits::new(spec.bits)?;
    let model = ModelConfig::parse(&width.config_text(), Path::new(CONFIG_FILE))?;
    let prefix = ModelConfig::block_prefix(0);
    let linear = |shape: &gptq_checkpoint::LinearShape| {
        let (rows, n) = (shape.out_features, shape.in_features);
        let group = spec.group_size.unwrap_or(n);
        let words = (bits.words(n) * rows) as u64;
        let codes =
            (0..words).into_par_iter().map(|mut word| split_mix(&mut word) as u32).collect();
        let scales = vec![f16::from_f32(0.01); n.div_ceil(group) * rows];
        let g_idx = (0..n).map(|column| (column / group) as u32).collect();
        let linear = GptqLinear::symmetric(bits, [n, rows], codes, scales, g_idx)?;
        Ok::<_, Error>((format!("{prefix}.{}", shape.name), linear))
    };
    model.block_linears(0).iter().map(linear).collect()
}

#[cfg(test)]
mod tests {
    use gptq_quant::Recipe;

    use super::*;

    #[test]
    fn a_block_goes_from_disk_to_disk_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let spec = QuantSpec::new(4, Some(128), true, 0.01, Recipe::AutoGptq);
        let width: Width = "tiny".parse().unwrap();
        let [read, write, hash] = bench_disk(&Device::Cpu, width, &spec, dir.path()).unwrap();
        let weights: usize = width.sides().iter().map(|(rows, n)| rows * n).sum();
        // fp16, and 4 bits with scales; tables, norms and headers beside them.
        let about = |bytes: u64, bits: f64| {
            let ratio = bytes as f64 * 8.0 / weights as f64 / bits;
            assert!((1.0..1.2).contains(&ratio), "{ratio}");
        };
        about(read.bytes, 16.0);
        about(write.bytes, 4.0 + 16.0 / 128.0);
        assert_eq!(write.bytes, hash.bytes);
        for (transfer, name) in [(read, "read"), (write, "write"), (hash, "hash")] {
            assert_eq!(transfer.operation, name);
            assert!(transfer.seconds > 0.0 && transfer.fraction > 0.0, "{transfer:?}");
            assert_eq!(transfer.rate, transfer.bytes as f64 / transfer.seconds);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// What is timed is what a run does: the sums agree, and the file can be read again.
    #[test]
    fn what_is_written_is_a_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let spec = QuantSpec::new(3, None, false, 0.01, Recipe::AutoGptq);
        let width: Width = "tiny".parse().unwrap();
        let folder = Partial::create(&dir.path().join(FOLDER)).unwrap();
        let linears = quantized(width, &spec).unwrap();
        let files = Files { device: &Device::Cpu, spec: &spec, folder, linears };
        files.make_source(width).unwrap();
        let source = Checkpoint::open(files.folder.path()).unwrap();
        assert_eq!(files.read_plainly().unwrap(), files.source_bytes().unwrap());
        let sealed = files.write(&source).unwrap();
        let (bytes, sum) = of_weights(&weight_file(&sealed)).unwrap();
        assert_eq!((bytes, sum), (sealed.bytes, gptq_records::digest::hex(&sealed.files[0].sum)));
        let made = Checkpoint::open(sealed.folder.path()).unwrap();
        let model = Model::new(&made, Device::Cpu, SourcePrecision::Half, 1).unwrap();
        let block = model.load_block(0).unwrap();
        let (name, linear) = &files.linears[0];
        let q = block.linear(gptq_model::LinearId::Q);
        assert_eq!(*name, q.name);
        let values = q.weight.as_host();
        assert_eq!(values.iter().copied().collect::<Vec<f32>>(), linear.dequantize());
    }
}
