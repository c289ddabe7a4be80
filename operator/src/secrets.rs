//! Whether the Secrets that a spec names hold what they should. Their content is looked at here and goes nowhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use meander_crds::{
    CdcPipeline, GrpcTarget, KafkaSasl, KafkaSink, KafkaTls, PostgresSource, RedisSink, ReplayJob, SecretKeyReference,
    SecretReference,
};

use crate::{
    conditions::{ACCEPTED, SINKS_READY, SOURCE_READY},
    context::Context,
    error::{Error, Reason},
};

/// Folders of what signs in to the log's Kafka, of the authority that is trusted, and of the certificate that is shown.
pub const KAFKA_FOLDERS: [&str; 3] = ["kafka", "kafka-ca", "kafka-client"];
/// The same for the target of a replay.
pub const TARGET_FOLDERS: [&str; 3] = ["target", "target-ca", "target-client"];

/// Files that a pod needs from a Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretFiles {
    /// The volume's name, and its folder.
    pub folder: &'static str,
    /// The Secret's name.
    pub secret: String,
    /// (key, file name).
    pub files: Vec<(String, &'static str)>,
    /// The condition that is false while it is not there.
    pub condition: &'static str,
}

impl fmt::Display for SecretFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<&str> = self.files.iter().map(|(key, _)| key.as_str()).collect();
        let plural = if keys.len() > 1 { "s" } else { "" };
        write!(f, "Secret {} (key{plural} {})", self.secret, keys.join(" and "))
    }
}

impl SecretFiles {
    /// The keys `username` and `password`.
    pub fn credentials(folder: &'static str, reference: &SecretReference, condition: &'static str) -> Self {
        let files = ["username", "password"].map(|key| (key.to_owned(), key));
        Self::new(folder, &reference.name, files, condition)
    }

    /// The keys of a Secret of type `kubernetes.io/tls`.
    pub fn certificate(folder: &'static str, reference: &SecretReference, condition: &'static str) -> Self {
        let files = ["tls.crt", "tls.key"].map(|key| (key.to_owned(), key));
        Self::new(folder, &reference.name, files, condition)
    }

    /// One key, as this file.
    pub fn one(
        folder: &'static str,
        reference: &SecretKeyReference,
        file: &'static str,
        condition: &'static str,
    ) -> Self {
        Self::new(folder, &reference.name, [(reference.key.clone(), file)], condition)
    }

