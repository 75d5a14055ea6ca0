//! Which files of a repository are worth their bytes.
//!
//! Of a model: its weights in one format, safetensors before PyTorch's, and the small files beside
//! them that every checkpoint made from it carries on. Of a dataset: one split's parquet files.
//!
//! What is chosen has to be what a reader opens, so the order of the names is asked of the reader's
//! crate; which files are shards stands in the index.

use std::collections::{BTreeMap, BTreeSet};

use gptq_checkpoint::{INDEX_END, weight_file_names};
use serde::Deserialize;

use crate::listing::RemoteFile;
use crate::{Error, Result};

/// Small files by extension; weights in other formats, images and scripts have none of these.
const SMALL_EXTENSIONS: [&str; 6] = ["json", "txt", "jinja", "model", "tiktoken", "md"];

/// Larger files are no settings, whatever their name.
const SMALL_BYTES: u64 = 64 << 20;

/// What to download.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    /// Everything that is known from the listing.
    pub(crate) files: Vec<RemoteFile>,
    /// Those of `files` that name weights.
    pub(crate) indices: Vec<RemoteFile>,
}

impl Needed {
    pub(crate) fn files(files: Vec<RemoteFile>) -> Self {
        Self { files, indices: Vec::new() }
    }

    /// Whether the shards are those of an index that is found under its usual name.
    pub(crate) fn is_sharded(&self) -> bool {
        self.indices.iter().any(|index| weight_file_names().any(|name| name == index.path))
    }
}

/// The files of a model, shards apart, or nothing where it has no weights in a known format.
pub(crate) fn model_files(listing: &[RemoteFile]) -> Option<Needed> {
    let weights = weights(listing)?;
    let wanted = |file: &&RemoteFile| weights.contains(file) || is_small(file);
    let files = listing.iter().filter(wanted).cloned().collect();
    let is_index = |file: &&&RemoteFile| file.path.ends_with(INDEX_END);
    let indices = weights.iter().filter(is_index).map(|&file| file.clone()).collect();
    Some(Needed { files, indices })
}

/// The weights: a file, or an index of shards, or what early GPTQ checkpoints have, which are named
/// as their makers liked: their indices, or else all their files.
fn weights(listing: &[RemoteFile]) -> Option<Vec<&RemoteFile>> {
    let named = |name: &str| listing.iter().find(|file| file.path == name);
    if let Some(file) = weight_file_names().find_map(named) {
        return Some(vec![file]);
    }
    let ending = |end: &str| -> Vec<&RemoteFile> {
        let at_root = listing.iter().filter(|file| !file.path.contains('/'));
        at_root.filter(|file| file.path.ends_with(end)).collect()
    };
    let (indices, files) = (ending(".safetensors.index.json"), ending(".safetensors"));
    [indices, files].into_iter().find(|found| !found.is_empty())
}

/// The shards that an index names; `what` is the index, for an error.
pub(crate) fn shards(what: &str, index: &[u8], listing: &[RemoteFile]) -> Result<Vec<RemoteFile>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let unusable = |reason| Error::Answer { what: what.to_owned(), reason };
    let Index { weight_map } =
        serde_json::from_slice(index).map_err(|e| unusable(format!("it is no index: {e}")))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    if names.is_empty() {
        return Err(unusable("it names no shards".to_owned()));
    }
    let find = |shard: String| {
        let beside = listing.iter().find(|file| file.path == shard && !shard.contains('/'));
        beside.cloned().ok_or_else(|| Error::MissingShard { index: what.to_owned(), shard })
    };
    names.into_iter().map(find).collect()
}

/// Settings, tokenizers and licenses; a license may lie in a folder of its own.
/// The small files of a model.
pub(crate) fn small_files(listing: &[RemoteFile]) -> Vec<RemoteFile> {
    listing.iter().filter(|file| is_small(file)).cloned().collect()
}

fn is_small(file: &RemoteFile) -> bool {
    let path = file.path.to_lowercase();
    let license = ["licen", "notice", "use_policy"].iter().any(|word| path.contains(word));
    let known =
        path.rsplit_once('.').is_some_and(|(_, extension)| SMALL_EXTENSIONS.contains(&extension));
    let of_weights = path.ends_with(INDEX_END);
    let depth = path.matches('/').count();
    file.bytes <= SMALL_BYTES
        && !path.starts_with('.')
        && !of_weights
        && ((depth == 0 && (known || license)) || (depth == 1 && license))
}

/// The parquet files of a split: those of the folder `config`, or of `data` for the configuration
/// `default`.
pub(crate) fn split_files(listing: &[RemoteFile], config: &str, split: &str) -> Vec<RemoteFile> {
    let of_split = |file: &&RemoteFile| {
        pair(&file.path).is_some_and(|(folder, found)| {
            found == split && (folder == config || (config == "default" && folder == "data"))
        })
    };
    listing.iter().filter(of_split).cloned().collect()
}

/// The `CONFIG:SPLIT` pairs of a listing, for an error.
pub(crate) fn available_splits(listing: &[RemoteFile]) -> String {
    let mut pairs: Vec<String> = listing
        .iter()
        .filter_map(|file| pair(&file.path))
        .map(|(folder, split)| {
            format!("{}:{split}", if folder == "data" { "default" } else { folder })
        })
        .collect();
    pairs.sort();
    pairs.dedup();
    if pairs.is_empty() { "no parquet files".to_owned() } else { pairs.join(", ") }
}

