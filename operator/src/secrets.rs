//! Whether the Secrets that a spec names hold what they should. Their content is looked at here and goes nowhere.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use crate::{
    context::Context,
    error::{Error, Reason},
};

/// The keys of a Secret that have a value; none if the Secret does not exist.
pub type Keys = Option<BTreeSet<String>>;

/// Reads the keys of a Secret.
pub async fn keys(context: &Context, namespace: &str, name: &str, condition: &'static str) -> Result<Keys, Error> {
    let api: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
    let secret = api
        .get_opt(name)
        .await
        .map_err(|error| Error::from_api(condition, &format!("reading Secret {name}"), &error))?;
    Ok(secret.map(|secret| {
        secret
            .data
            .into_iter()
            .flatten()
            .filter(|(_, value)| !value.0.is_empty())
            .map(|(key, _)| key)
            .collect()
    }))
}

/// Says what to create when a Secret lacks something.
pub fn require(
    keys: &Keys,
    namespace: &str,
    name: &str,
    required: &[&str],
    condition: &'static str,
) -> Result<(), Error> {
    let literals = required
        .iter()
        .map(|key| format!("--from-literal={key}=..."))
        .collect::<Vec<_>>()
        .join(" ");
    let command = format!("kubectl -n {namespace} create secret generic {name} {literals}");
    match keys {
        None => Err(Error::waiting(
            condition,
            Reason::SecretNotFound,
            format!("Secret {name} does not exist; create it: {command}"),
        )),
        Some(keys) => match required.iter().find(|key| !keys.contains(**key)) {
            None => Ok(()),
            Some(key) => Err(Error::waiting(
                condition,
                Reason::SecretKeyNotFound,
                format!("Secret {name} has no value for the key {key}; add it, or create the Secret anew: {command}"),
            )),
        },
    }
}
