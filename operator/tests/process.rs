//! The operator's own process.
#![allow(missing_docs, clippy::unwrap_used)]

use std::process::Command;

#[test]
fn a_filter_of_the_log_that_cannot_be_read_is_said() {
    let started = |filter: &str| {
        // It ends at once: there is no cluster.
        let output = Command::new(env!("CARGO_BIN_EXE_meander-operator"))
            .args(["check", "--ready-url", "http://localhost"])
            .env_clear()
            .env("KUBECONFIG", "/nowhere")
            .env("RUST_LOG", filter)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let log = started("info,kube=loud");
    assert!(log.contains("RUST_LOG cannot be read"), "{log}");
    let log = started("info,kube=debug");
    assert!(!log.contains("RUST_LOG"), "{log}");
}
