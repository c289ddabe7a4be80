//! What a change of a field does to what runs, as `docs/pipelines.md` says it: the tables name every field that may change, and are true.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use meander_crds::{CdcPipeline, ReplayJob, generate::definitions};
use meander_operator::{pipeline, replay};
use serde_json::{Value, json};
use support::settings;

/// The rows below a heading: field, and what a change of it does.
fn table(heading: &str) -> BTreeMap<String, String> {
    let page = include_str!("../../docs/pipelines.md");
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let (fields, effect) = (cells.next().unwrap(), cells.next().unwrap());
        for field in fields.split(", ") {
            let before = rows.insert(field.trim_matches('`').to_owned(), effect.to_owned());
            assert!(before.is_none(), "{field} has two rows");
        }
    }
    rows
}

/// Every field of a spec that holds no further fields, and every one that can never change.
fn fields(schema: &Value, path: &str, leaves: &mut Vec<String>, immutable: &mut BTreeSet<String>) {
    let join = |name: &str| {
        if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let message = rule["message"].as_str().unwrap();
        if let Some((field, _)) = message.split_once(" is immutable") {
            let is_this = path == field || path.ends_with(&format!(".{field}"));
            let own = field.rsplit('.').next().unwrap();
            immutable.insert(if is_this { path.to_owned() } else { join(own) });
        }
    }
    match schema["properties"].as_object() {
        Some(properties) => properties
            .iter()
            .for_each(|(name, schema)| fields(schema, &join(name), leaves, immutable)),
        None => leaves.push(path.to_owned()),
    }
}

fn is_within(field: &str, of: &str) -> bool {
    field == of || field.strip_prefix(of).is_some_and(|rest| rest.starts_with('.'))
}

/// The table names all that may change, and nothing that may not.
fn names_what_may_change(rows: &BTreeMap<String, String>, kind: usize) {
    let definition = serde_json::to_value(&definitions().unwrap()[kind]).unwrap();
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let (mut leaves, mut immutable) = (Vec::new(), BTreeSet::new());
    fields(schema, "", &mut leaves, &mut immutable);
    assert!(!immutable.is_empty());
    for leaf in &leaves {
        let may_change = !immutable.iter().any(|fixed| is_within(leaf, fixed));
        let is_named = rows.keys().any(|row| is_within(leaf, row));
        assert_eq!(may_change, is_named, "{leaf}");
    }
    for row in rows.keys() {
        assert!(leaves.iter().any(|leaf| is_within(leaf, row)), "{row} is no field");
    }
}

/// The spec with another value in a field.
fn changed(mut spec: Value, field: &str, value: &Value) -> Value {
    let place = field.split('.').fold(&mut spec, |spec, name| &mut spec[name]);
    assert_ne!(place, value, "{field}");
    *place = value.clone();
    spec
}

/// Tries a change of each row, and whether it does what its row begins with.
fn does_what_it_says(
    rows: &BTreeMap<String, String>,
    changes: &[(&str, Value)],
    effect: impl Fn(&str, &Value) -> &'static str,
) {
    let tried: BTreeSet<_> = changes.iter().map(|(field, _)| *field).collect();
    assert_eq!(tried, rows.keys().map(String::as_str).collect());
    for (field, value) in changes {
        let (says, does) = (&rows[*field], effect(field, value));
        assert!(says.starts_with(does), "{field}: {does}, and not {says}");
    }
}

