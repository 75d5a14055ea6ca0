//! Texts that models are usually measured on: what a calibration had better not hold.

use gptq_records::dataset_identity::{DatasetIdentity, HubSplit, contaminated};

/// Repository, configuration, split, and the text's fingerprint where it is known, so that a copy under
/// another name is known, too.
const SETS: [(&str, &str, &str, &str); 6] = [
    (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
        "780d160898f3f6a6ab19bba8098cb7267a3eceb7177d105a27c96d706f7761ed",
    ),
    (
        "Salesforce/wikitext",
        "wikitext-2-v1",
        "test",
        "333973ac0463f6121307e7060203041398b86060925ffeaa9bdda737fc34a738",
    ),
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", ""),
    (
        "Salesforce/wikitext",
        "wikitext-2-v1",
        "validation",
        "3566808736f115a421ea097de7db460e46db5a2687a3c1f4f0e32735d9b34011",
    ),
    ("ptb-text-only/ptb_text_only", "penn_treebank", "test", ""),
    ("allenai/c4", "en", "validation", ""),
];

/// Those that a calibration on `dataset` holds, by their names. Copies are known of the WikiText-2
/// splits alone.
#[must_use]
pub fn contained(dataset: &DatasetIdentity) -> Vec<String> {
    let sets = SETS.iter().map(|&(repo, config, split, fingerprint)| DatasetIdentity {
        name: format!("{repo}:{config}:{split}"),
        hub: Some(HubSplit {
            repo: repo.to_owned(),
            config: config.to_owned(),
            split: split.to_owned(),
        }),
        fingerprint: fingerprint.to_owned(),
        sources: Vec::new(),
    });
    sets.filter(|set| contaminated(dataset, set)).map(|set| set.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::DatasetSpec;

    #[test]
    fn splits_are_known_by_name_and_by_text() {
        let unread = |name: &str| name.parse::<DatasetSpec>().unwrap().unread();
        let (raw, tokens) = ("wikitext-2-raw-v1", "wikitext-2-v1");
        let test = contained(&unread("wikitext:wikitext-103-v1:test"));
        let wikitext = |config, split| format!("Salesforce/wikitext:{config}:{split}");
        assert_eq!(test, [wikitext(raw, "test"), wikitext(tokens, "test")]);
        assert!(contained(&unread("wikitext:wikitext-2-v1:train")).is_empty());
        assert!(contained(&unread("builtin:addresses")).is_empty());
        let sources = ["builtin:addresses", "allenai/c4:en:validation"].map(unread);
        let both = DatasetIdentity::of_sources(sources.to_vec());
        assert_eq!(contained(&both), ["allenai/c4:en:validation"]);
    }

    /// The fingerprints above, by the files that the Hub has.
    #[test]
    fn fingerprints_are_those_of_the_splits() {
        let Some(shared) = crate::needs::shared() else { return };
        let repository = shared.join("hf/hub/datasets--Salesforce--wikitext");
        let revision = std::fs::read_to_string(repository.join("refs/main")).unwrap();
        let snapshot = repository.join("snapshots").join(revision.trim());
        for &(_, config, split, fingerprint) in SETS.iter().filter(|set| !set.3.is_empty()) {
            let file = snapshot.join(config).join(format!("{split}-00000-of-00001.parquet"));
            let copy: DatasetSpec = file.to_str().unwrap().parse().unwrap();
            let identity = copy.load().unwrap().identity;
            assert_eq!(identity.fingerprint, fingerprint, "{config}:{split}");
            assert_eq!(contained(&identity), [format!("Salesforce/wikitext:{config}:{split}")]);
        }
    }
}
