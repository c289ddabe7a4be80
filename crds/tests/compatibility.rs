//! What was released stays: every object that a released definition accepts, that of now accepts too, keeps whole, and reads in the same
//! way. `crds/released/` holds the definitions of the last release.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::{Map, Value, json};

#[test]
fn nothing_that_was_released_is_broken() {
    let now: BTreeMap<String, Value> = meander_crds::generate::files()
        .unwrap()
        .into_iter()
        .filter_map(|file| {
            let name = file.path.strip_prefix("crds/")?.to_owned();
            Some((name, serde_saphyr::from_str(&file.content).unwrap()))
        })
        .collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("released");
    let mut released = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let old: Value = serde_saphyr::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let new = now.get(name).unwrap_or(&Value::Null);
        let breaks = breaks(&old, new);
        assert!(
            breaks.is_empty(),
            "users of the last release would be broken (docs/installation.md says what to do instead):\n  {}",
            breaks.join("\n  ")
        );
        released += 1;
    }
    assert_eq!(
        released,
        now.len(),
        "crds/released/ lacks a resource: run `make released-crds`"
    );
}

/// What users of the definition `old` would lose with `new`.
fn breaks(old: &Value, new: &Value) -> Vec<String> {
    let mut out = Vec::new();
    let both = |pointer: &str| (old.pointer(pointer), new.pointer(pointer));
    for name in ["group", "scope", "names/kind", "names/plural", "names/singular"] {
        let (old, new) = both(&format!("/spec/{name}"));
        if old != new {
            out.push(format!("{name} was {}", text(old)));
        }
    }
    for name in ["names/shortNames", "names/categories"] {
        let (old, new) = both(&format!("/spec/{name}"));
        out.extend(lost(old, new).map(|value| format!("{name} had {value}")));
    }
    for old in list(old.pointer("/spec/versions")) {
        let name = old["name"].as_str().unwrap_or_default();
        // One that is stored somewhere has to stay in the list even when nobody is served it any more.
        let Some(new) = list(new.pointer("/spec/versions")).find(|new| new["name"] == old["name"]) else {
            out.push(format!("version {name} is gone"));
            continue;
        };
        if old["served"] == true && new["served"] != true {
            out.push(format!("version {name} is not served any more"));
        }
        if old.pointer("/subresources/status").is_some() && new.pointer("/subresources/status").is_none() {
            out.push(format!("version {name} had the subresource status"));
        }
        schema(
            name,
            &old["schema"]["openAPIV3Schema"],
            &new["schema"]["openAPIV3Schema"],
            &mut out,
        );
    }
    out
}

