//! The generated files are what the types say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

#[test]
fn generated_files_are_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for file in meander_crds::generate::files().unwrap() {
        let written = fs::read_to_string(root.join(file.path)).unwrap_or_default();
        assert!(
            written == file.content,
            "{} differs from the types: run `cargo run -p meander-crds --bin crdgen`",
            file.path
        );
    }
}