    fn new<const N: usize>(
        folder: &'static str,
        secret: &str,
        files: [(String, &'static str); N],
        condition: &'static str,
    ) -> Self {
        Self {
            folder,
            secret: secret.to_owned(),
            files: files.into(),
            condition,
        }
    }

    /// The command that makes the Secret.
    fn command(&self, namespace: &str) -> String {
        let name = &self.secret;
        if self.files.iter().all(|(_, file)| ["tls.crt", "tls.key"].contains(file)) {
            return format!("kubectl -n {namespace} create secret tls {name} --cert=... --key=...");
        }
        let is_pem = |file: &str| file.ends_with(".crt") || file.ends_with(".key");
        let source = |file: &str| if is_pem(file) { "file" } else { "literal" };
        let sources: Vec<String> = self
            .files
            .iter()
            .map(|(key, file)| format!("--from-{}={key}=...", source(file)))
            .collect();
        format!(
            "kubectl -n {namespace} create secret generic {name} {}",
            sources.join(" ")
        )
    }
}

/// The Secrets that a pipeline's capture needs, each in a folder of its own.
pub fn of_pipeline(pipeline: &CdcPipeline) -> Vec<SecretFiles> {
    let mut secrets = of_postgres(&pipeline.spec.source.postgres);
    secrets.extend(of_log(&pipeline.spec.sinks.kafka, SINKS_READY));
    secrets.extend(pipeline.spec.sinks.redis.iter().flat_map(of_redis));
    secrets
}

/// The Secrets that a replay needs: those of its pipeline's log, and its own.
pub fn of_replay(replay: &ReplayJob, pipeline: Option<&CdcPipeline>) -> Vec<SecretFiles> {
    let log = pipeline.map(|pipeline| of_log(&pipeline.spec.sinks.kafka, ACCEPTED));
    let target = replay.spec.delivers_to();
    let serve = target.grpc.as_ref().and_then(|grpc| grpc.serve.as_ref());
    let token = serve.map(|serve| SecretFiles::one("subscribers", &serve.token_secret_ref, "token", ACCEPTED));
    let certificate = serve.and_then(|serve| serve.tls_secret_ref.as_ref());
    let certificate = certificate.map(|reference| SecretFiles::certificate("serving", reference, ACCEPTED));
    let receiver = target.grpc.iter().flat_map(of_receiver);
    let database = target.postgres.iter().flat_map(|target| {
        postgres_files(
            TARGET_FOLDERS,
            &target.credentials_secret_ref,
            target.ca_secret_ref.as_ref(),
            target.client_cert_secret_ref.as_ref(),
            ACCEPTED,
        )
    });
    let kafka = target.kafka.iter();
    let brokers =
        kafka.flat_map(|target| of_kafka(target.tls.as_ref(), target.sasl.as_ref(), TARGET_FOLDERS, ACCEPTED));
    let [signing_in, trusting, _] = TARGET_FOLDERS;
    let redis = target.redis.iter();
    let streams = redis.flat_map(|target| {
        let authority = target.ca_secret_ref.as_ref();
        [SecretFiles::one(signing_in, &target.url_secret_ref, "url", ACCEPTED)]
            .into_iter()
            .chain(authority.map(|reference| SecretFiles::one(trusting, reference, "ca.crt", ACCEPTED)))
    });
    let endpoint = target.http.iter().flat_map(|target| {
        let (token, authority) = (target.token_secret_ref.as_ref(), target.ca_secret_ref.as_ref());
        token
            .map(|reference| SecretFiles::one(signing_in, reference, "token", ACCEPTED))
            .into_iter()
            .chain(authority.map(|reference| SecretFiles::one(trusting, reference, "ca.crt", ACCEPTED)))
    });
    (log.into_iter().flatten())
        .chain(token)
        .chain(certificate)
        .chain(receiver)
        .chain(database)
        .chain(brokers)
        .chain(streams)
        .chain(endpoint)
        .collect()
}

fn of_receiver(grpc: &GrpcTarget) -> Vec<SecretFiles> {
    let authority = grpc.ca_secret_ref.as_ref();
    let certificate = grpc.client_cert_secret_ref.as_ref();
    let token = grpc.token_secret_ref.as_ref();
    authority
        .map(|reference| SecretFiles::one("target-ca", reference, "ca.crt", ACCEPTED))
        .into_iter()
        .chain(certificate.map(|reference| SecretFiles::certificate("target-client", reference, ACCEPTED)))
        .chain(token.map(|reference| SecretFiles::one("target", reference, "token", ACCEPTED)))
        .collect()
}

fn of_log(kafka: &KafkaSink, condition: &'static str) -> Vec<SecretFiles> {
    of_kafka(kafka.tls.as_ref(), kafka.sasl.as_ref(), KAFKA_FOLDERS, condition)
}

/// What a connection to Kafka needs: credentials, authority, certificate.
fn of_kafka(
    tls: Option<&KafkaTls>,
    sasl: Option<&KafkaSasl>,
    folders: [&'static str; 3],
    condition: &'static str,
) -> Vec<SecretFiles> {
    let [signing_in, trusting, showing] = folders;
    let sasl = sasl.map(|sasl| &sasl.credentials_secret_ref);
    let authority = tls.and_then(|tls| tls.ca_secret_ref.as_ref());
    let certificate = tls.and_then(|tls| tls.client_cert_secret_ref.as_ref());
    sasl.map(|reference| SecretFiles::credentials(signing_in, reference, condition))
        .into_iter()
        .chain(authority.map(|reference| SecretFiles::one(trusting, reference, "ca.crt", condition)))
        .chain(certificate.map(|reference| SecretFiles::certificate(showing, reference, condition)))
        .collect()
}

fn of_postgres(postgres: &PostgresSource) -> Vec<SecretFiles> {
    postgres_files(
        ["postgres", "postgres-ca", "postgres-client"],
        &postgres.credentials_secret_ref,
        postgres.ca_secret_ref.as_ref(),
        postgres.client_cert_secret_ref.as_ref(),
        SOURCE_READY,
    )
}

/// What a connection to PostgreSQL needs: credentials, authority, certificate.
fn postgres_files(
    folders: [&'static str; 3],
    credentials: &SecretReference,
    authority: Option<&SecretKeyReference>,
    certificate: Option<&SecretReference>,
    condition: &'static str,
) -> Vec<SecretFiles> {
    let [signing_in, trusting, showing] = folders;
    [SecretFiles::credentials(signing_in, credentials, condition)]
        .into_iter()
        .chain(authority.map(|reference| SecretFiles::one(trusting, reference, "ca.crt", condition)))
        .chain(certificate.map(|reference| SecretFiles::certificate(showing, reference, condition)))
        .collect()
}

fn of_redis(redis: &RedisSink) -> Vec<SecretFiles> {
    let url = redis.url_secret_ref.as_ref();
    let authority = redis.ca_secret_ref.as_ref();
    url.map(|reference| SecretFiles::one("redis", reference, "url", SINKS_READY))
        .into_iter()
        .chain(authority.map(|reference| SecretFiles::one("redis-ca", reference, "ca.crt", SINKS_READY)))
        .collect()
}

/// Names the Secrets that a reason of the runtime is about. Its message does not: the runtime sees files, and not what they come from.
pub fn meant_by(reason: &str, secrets: &[SecretFiles]) -> Option<String> {
    let [kafka, kafka_ca, kafka_client] = KAFKA_FOLDERS;
    let folders: &[&str] = match reason {
        "AuthenticationFailed" | "CredentialsUnreadable" => &["postgres", "postgres-client"],
        "CertificateRefused" => &["postgres-ca"],
        "CertificateUnreadable" => &["postgres-ca", "postgres-client"],
        "KafkaAuthenticationFailed" => &[kafka, kafka_client],
        "KafkaTlsFailed" => &[kafka_ca, kafka_client],
        "KafkaCredentialsUnreadable" => &KAFKA_FOLDERS,
        "RedisUnreachable" | "RedisUrlInvalid" => &["redis", "redis-ca"],
        _ => return None,
    };
    let meant = secrets.iter().filter(|files| folders.contains(&files.folder));
    let named: Vec<String> = meant.map(SecretFiles::to_string).collect();
    (!named.is_empty()).then(|| named.join(" and "))
}

/// The keys that have a value, of each Secret that exists.
pub type Keys = BTreeMap<String, BTreeSet<String>>;

/// Reads the keys of these Secrets, all at once.
pub async fn keys(context: &Context, namespace: &str, secrets: &[SecretFiles]) -> Result<Keys, Error> {
    let api: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
    let by_name: BTreeMap<&str, &SecretFiles> = secrets
        .iter()
        .rev()
        .map(|files| (files.secret.as_str(), files))
        .collect();
    let read = by_name.into_iter().map(async |(name, files)| {
        let secret = api
            .get_opt(name)
            .await
            .map_err(|error| Error::from_api(files.condition, &format!("reading Secret {name}"), &error))?;
        Ok(secret.map(|secret| {
            let data = secret.data.into_iter().flatten();
            let with_value = data.filter(|(_, value)| !value.0.is_empty());
            (name.to_owned(), with_value.map(|(key, _)| key).collect())
        }))
    });
    Ok(try_join_all(read).await?.into_iter().flatten().collect())
}

/// Says what to create of all the Secrets that are not there or lack something. The first gives condition and reason.
///
/// # Errors
/// Waiting, when one is not there or lacks something.
pub fn require(keys: &Keys, namespace: &str, secrets: &[SecretFiles]) -> Result<(), Error> {
    // One that is named twice is created once, with what both need of it.
    let mut all: Vec<SecretFiles> = Vec::new();
    for wanted in secrets {
        match all.iter_mut().find(|known| known.secret == wanted.secret) {
            Some(known) => known.files.extend(wanted.files.iter().cloned()),
            None => all.push(wanted.clone()),
        }
    }
    let lacking: Vec<_> = all
        .iter()
        .filter_map(|wanted| Some((wanted, lacks(keys, namespace, wanted)?)))
        .collect();
    let Some((first, (reason, _))) = lacking.first() else {
        return Ok(());
    };
    let messages: Vec<_> = lacking.iter().map(|(_, (_, message))| message.as_str()).collect();
    Err(Error::waiting(first.condition, *reason, messages.join(". Also: ")))
}

fn lacks(keys: &Keys, namespace: &str, wanted: &SecretFiles) -> Option<(Reason, String)> {
    let name = &wanted.secret;
    let Some(known) = keys.get(name) else {
        let command = wanted.command(namespace);
        let message = format!("Secret {name} does not exist; create it: {command}");
        return Some((Reason::SecretNotFound, message));
    };
    let missing: BTreeSet<_> = wanted.files.iter().map(|(key, _)| key.as_str()).collect();
    let missing: Vec<_> = missing.into_iter().filter(|key| !known.contains(*key)).collect();
    let what = match missing[..] {
        [] => return None,
        [key] => format!("the key {key}; add it"),
        _ => format!("the keys {}; add them", missing.join(" and ")),
    };
    let values: Vec<String> = missing.iter().map(|key| format!(r#""{key}":"...""#)).collect();
    let message = format!(
        "Secret {name} has no value for {what}: kubectl -n {namespace} patch secret {name} -p '{{\"stringData\":{{{}}}}}'",
        values.join(",")
    );
    Some((Reason::SecretKeyNotFound, message))
}
