//! Writes the CRD manifests and their reference from the types.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::{Map, Value};

use schemars::schema_for;

use crate::{CdcPipeline, CdcPipelineSpec, CdcPipelineStatus, ReplayJob, ReplayJobSpec, ReplayJobStatus};

/// A generated file.
#[derive(Clone, Debug)]
pub struct File {
    /// Path from the root of the repository.
    pub path: &'static str,
    /// What it must hold.
    pub content: String,
}

/// The definitions as they are installed.
///
/// # Errors
/// When a derived definition is not JSON, which would be a bug in the types.
pub fn definitions() -> Result<[CustomResourceDefinition; 2], serde_json::Error> {
    let pipeline = [schema_for!(CdcPipelineSpec), schema_for!(CdcPipelineStatus)];
    let replay = [schema_for!(ReplayJobSpec), schema_for!(ReplayJobStatus)];
    Ok([
        definition(CdcPipeline::crd(), pipeline)?,
        definition(ReplayJob::crd(), replay)?,
    ])
}

/// Every generated file.
///
/// # Errors
/// When a definition has no form in JSON or YAML, which would be a bug in the types.
pub fn files() -> Result<Vec<File>, Box<dyn std::error::Error>> {
    let [pipeline, replay] = definitions()?;
    let pipeline_yaml = manifest(&pipeline)?;
    let replay_yaml = manifest(&replay)?;
    let reference = reference(&[serde_json::to_value(&pipeline)?, serde_json::to_value(&replay)?]);
    Ok(vec![
        File {
            path: "crds/cdcpipelines.yaml",
            content: pipeline_yaml.clone(),
        },
        File {
            path: "crds/replayjobs.yaml",
            content: replay_yaml.clone(),
        },
        // Helm installs what is in a chart's crds/ before everything else.
        File {
            path: "charts/meander/crds/cdcpipelines.yaml",
            content: pipeline_yaml,
        },
        File {
            path: "charts/meander/crds/replayjobs.yaml",
            content: replay_yaml,
        },
        File {
            path: "docs/crd-reference.md",
            content: reference,
        },
    ])
}

fn definition(
    derived: CustomResourceDefinition,
    types: [schemars::Schema; 2],
) -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut value = serde_json::to_value(derived)?;
    if let Some(versions) = value.pointer_mut("/spec/versions").and_then(Value::as_array_mut) {
        for version in versions {
            if let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") {
                tidy(schema);
                for (part, types) in ["spec", "status"].into_iter().zip(&types) {
                    if let Some(schema) = schema.pointer_mut(&format!("/properties/{part}")) {
                        explain(part, schema, types.as_value(), types.as_value());
                    }
                }
            }
        }
    }
    serde_json::from_value(value)
}

/// Takes out what Rust's types say and Kubernetes has no use for.
fn tidy(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    // An absent optional field is left out. As `null` it would be present to CEL's has().
    object.remove("nullable");
    // Formats that the API server does not know are warnings at every `kubectl apply`.
    if object
        .get("format")
        .and_then(Value::as_str)
        .is_some_and(|format| format.starts_with("uint"))
    {
        object.remove("format");
    }
    // Doc comments are wrapped for the source; `kubectl explain` wraps for itself.
    if let Some(Value::String(description)) = object.get_mut("description") {
        *description = description.replace('\n', " ");
    }
    // `kubectl explain` would put it after that of the list.
    if let Some(Value::Object(items)) = object.get_mut("items")
        && !items.contains_key("properties")
    {
        items.remove("description");
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(key) {
            tidy(inner);
        }
    }
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.values_mut().for_each(tidy);
    }
}

/// Adds to descriptions what `kubectl explain` shows nowhere else: what the values of an enumeration mean, of which fields exactly one is
/// to be written, and the default. The first is in the types, and not in what Kubernetes makes of them.
fn explain(part: &str, schema: &mut Value, types: &Value, root: &Value) {
    let types = resolve(types, root);
    let Some(Value::Object(properties)) = schema.get_mut("properties") else {
        return;
    };
    for (name, field) in properties {
        let own = &types["properties"][name];
        let items = &resolve(own, root)["items"];
        let mut notes = meanings(own, root);
        notes.extend(meanings(items, root));
        let rules = field.get("x-kubernetes-validations").and_then(Value::as_array);
        for message in rules.into_iter().flatten().filter_map(|rule| rule["message"].as_str()) {
            notes.extend(
                message
                    .strip_prefix("write exactly one")
                    .map(|fields| format!("Write exactly one{fields}.")),
            );
        }
        // What nobody writes has none to know.
        match field.get("default").filter(|_| part == "spec") {
            None | Some(Value::Object(_)) => {}
            Some(Value::String(default)) => notes.push(format!("The default is {default}.")),
            Some(default) => notes.push(format!("The default is {default}.")),
        }
        if let Some(Value::String(description)) = field.get_mut("description") {
            for note in notes {
                description.push(' ');
                description.push_str(&note);
            }
        }
        explain(part, field, own, root);
        if let Some(field) = field.get_mut("items") {
            explain(part, field, items, root);
        }
    }
}