/// Folder and split of `wikitext-2-raw-v1/test-00000-of-00001.parquet`.
fn pair(path: &str) -> Option<(&str, &str)> {
    let (folder, name) = path.split_once('/')?;
    let stem = name.strip_suffix(".parquet")?;
    let numbered = stem.split_once("-of-").map_or(stem, |(numbered, _)| numbered);
    let (split, number) = numbered.rsplit_once('-')?;
    number.bytes().all(|b| b.is_ascii_digit()).then_some((folder, split))
}

/// How many files a split has, by the name of one: 2 for `test-00000-of-00002.parquet`.
pub(crate) fn announced(path: &str) -> Option<usize> {
    let (_, rest) = path.strip_suffix(".parquet")?.split_once("-of-")?;
    rest.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Vec<RemoteFile> {
        names.iter().map(|name| RemoteFile::test(name, 10, &"a".repeat(40))).collect()
    }

    fn chosen(names: &[&str]) -> Vec<String> {
        let needed = model_files(&listing(names));
        needed.map_or_else(Vec::new, |n| n.files.into_iter().map(|file| file.path).collect())
    }

    #[test]
    fn safetensors_are_preferred_and_only_one_format_is_taken() {
        let both = [
            "config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "pytorch_model-00001-of-00001.bin",
            "pytorch_model.bin.index.json",
            "consolidated.safetensors",
            "model-q4.gguf",
        ];
        assert_eq!(chosen(&both), ["config.json", "model.safetensors.index.json"]);
        let needed = model_files(&listing(&both)).unwrap();
        assert!(needed.is_sharded());
        assert_eq!(needed.indices, listing(&["model.safetensors.index.json"]));
        for [first, other] in [
            ["model.safetensors", "consolidated.safetensors"],
            // As the reader has it, which would not open the shards.
            ["model.safetensors", "model.safetensors.index.json"],
            ["model.safetensors", "pytorch_model.bin"],
            // An adapter is no model.
            ["pytorch_model.bin", "adapter_model.safetensors"],
            ["pytorch_model.bin.index.json", "adapter_model.safetensors"],
            ["pytorch_model.bin", "rust_model.ot"],
        ] {
            assert_eq!(chosen(&[other, first]), [first]);
        }
    }

    #[test]
    fn early_checkpoints_are_named_as_their_makers_liked() {
        let single = ["gptq_model-4bit-128g.safetensors", "quantize_config.json"];
        assert_eq!(chosen(&single), single);
        let index = "gptq_model-4bit-128g.safetensors.index.json";
        let sharded = ["gptq_model-4bit-128g-00001-of-00001.safetensors", index];
        assert_eq!(chosen(&sharded), [index]);
        assert!(!model_files(&listing(&sharded)).unwrap().is_sharded());
        assert_eq!(model_files(&listing(&["config.json", "model-q4.gguf"])), None);
        assert_eq!(model_files(&listing(&["original/model.safetensors"])), None);
    }

    #[test]
    fn shards_are_what_the_index_says() {
        let files = listing(&["config.json", "b.safetensors", "a.safetensors", "sub/c"]);
        let of = |map: &str| {
            let index = format!("{{\"weight_map\": {map}}}");
            shards("org/name/index", index.as_bytes(), &files)
        };
        let found = of(r#"{"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}"#);
        assert_eq!(found.unwrap(), listing(&["a.safetensors", "b.safetensors"]));
        for shard in ["c.safetensors", "sub/c", "../b.safetensors"] {
            let message = of(&format!("{{\"x\": \"{shard}\"}}")).unwrap_err().to_string();
            assert!(message.contains("`org/name/index`") && message.contains(shard), "{message}");
        }
        for map in ["{}", "[]", "{\"x\": 1}"] {
            assert!(matches!(of(map), Err(Error::Answer { .. })), "{map}");
        }
    }

    #[test]
    fn small_files_are_what_a_checkpoint_carries_on() {
        let yes = [
            "LICENSE",
            "LICENSE.txt",
            "LLAMA 2 LICENSE/LICENSE.txt",
            "Notice",
            "README.md",
            "USE_POLICY.md",
            "added_tokens.json",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
        ];
        let no = [
            ".gitattributes",
            "coreml/config.json",
            "figure.png",
            "modeling_llama.py",
            "onnx/model.onnx",
            "original/params.json",
            "runs/x/LICENSE",
        ];
        assert_eq!(chosen(&[&yes[..], &no].concat()), yes);
        let mut huge = listing(&["model.safetensors", "dump.json"]);
        huge[1].bytes = SMALL_BYTES + 1;
        assert_eq!(model_files(&huge).unwrap().files.len(), 1);
    }

    #[test]
    fn a_split_is_all_its_files_and_no_others() {
        let files = listing(&[
            "README.md",
            "data/test-00000-of-00001-0a1b.parquet",
            "w2/test-00000-of-00002.parquet",
            "w2/test-00001-of-00002.parquet",
            "w2/train-00000-of-00001.parquet",
            "w2/my-test-0.parquet",
        ]);
        let names = |config, split| -> Vec<String> {
            split_files(&files, config, split).into_iter().map(|f| f.path).collect()
        };
        assert_eq!(
            names("w2", "test"),
            ["w2/test-00000-of-00002.parquet", "w2/test-00001-of-00002.parquet"]
        );
        assert_eq!(names("default", "test"), ["data/test-00000-of-00001-0a1b.parquet"]);
        assert_eq!(names("w2", "validation"), [""; 0]);
        assert_eq!(announced("data/test-00000-of-00012-0a1b.parquet"), Some(12));
        assert_eq!(announced("w2/my-test-0.parquet"), None);
        assert_eq!(available_splits(&files), "default:test, w2:my-test, w2:test, w2:train");
    }
}