/// Compares what is accepted at a place that was there before.
fn schema(path: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    let empty = Map::new();
    let (old, new) = (old.as_object().unwrap_or(&empty), new.as_object().unwrap_or(&empty));
    if !types(old).is_subset(&types(new)) {
        out.push(format!("{path}: it could be {}", words(&types(old))));
    }
    let keywords: BTreeSet<&str> = old.keys().chain(new.keys()).map(String::as_str).collect();
    for keyword in keywords {
        let (before, after) = (old.get(keyword), new.get(keyword));
        let number = |value: Option<&Value>| value.and_then(Value::as_f64);
        let problem = match keyword {
            "description" | "title" | "example" | "type" | "x-kubernetes-int-or-string" => None,
            "properties" => {
                for (name, before) in before.and_then(Value::as_object).unwrap_or(&empty) {
                    let path = format!("{path}.{name}");
                    match after.and_then(|after| after.get(name)) {
                        Some(after) => schema(&path, before, after, out),
                        None if keeps_unknown(new) => {}
                        None => out.push(format!(
                            "{path}: the field is gone, and what is written there would be dropped"
                        )),
                    }
                }
                None
            }
            "items" | "additionalProperties" => {
                if let (Some(before @ Value::Object(_)), Some(after @ Value::Object(_))) = (before, after) {
                    schema(&format!("{path}[]"), before, after, out);
                    None
                } else {
                    (before != after).then(|| format!("{keyword} was {}", text(before)))
                }
            }
            "enum" if after.is_none() => None,
            "enum" if before.is_none() => Some("any value was accepted, and now only some are".to_owned()),
            "enum" => {
                let lost: Vec<_> = lost(before, after).collect();
                (!lost.is_empty()).then(|| format!("no longer accepted: {}", lost.join(", ")))
            }
            "minimum" | "minLength" | "minItems" | "minProperties" => (number(after) > number(before))
                .then(|| format!("{keyword} was {}, and is {}", text(before), text(after))),
            "maximum" | "maxLength" | "maxItems" | "maxProperties" => after
                .filter(|_| number(before).is_none_or(|before| number(after) < Some(before)))
                .map(|_| format!("{keyword} was {}, and is {}", text(before), text(after))),
            // What they accept cannot be compared.
            "pattern" | "format" | "multipleOf" | "not" => (after.is_some() && before != after)
                .then(|| format!("{keyword} was {}, and is {}", text(before), text(after))),
            // What is merged how, in either direction; or a value that nobody wrote.
            "default" | "x-kubernetes-list-type" | "x-kubernetes-list-map-keys" | "x-kubernetes-map-type" => {
                (before != after).then(|| format!("{keyword} was {}, and is {}", text(before), text(after)))
            }
            "required" => {
                let added: Vec<_> = lost(after, before)
                    .filter(|name| {
                        let field = name.trim_matches('"');
                        new.get("properties")
                            .and_then(|properties| properties.get(field)?.get("default"))
                            .is_none()
                    })
                    .collect();
                (!added.is_empty()).then(|| format!("newly required: {}", added.join(", ")))
            }
            "nullable" | "x-kubernetes-preserve-unknown-fields" => {
                (before == Some(&json!(true)) && before != after).then(|| format!("{keyword} was true"))
            }
            "x-kubernetes-validations" => {
                rules(path, old, new, out);
                None
            }
            _ if before == after => None,
            _ => Some(format!(
                "{keyword} is not known to this test: say here what of it breaks whom"
            )),
        };
        out.extend(problem.map(|problem| format!("{path}: {problem}")));
    }
}

/// A rule of CEL that is new may refuse what was accepted, but for one about a field that nobody could write before. One with a default is in
/// every object, written or not.
fn rules(path: &str, old: &Map<String, Value>, new: &Map<String, Value>, out: &mut Vec<String>) {
    let of = |schema: &Map<String, Value>| -> BTreeSet<String> {
        list(schema.get("x-kubernetes-validations"))
            .filter_map(|rule| Some(rule["rule"].as_str()?.to_owned()))
            .collect()
    };
    let fields = |schema| Map::get(schema, "properties").and_then(Value::as_object);
    let (before, after) = (of(old), of(new));
    let added: Vec<&String> = (fields(new).into_iter().flatten())
        .filter(|(name, field)| {
            field.get("default").is_none() && fields(old).is_none_or(|old| !old.contains_key(*name))
        })
        .map(|(name, _)| name)
        .collect();
    for rule in after.difference(&before) {
        let guarded = |field: &&String| rule.starts_with(&format!("!has(self.{field}) || ")) && !rule.contains(" ? ");
        // One more to choose from, in a list of which one is written.
        let shorter = added.iter().fold(rule.clone(), |rule, field| {
            rule.replace(&format!(", has(self.{field})"), "")
        });
        if !before.contains(&shorter) && !added.iter().any(guarded) {
            out.push(format!("{path}: a rule that was not there: {rule}"));
        }
    }
}

fn keeps_unknown(schema: &Map<String, Value>) -> bool {
    schema.get("x-kubernetes-preserve-unknown-fields") == Some(&json!(true))
}

