//! Compares what a program registers with what docs/observability.md says of it.

use std::{collections::BTreeSet, fs, path::Path};

use prometheus::core::Collector;

/// Fails unless the metrics whose names begin with `prefix` are those of docs/observability.md, by name, type, labels and meaning, and are
/// named as that page says.
#[allow(clippy::panic, clippy::unwrap_used)]
pub fn assert_documented(prefix: &str, collectors: &[Box<dyn Collector>]) {
    let registered: BTreeSet<String> = collectors.iter().map(|collector| row(collector.as_ref())).collect();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/observability.md");
    let text = fs::read_to_string(page).unwrap();
    let documented: BTreeSet<String> = text
        .lines()
        .filter(|line| line.starts_with(&format!("| `{prefix}")))
        .map(str::to_owned)
        .collect();
    let only = |one: &BTreeSet<String>, other: &BTreeSet<String>| {
        let rows: Vec<&str> = one.difference(other).map(String::as_str).collect();
        rows.join("\n")
    };
    assert!(
        registered == documented,
        "registered, and not in docs/observability.md:\n{}\nthere, and not registered:\n{}",
        only(&registered, &documented),
        only(&documented, &registered)
    );
}

/// The row of a metric in the table.
fn row(collector: &dyn Collector) -> String {
    let descriptions = collector.desc();
    let families = collector.collect();
    let ([description], [family]) = (&descriptions[..], &families[..]) else {
        panic!("a collector is of one metric here");
    };
    let name = &description.fq_name;
    let kind = format!("{:?}", family.get_field_type()).to_lowercase();
    assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
    assert!(!name.contains("milli"), "{name}: times are in seconds");
    let labels: Vec<String> = description
        .variable_labels
        .iter()
        .map(|label| format!("`{label}`"))
        .collect();
    format!("| `{name}` | {kind} | {} | {} |", labels.join(", "), description.help)
}