#[test]
fn what_a_change_of_a_running_pipeline_does_is_as_the_table_says() {
    let rows = table("CdcPipeline");
    names_what_may_change(&rows, 0);
    let key = json!({"name": "other", "key": "other"});
    let changes = [
        ("source.postgres.host", json!("other")),
        ("source.postgres.port", json!(1)),
        ("source.postgres.credentialsSecretRef", json!({"name": "other"})),
        ("source.postgres.sslMode", json!("Require")),
        ("source.postgres.caSecretRef", key.clone()),
        ("source.postgres.clientCertSecretRef", json!({"name": "other"})),
        ("source.postgres.tables", json!({"include": ["other.*"]})),
        ("source.postgres.messagePrefixes", json!(["other"])),
        ("source.postgres.slot.reclaimPolicy", json!("Retain")),
        ("source.postgres.slot.failover", json!(false)),
        ("source.postgres.snapshot.mode", json!("Never")),
        ("source.postgres.snapshot.parallelism", json!(8)),
        (
            "source.postgres.snapshot.requests",
            json!([{"id": "other", "tables": ["a.b"]}]),
        ),
        ("source.postgres.heartbeatIntervalSeconds", json!(1)),
        ("sinks.kafka.bootstrapServers", json!(["other:9092"])),
        ("sinks.kafka.tls", json!({})),
        ("sinks.kafka.sasl", Value::Null),
        ("sinks.kafka.topics.replicationFactor", json!(1)),
        ("sinks.kafka.topics.config", json!({})),
        ("sinks.kafka.topics.management", json!("Managed")),
        ("sinks.redis.urlSecretRef", key.clone()),
        ("sinks.redis.url", json!("redis://other")),
        ("sinks.redis.caSecretRef", key),
        ("sinks.redis.retention", json!({"maxLength": 1})),
        ("sinks.redis.durability", json!("None")),
        ("sinks.redis.acknowledgement", json!("BestEffort")),
        ("onSourceGap", json!("Stop")),
        ("onOversizedRow", json!("Stop")),
        ("suspend", json!(false)),
        ("runtime.image", json!("other")),
        ("runtime.resources", json!({})),
        ("runtime.logLevel", json!("Error")),
        ("runtime.standby", json!("Hot")),
    ];
    let base = support::with_every_setting();
    let built = |pipeline: &CdcPipeline| {
        let facts = pipeline::dereference::Facts::default();
        let valid = pipeline::validate::validate(pipeline, &facts, &settings()).unwrap();
        pipeline::build::build(pipeline, &valid, &settings())
    };
    let before = built(&base);
    does_what_it_says(&rows, &changes, |field, value| {
        let spec = changed(serde_json::to_value(&base.spec).unwrap(), field, value);
        let mut pipeline = base.clone();
        pipeline.spec = serde_json::from_value(spec).unwrap();
        let after = built(&pipeline);
        let spec = |objects: &pipeline::build::Objects| objects.deployment.spec.clone().unwrap();
        if spec(&before).template != spec(&after).template {
            "new pods"
        } else if spec(&before).replicas != spec(&after).replicas {
            "pods go, or come"
        } else {
            assert_eq!(format!("{before:?}"), format!("{after:?}"), "{field}");
            "nothing"
        }
    });
}

#[test]
fn what_a_change_of_a_running_replay_does_is_as_the_table_says() {
    let rows = table("ReplayJob");
    names_what_may_change(&rows, 1);
    let changes = [
        ("speed", json!(2)),
        ("suspend", json!(true)),
        ("cancel", json!(true)),
        ("ttlSecondsAfterFinished", json!(1)),
    ];
    let base = support::replay("replayjob-log.yaml");
    let facts = replay::dereference::Facts {
        pipeline: Some(support::pipeline()),
        ..Default::default()
    };
    let config = replay::validate::validate(&base, &facts, &settings()).unwrap().config;
    does_what_it_says(&rows, &changes, |field, value| {
        let spec = changed(serde_json::to_value(&base.spec).unwrap(), field, value);
        let mut replay: ReplayJob = base.clone();
        replay.spec = serde_json::from_value(spec).unwrap();
        let goes_on = replay::validate::started(&replay, config.clone(), &settings()).unwrap();
        let objects = replay::build::around(&replay, &goes_on, &settings());
        assert!(objects.job.is_none(), "{field}: a Job's template never changes");
        if replay::directive(&replay) == replay::directive(&base) {
            let same = replay::validate::started(&base, config.clone(), &settings()).unwrap();
            assert_eq!(goes_on, same, "{field}");
            "nothing"
        } else {
            "the pod is told"
        }
    });
}