/// The types of JSON that a schema accepts.
fn types(schema: &Map<String, Value>) -> BTreeSet<&str> {
    if schema.get("x-kubernetes-int-or-string") == Some(&json!(true)) {
        return BTreeSet::from(["integer", "string"]);
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("number") => BTreeSet::from(["integer", "number"]),
        Some(name) => BTreeSet::from([name]),
        None => BTreeSet::from(["array", "boolean", "integer", "number", "object", "string"]),
    }
}

fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

/// What is in the first list and not in the second.
fn lost<'a>(old: Option<&'a Value>, new: Option<&'a Value>) -> impl Iterator<Item = String> + 'a {
    list(old)
        .filter(move |old| !list(new).any(|new| new == *old))
        .map(ToString::to_string)
}

fn text(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".to_owned(), ToString::to_string)
}

fn words(names: &BTreeSet<&str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(" or ")
}

/// A definition whose spec has this schema.
fn definition(spec: &Value) -> Value {
    json!({"spec": {
        "group": "meander.dev",
        "scope": "Namespaced",
        "names": {"kind": "K", "plural": "ks", "singular": "k", "shortNames": ["k"], "categories": ["cdc"]},
        "versions": [{
            "name": "v1",
            "served": true,
            "storage": true,
            "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}},
        }],
    }})
}

