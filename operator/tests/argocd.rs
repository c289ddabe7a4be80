//! The health that Argo CD reads, by the scripts that we ship for it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use mlua::{Lua, LuaSerdeExt as _};
use serde_json::{Value, json};

/// What the script for this kind says of a resource: status and message.
fn health(kind: &str, object: &Value) -> (String, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/argocd/health.yaml");
    let map: Value = serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let script = map["data"][format!("resource.customizations.health.meander.dev_{kind}")]
        .as_str()
        .unwrap();
    let lua = Lua::new();
    lua.globals().set("obj", lua.to_value(object).unwrap()).unwrap();
    let health: mlua::Table = lua.load(script).eval().unwrap();
    (health.get("status").unwrap(), health.get("message").unwrap())
}

/// With one condition of each of these types.
fn resource(phase: &str, conditions: &[(&str, &str, &str)]) -> Value {
    let conditions: Vec<Value> = conditions
        .iter()
        .map(|(type_, status, reason)| json!({"type": type_, "status": status, "reason": reason, "message": "why"}))
        .collect();
    json!({
        "metadata": {"generation": 2},
        "status": {"phase": phase, "observedGeneration": 2, "conditions": conditions},
    })
}

#[test]
fn a_pipeline_is_healthy_while_it_delivers() {
    let paused = [
        ("Ready", "True", "Streaming"),
        ("ReconciliationPaused", "True", "Annotated"),
    ];
    let degraded = [("Ready", "True", "Streaming"), ("Degraded", "True", "WalBudgetLow")];
    let table = [
        (
            resource(
                "Streaming",
                &[("Ready", "True", "Streaming"), ("Degraded", "False", "Fine")],
            ),
            "Healthy",
            "Streaming: why",
        ),
        (resource("Degraded", &degraded), "Healthy", "WalBudgetLow: why"),
        (resource("Streaming", &paused), "Suspended", "Annotated: why"),
        (
            resource("Suspended", &[("Ready", "False", "Suspended")]),
            "Suspended",
            "Suspended: why",
        ),
        (
            resource("Starting", &[("Ready", "Unknown", "RuntimeStarting")]),
            "Progressing",
            "RuntimeStarting: why",
        ),
        (
            resource("Pending", &[("Ready", "False", "SecretNotFound")]),
            "Progressing",
            "SecretNotFound: why",
        ),
        (
            resource("Interrupted", &[("Ready", "False", "KafkaUnreachable")]),
            "Degraded",
            "KafkaUnreachable: why",
        ),
        (
            resource("Degraded", &[("Ready", "False", "RedisUnreachable")]),
            "Degraded",
            "RedisUnreachable: why",
        ),
        (
            resource("Failed", &[("Ready", "False", "SlotLost")]),
            "Degraded",
            "SlotLost: why",
        ),
        (
            json!({"metadata": {"generation": 1}}),
            "Progressing",
            "The operator has not looked at it yet.",
        ),
    ];
    for (object, status, message) in table {
        assert_eq!(
            health("CdcPipeline", &object),
            (status.to_owned(), message.to_owned()),
            "{object}"
        );
    }
    let mut edited = resource("Streaming", &[("Ready", "True", "Streaming")]);
    edited["metadata"]["generation"] = json!(3);
    assert_eq!(health("CdcPipeline", &edited).0, "Progressing");
}

#[test]
fn a_replay_is_healthy_when_it_has_ended_as_somebody_wanted() {
    let table = [
        ("Pending", "Progressing"),
        ("Running", "Progressing"),
        ("Paused", "Suspended"),
        ("Succeeded", "Healthy"),
        ("Cancelled", "Healthy"),
        ("Failed", "Degraded"),
    ];
    for (phase, status) in table {
        let object = resource(phase, &[("Progressing", "True", "Replaying")]);
        assert_eq!(
            health("ReplayJob", &object),
            (status.to_owned(), "Replaying: why".to_owned()),
            "{phase}"
        );
    }
    assert_eq!(
        health("ReplayJob", &json!({"metadata": {"generation": 1}})).0,
        "Progressing"
    );
}
