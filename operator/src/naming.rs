//! Names and labels of what the operator creates.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "meander-operator";
/// Audience of the token that runtime pods show to the operator.
pub const AUDIENCE: &str = "meander.dev";
/// On a pipeline's objects: the pipeline's name.
pub const PIPELINE_LABEL: &str = "meander.dev/pipeline";
/// On a replay's objects: the ReplayJob's name.
pub const REPLAY_LABEL: &str = "meander.dev/replay";
/// On pods: which part of Meander it is.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Selects everything that the operator creates.
pub const MANAGED_SELECTOR: &str = "app.kubernetes.io/managed-by=meander-operator";
/// On a pod template: digest of the configuration that the pod starts with.
pub const CONFIG_HASH_ANNOTATION: &str = "meander.dev/config-hash";
/// On an applied object: digest of what was applied.
pub const APPLIED_HASH_ANNOTATION: &str = "meander.dev/applied-hash";

/// Labels of an object of the resource `name`, marked with `label`.
pub fn labels(label: &str, name: &str, component: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "meander-runtime"),
        ("app.kubernetes.io/instance", name),
        (COMPONENT_LABEL, component),
        ("app.kubernetes.io/managed-by", FIELD_MANAGER),
        (label, name),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Name of the objects that capture for the pipeline `name`.
pub fn capture_name(name: &str) -> String {
    format!("{name}-capture")
}

/// Name of the objects that replay for the ReplayJob `name`.
pub fn replay_name(name: &str) -> String {
    format!("{name}-replay")
}

/// The default name of a pipeline's slot and publication: `meander_<namespace>_<name>`, reduced to what PostgreSQL takes, with a
/// digest of the two names where reduction made it ambiguous.
pub fn slot_name(namespace: &str, name: &str) -> String {
    const LONGEST: usize = 63;
    let plain = format!("meander_{namespace}_{name}");
    let reduced: String = plain
        .chars()
        .map(|c| {
            if c.is_ascii_lowercase() || c.is_ascii_digit() {
                c
            } else {
                '_'
            }
        })
        .collect();
    if reduced == plain && reduced.len() <= LONGEST {
        return reduced;
    }
    let suffix = format!("_{}", digest(&format!("{namespace}/{name}"), 8));
    let kept: String = reduced.chars().take(LONGEST - suffix.len()).collect();
    kept + &suffix
}

/// The first `length` hexadecimal digits of the SHA-256 of `text`.
pub fn digest(text: &str, length: usize) -> String {
    let mut hex: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
    hex.truncate(length);
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_are_valid_short_and_distinct() {
        assert_eq!(slot_name("default", "trades"), "meander_default_trades");
        // Both would be meander_a_b_c.
        let (one, other) = (slot_name("a", "b-c"), slot_name("a-b", "c"));
        assert_ne!(one, other);
        assert!(one.starts_with("meander_a_b_c_"));
        let long = slot_name(&"n".repeat(63), &"p".repeat(50));
        assert_eq!(long.len(), 63);
        assert_ne!(long, slot_name(&"n".repeat(63), &"q".repeat(50)));
        for name in [one, other, long] {
            assert!(
                name.chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'),
                "{name}"
            );
        }
    }
}