/// A type by what names it.
fn resolve<'a>(types: &'a Value, root: &'a Value) -> &'a Value {
    // An optional one is it, or null.
    let types = types.pointer("/anyOf/0").unwrap_or(types);
    let named = types.get("$ref").and_then(Value::as_str);
    named
        .and_then(|name| root.pointer(name.strip_prefix('#')?))
        .unwrap_or(types)
}

/// What each value of an enumeration means.
fn meanings(types: &Value, root: &Value) -> Vec<String> {
    let values = resolve(types, root).get("oneOf").and_then(Value::as_array);
    let meaning = |value: &Value| {
        let (name, description) = (value.get("const")?.as_str()?, value.get("description")?.as_str()?);
        Some(format!("`{name}`: {}", description.replace('\n', " ")))
    };
    values.into_iter().flatten().filter_map(meaning).collect()
}

fn manifest(definition: &CustomResourceDefinition) -> Result<String, Box<dyn std::error::Error>> {
    let mut value = serde_json::to_value(definition)?;
    whole_numbers(&mut value);
    let yaml = serde_saphyr::to_string(&value)?;
    Ok(format!(
        "# Generated from crds/src by `cargo run -p meander-crds --bin crdgen`. Do not edit.\n{yaml}"
    ))
}

/// Bounds are floats to Rust's type of a schema; people write `maximum: 65535`.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(float) = number
                .as_f64()
                .filter(|float| float.fract() == 0.0 && float.abs() < 9e15)
            {
                *number = serde_json::Number::from(float as i64);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        _ => {}
    }
}

fn reference(definitions: &[Value]) -> String {
    let mut out = String::from(
        "# Resource reference\n\n\
         Generated from `crds/src` by `cargo run -p meander-crds --bin crdgen`. Do not edit.\n\n\
         A field marked *required* must be written; the others may be left out.\n",
    );
    for definition in definitions {
        let text = |pointer: &str| definition.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let schema = definition
            .pointer("/spec/versions/0/schema/openAPIV3Schema")
            .unwrap_or(&Value::Null);
        let _ = write!(
            out,
            "\n## {}\n\n`{}/{}`, short name `{}`. {}\n",
            text("/spec/names/kind"),
            text("/spec/group"),
            text("/spec/versions/0/name"),
            text("/spec/names/shortNames/0"),
            schema.get("description").and_then(Value::as_str).unwrap_or_default(),
        );
        let mut of_object = String::new();
        rules(&mut of_object, schema);
        let _ = write!(out, "\n{of_object}");
        for part in ["spec", "status"] {
            if let Some(schema) = schema.pointer(&format!("/properties/{part}")) {
                let _ = write!(
                    out,
                    "\n### {}.{part}\n\n| field | type | |\n|---|---|---|\n",
                    text("/spec/names/kind")
                );
                fields(&mut out, "", schema);
                if part == "spec" {
                    let mut messages = String::new();
                    all_rules(&mut messages, schema);
                    let _ = write!(
                        out,
                        "\nThe API server refuses a spec that breaks one of these rules:\n\n{messages}"
                    );
                }
            }
        }
    }
    out
}

fn fields(out: &mut String, prefix: &str, schema: &Value) {
    let empty = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (name, field) in properties {
        let path = format!("{prefix}{name}");
        let mut notes = Vec::new();
        if required.contains(&name.as_str()) && !field.as_object().is_some_and(|f| f.contains_key("default")) {
            notes.push("*required*".to_owned());
        }
        if let Some(description) = field.get("description").and_then(Value::as_str) {
            notes.push(description.replace('|', "\\|"));
        }
        let _ = writeln!(out, "| `{path}` | {} | {} |", type_of(field), notes.join("; "));
        if name == "conditions" {
            continue;
        }
        fields(out, &format!("{path}."), field);
        if let Some(items) = field.get("items") {
            fields(out, &format!("{path}[]."), items);
        }
    }
}

fn type_of(field: &Value) -> String {
    if field.get("x-kubernetes-int-or-string").is_some() {
        return "integer or string".to_owned();
    }
    if let Some(values) = field.get("enum").and_then(Value::as_array) {
        return values
            .iter()
            .filter_map(Value::as_str)
            .map(|v| format!("`{v}`"))
            .collect::<Vec<_>>()
            .join(", ");
    }
    let name = field.get("type").and_then(Value::as_str).unwrap_or("any");
    match (name, field.get("format").and_then(Value::as_str)) {
        ("array", _) => format!("list of {}", field.get("items").map(type_of).unwrap_or_default()),
        ("string", Some("date-time")) => "time".to_owned(),
        (name, _) => name.to_owned(),
    }
}

fn rules(out: &mut String, schema: &Value) {
    let validations = schema.get("x-kubernetes-validations").and_then(Value::as_array);
    for rule in validations.into_iter().flatten() {
        if let Some(message) = rule.get("message").and_then(Value::as_str) {
            let _ = writeln!(out, "- {message}");
        }
    }
}

fn all_rules(out: &mut String, schema: &Value) {
    rules(out, schema);
    let properties = schema.get("properties").and_then(Value::as_object);
    for field in properties.into_iter().flat_map(Map::values) {
        all_rules(out, field);
    }
}