#[test]
fn each_kind_of_break_is_found_and_what_is_none_passes() {
    let object = |properties: Value| json!({"type": "object", "properties": properties});
    let field = |schema: Value| object(json!({"f": schema}));
    let ruled = |rules: &[&str], names: &[&str]| {
        let properties: Map<_, _> = names
            .iter()
            .map(|n| ((*n).to_owned(), json!({"type": "string"})))
            .collect();
        let rules: Vec<_> = rules.iter().map(|rule| json!({"rule": rule, "message": "m"})).collect();
        json!({"type": "object", "properties": properties, "x-kubernetes-validations": rules})
    };
    let mut ruled_with_default = ruled(&["!has(self.b) || self.b != 'x'"], &["b"]);
    ruled_with_default["properties"]["b"]["default"] = json!("x");
    let text = json!({"type": "string"});
    let table = [
        // Old, new, and what is found.
        (field(text.clone()), object(json!({})), "v1.spec.f: the field is gone"),
        (object(json!({})), field(json!({"type": "string", "default": "a"})), ""),
        (
            field(text.clone()),
            field(json!({"type": "integer"})),
            "v1.spec.f: it could be string",
        ),
        (field(json!({"type": "integer"})), field(json!({"type": "number"})), ""),
        (
            field(json!({"type": "number"})),
            field(json!({"type": "integer"})),
            "it could be integer or number",
        ),
        (
            field(text.clone()),
            field(json!({"x-kubernetes-int-or-string": true})),
            "",
        ),
        (
            field(json!({"x-kubernetes-int-or-string": true})),
            field(text.clone()),
            "it could be integer or string",
        ),
        (
            field(text.clone()),
            field(json!({"x-kubernetes-preserve-unknown-fields": true})),
            "",
        ),
        (
            field(json!({"enum": ["A", "B"]})),
            field(json!({"enum": ["A"]})),
            "no longer accepted: \"B\"",
        ),
        (field(json!({"enum": ["A"]})), field(json!({"enum": ["A", "B"]})), ""),
        (field(json!({})), field(json!({"enum": ["A"]})), "now only some are"),
        (
            field(json!({})),
            field(json!({"minimum": 0})),
            "minimum was nothing, and is 0",
        ),
        (
            field(json!({"minLength": 1})),
            field(json!({"minLength": 2})),
            "minLength was 1, and is 2",
        ),
        (field(json!({"minItems": 2})), field(json!({})), ""),
        (
            field(json!({"maximum": 9})),
            field(json!({"maximum": 8})),
            "maximum was 9, and is 8",
        ),
        (
            field(json!({})),
            field(json!({"maxItems": 8})),
            "maxItems was nothing, and is 8",
        ),
        (field(json!({"maxLength": 8})), field(json!({"maxLength": 9})), ""),
        (
            field(json!({"pattern": "a"})),
            field(json!({"pattern": "b"})),
            "pattern was \"a\", and is \"b\"",
        ),
        (field(json!({"format": "date-time"})), field(json!({})), ""),
        (
            field(json!({"default": 1})),
            field(json!({"default": 2})),
            "default was 1, and is 2",
        ),
        (
            field(json!({})),
            field(json!({"default": 2})),
            "default was nothing, and is 2",
        ),
        (
            field(json!({"default": 1})),
            field(json!({})),
            "default was 1, and is nothing",
        ),
        (json!({}), json!({"required": ["f"]}), "v1.spec: newly required: \"f\""),
        (json!({"required": ["f"]}), json!({}), ""),
        (
            field(json!({})),
            json!({"type": "object", "required": ["f"], "properties": {"f": {}, "g": {"default": 1}}}),
            "newly required: \"f\"",
        ),
        (
            json!({"properties": {}}),
            json!({"required": ["g"], "properties": {"g": {"default": 1}}}),
            "",
        ),
        (
            field(json!({"items": {"maxLength": 2}})),
            field(json!({"items": {"maxLength": 1}})),
            "v1.spec.f[]: maxLength was 2",
        ),
        (
            field(json!({"additionalProperties": {"type": "string"}})),
            field(json!({"additionalProperties": {"type": "integer"}})),
            "v1.spec.f[]: it could be string",
        ),
        (field(json!({"nullable": true})), field(json!({})), "nullable was true"),
        (
            field(json!({"x-kubernetes-list-type": "map"})),
            field(json!({"x-kubernetes-list-type": "atomic"})),
            "x-kubernetes-list-type was \"map\"",
        ),
        (
            ruled(&[], &[]),
            ruled(&["self.a > 1"], &[]),
            "v1.spec: a rule that was not there: self.a > 1",
        ),
        (ruled(&["self.a > 1"], &[]), ruled(&[], &[]), ""),
        (
            ruled(&[], &["a"]),
            ruled(&["!has(self.b) || self.b != 'x'"], &["a", "b"]),
            "",
        ),
        (
            ruled(&[], &["a"]),
            ruled(&["!has(self.a) || self.a != 'x'"], &["a"]),
            "a rule that was not there",
        ),
        (ruled(&[], &[]), ruled_with_default, "a rule that was not there"),
        (
            ruled(&["[has(self.a)].exists_one(g, g)"], &["a"]),
            ruled(&["[has(self.a), has(self.b)].exists_one(g, g)"], &["a", "b"]),
            "",
        ),
        (
            field(json!({})),
            field(json!({"oneOf": []})),
            "oneOf is not known to this test",
        ),
        (
            field(json!({"description": "a"})),
            field(json!({"description": "b"})),
            "",
        ),
    ];
    for (old, new, expected) in table {
        let found = breaks(&definition(&old), &definition(&new));
        let as_expected = match expected {
            "" => found.is_empty(),
            expected => found.len() == 1 && found.iter().all(|found| found.contains(expected)),
        };
        assert!(as_expected, "{old}\n{new}\nfound {found:?}\nexpected {expected:?}");
    }
}

#[test]
fn names_and_versions_stay() {
    let old = definition(&json!({"type": "object"}));
    let table = [
        ("/spec/scope", json!("Cluster"), "scope was \"Namespaced\""),
        ("/spec/names/shortNames", json!(["other"]), "names/shortNames had \"k\""),
        ("/spec/versions", json!([]), "version v1 is gone"),
        (
            "/spec/versions/0/served",
            json!(false),
            "version v1 is not served any more",
        ),
        (
            "/spec/versions/0/subresources",
            json!({}),
            "version v1 had the subresource status",
        ),
    ];
    for (pointer, value, expected) in table {
        let mut new = old.clone();
        *new.pointer_mut(pointer).unwrap() = value;
        assert_eq!(breaks(&old, &new), [expected]);
    }
}
