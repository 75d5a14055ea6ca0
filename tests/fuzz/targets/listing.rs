//! A page of a repository's listing as a Hub sends it: names that are accepted stay in the snapshot.
#![no_main]

use std::path::{Component, Path};

use gptq_hub::Listing;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(listing) = Listing::parse(data) else { return };
    for file in listing.files {
        let inside = |part| matches!(part, Component::Normal(_));
        assert!(Path::new(&file.path).components().all(inside), "{}", file.path);
    }
});
