//! Which files of a repository are worth their bytes.
//!
//! Of a model: its weights in one format, safetensors before PyTorch's, and the small files beside
//! them that every checkpoint made from it carries on. Of a dataset: one split's parquet files.

use crate::api::RemoteFile;

/// Small files by extension; weights in other formats, images and scripts have none of these.
const SMALL_EXTENSIONS: [&str; 6] = ["json", "txt", "jinja", "model", "tiktoken", "md"];

/// Larger files are no settings, whatever their name.
const SMALL_BYTES: u64 = 64 << 20;

/// Stem and extension of weights, the better format first.
const FORMATS: [(&str, &str); 2] = [("model", "safetensors"), ("pytorch_model", "bin")];

/// The files of a model, or nothing where it has no weights in a known format.
pub(crate) fn model_files(listing: &[RemoteFile]) -> Option<Vec<RemoteFile>> {
    let at_root: Vec<&RemoteFile> = listing.iter().filter(|f| !f.path.contains('/')).collect();
    let weights = weights(&at_root)?;
    let wanted = |file: &&RemoteFile| weights.contains(&file.path) || is_small(file);
    Some(listing.iter().filter(wanted).cloned().collect())
}

/// Names of the weight files, index included.
fn weights(files: &[&RemoteFile]) -> Option<Vec<String>> {
    let names: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    for (stem, extension) in FORMATS {
        let index = format!("{stem}.{extension}.index.json");
        if names.contains(&index.as_str()) {
            let shards = names.iter().filter(|name| is_shard(name, stem, extension));
            return Some(shards.copied().chain([index.as_str()]).map(str::to_owned).collect());
        }
        let single = format!("{stem}.{extension}");
        if names.contains(&single.as_str()) {
            return Some(vec![single]);
        }
        // Early GPTQ checkpoints are named as their makers liked.
        let others: Vec<String> = names
            .iter()
            .filter(|n| extension == "safetensors" && n.ends_with(".safetensors"))
            .map(|&name| name.to_owned())
            .collect();
        if !others.is_empty() {
            return Some(others);
        }
    }
    None
}

/// Whether a chosen file holds weights, not settings.
pub(crate) fn is_weights(file: &RemoteFile) -> bool {
    FORMATS.iter().any(|(_, extension)| file.path.ends_with(&format!(".{extension}")))
}

/// `model-00001-of-00015.safetensors` and the like.
fn is_shard(name: &str, stem: &str, extension: &str) -> bool {
    let middle = name.strip_prefix(stem).and_then(|n| n.strip_suffix(extension));
    let numbers = middle.and_then(|m| m.strip_prefix('-')?.strip_suffix('.')?.split_once("-of-"));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.is_some_and(|(which, of)| number(which) && number(of))
}

/// Settings, tokenisers and licences; a licence may lie in a folder of its own.
fn is_small(file: &RemoteFile) -> bool {
    let path = file.path.to_lowercase();
    let licence = ["licen", "notice", "use_policy"].iter().any(|word| path.contains(word));
    let known =
        path.rsplit_once('.').is_some_and(|(_, extension)| SMALL_EXTENSIONS.contains(&extension));
    let of_weights = path.ends_with(".index.json");
    let depth = path.matches('/').count();
    file.bytes <= SMALL_BYTES
        && !path.starts_with('.')
        && !of_weights
        && ((depth == 0 && (known || licence)) || (depth == 1 && licence))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Digest;

    fn listing(names: &[&str]) -> Vec<RemoteFile> {
        let digest = Digest::parse(&"a".repeat(40)).unwrap();
        let file = |name: &&str| RemoteFile {
            path: (*name).to_owned(),
            bytes: 10,
            digest: digest.clone(),
        };
        names.iter().map(file).collect()
    }

    fn chosen(names: &[&str]) -> Vec<String> {
        let files = model_files(&listing(names)).unwrap_or_default();
        files.into_iter().map(|file| file.path).collect()
    }

    #[test]
    fn safetensors_are_preferred_and_only_one_format_is_taken() {
        let both = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model-00001-of-00001.bin",
            "pytorch_model.bin.index.json",
            "consolidated.safetensors",
            "model-q4.gguf",
        ];
        assert_eq!(chosen(&both), both[..4]);
        assert_eq!(
            chosen(&["model.safetensors", "consolidated.safetensors"]),
            ["model.safetensors"]
        );
    }

    #[test]
    fn pytorch_shards_are_taken_where_there_is_nothing_else() {
        let old = [
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
            "pytorch_model.bin.index.json",
            "training_args.bin",
        ];
        assert_eq!(chosen(&old), old[..3]);
        assert_eq!(chosen(&["pytorch_model.bin", "rust_model.ot"]), ["pytorch_model.bin"]);
        let early = ["gptq_model-4bit-128g.safetensors", "quantize_config.json"];
        assert_eq!(chosen(&early), early);
        assert_eq!(model_files(&listing(&["config.json", "model-q4.gguf"])), None);
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
        assert_eq!(model_files(&huge).unwrap().len(), 1);
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
        assert_eq!(available_splits(&files), "default:test, w2:my-test, w2:test, w2:train");
    }
}
