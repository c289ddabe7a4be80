//! The one place where Kafka clients get their settings, and where it is kept what they hear of the brokers.

use std::{
    fs, io,
    ops::Deref,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use meander_config::{KafkaCluster, SaslMechanism};
use rdkafka::{
    ClientConfig, ClientContext,
    client::Client,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
};
use tokio::runtime::Handle;

use crate::{
    sink::SinkError,
    tls::{TlsFileError, authorities, client_pem},
};

/// How long the brokers may take to admit a client.
const ADMISSION_DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked whether they have refused it: the client itself would try for as long as it may.
const LOOK: Duration = Duration::from_millis(250);

/// A client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A file with a user name or a password cannot be read.
    #[error("cannot read the credentials in {path}: {error}")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file that TLS needs.
    #[error("{0}")]
    File(#[from] TlsFileError),
    /// The settings do not go together.
    #[error("{0}")]
    Settings(#[from] KafkaError),
}

/// What every client of a cluster starts from. The files are read anew each time, since Kubernetes replaces them when their Secret
/// changes.
///
/// # Errors
/// When a file cannot be read, or holds something else.
pub fn settings(cluster: &KafkaCluster) -> Result<ClientConfig, ClientError> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", cluster.bootstrap_servers.join(","))
        .set("client.id", "meander-runtime")
        // By default a client whose broker is back looks for it up to ten seconds later.
        .set("reconnect.backoff.max.ms", "1000");
    config.set(
        "security.protocol",
        match (&cluster.tls, &cluster.sasl) {
            (None, None) => "plaintext",
            (Some(_), None) => "ssl",
            (None, Some(_)) => "sasl_plaintext",
            (Some(_), Some(_)) => "sasl_ssl",
        },
    );
    let text = |pem: Vec<u8>| String::from_utf8_lossy(&pem).into_owned();
    if let Some(tls) = &cluster.tls {
        config.set("ssl.ca.pem", text(authorities(tls.ca_file.as_deref())?));
        // The client's default, but the one that must not change: the certificate has to be for the host name.
        config.set("ssl.endpoint.identification.algorithm", "https");
        if let Some(client) = &tls.client_certificate {
            let (certificate, key) = client_pem(client)?;
            config.set("ssl.certificate.pem", text(certificate));
            config.set("ssl.key.pem", text(key));
        }
    }
    if let Some(sasl) = &cluster.sasl {
        config.set(
            "sasl.mechanism",
            match sasl.mechanism {
                SaslMechanism::Plain => "PLAIN",
                SaslMechanism::ScramSha256 => "SCRAM-SHA-256",
                SaslMechanism::ScramSha512 => "SCRAM-SHA-512",
            },
        );
        config.set("sasl.username", credential(&sasl.username_file)?);
        config.set("sasl.password", credential(&sasl.password_file)?);
    }
    Ok(config)
}

fn credential(path: &Path) -> Result<String, ClientError> {
    let text = fs::read_to_string(path).map_err(|error| ClientError::Credentials {
        path: path.to_owned(),
        error,
    })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// A client that is ended on a thread for what blocks, and nobody has to wait for it: to end one takes a moment, and seconds where it is just looking
/// up a broker's name. The process waits for it at its own end, for as long as it waits for anything that blocks.
pub(crate) struct EndedAside<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> EndedAside<T> {
    pub(crate) fn new(client: T) -> Self {
        Self(Some(client))
    }
}

impl<T: Send + 'static> Deref for EndedAside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.0 {
            Some(client) => client,
            None => unreachable!("only its end takes it"),
        }
    }
}

impl<T: Send + 'static> Drop for EndedAside<T> {
    fn drop(&mut self) {
        let client = self.0.take();
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(client))),
            // On a thread that is nobody's, whoever drops it waits.
            Err(_) => drop(client),
        }
    }
}

/// Why the brokers cannot be worked with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// User and password are wrong, or the mechanism is not offered.
    #[error("{0}")]
    Authentication(String),
    /// No agreement on TLS, or a certificate that is not trusted.
    #[error("{0}")]
    Tls(String),
    /// No answer.
    #[error("{0}")]
    Unreachable(String),
}

/// What a client hears on its own account: it tries again by itself, for as long as it may, and says only here what is wrong.
#[derive(Clone, Debug, Default)]
pub struct Hearing(Arc<Mutex<Option<Refusal>>>);

impl Hearing {
    /// The last thing that was heard.
    #[must_use]
    pub fn last(&self) -> Option<Refusal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn note(&self, refusal: Refusal) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // That all brokers are down is what follows from each one's refusal, and says less.
        if last.is_none() || !matches!(refusal, Refusal::Unreachable(_)) {
            *last = Some(refusal);
        }
    }
}

impl ClientContext for Hearing {
    fn error(&self, error: KafkaError, reason: &str) {
        let code = error.rdkafka_error_code();
        // The end of a partition is asked for, and told to whoever reads there. The client goes on by itself after the others.
        if code == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        // What the client's library prints where it has no cause.
        let reason = reason.replace(": (null)", "");
        tracing::warn!(%error, reason, "Kafka client");
        match code {
            Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SaslAuthenticationFailed) => {
                self.note(Refusal::Authentication(reason));
            }
            Some(RDKafkaErrorCode::SSL) => self.note(Refusal::Tls(reason)),
            Some(
                RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::Resolve
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::AllBrokersDown,
            ) => self.note(Refusal::Unreachable(reason)),
            _ => {}
        }
    }
}

impl ConsumerContext for Hearing {}

/// Finds out whether the cluster admits this pipeline, by asking for a topic, which need not exist. Blocks for some seconds at the most.
///
/// # Errors
/// With the brokers' own words when they refuse, and at once; otherwise when none answers in time.
pub fn require_admission(cluster: &KafkaCluster, topic: &str) -> Result<(), SinkError> {
    let hearing = Hearing::default();
    let consumer: BaseConsumer<Hearing> = settings(cluster)?
        .set("allow.auto.create.topics", "false")
        .create_with_context(hearing.clone())
        .map_err(ClientError::from)?;
    let serve = |limit: Duration| {
        let end = Instant::now() + limit;
        // An error ends a poll; there may be more.
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            drop(consumer.poll(left));
        }
    };
    probe(consumer.client(), &hearing, serve, topic, ADMISSION_DEADLINE)
        .map_err(|refusal| SinkError::refused(&cluster.bootstrap_servers.join(","), refusal))
}

/// Asks a living client's brokers for a topic. `serve` has the client say for so long what it has heard.
///
/// # Errors
/// When they refuse, or none answers in time.
pub fn probe<C: ClientContext>(
    client: &Client<C>,
    hearing: &Hearing,
    serve: impl Fn(Duration),
    topic: &str,
    limit: Duration,
) -> Result<(), Refusal> {
    let deadline = Instant::now() + limit;
    hearing.forget();
    loop {
        let answer = client.fetch_metadata(Some(topic), LOOK);
        // A refusal can stand behind any number of lines for the log.
        serve(if answer.is_ok() { Duration::ZERO } else { LOOK });
        match (answer, hearing.last()) {
            (Ok(_), _) => return Ok(()),
            (Err(_), Some(refusal @ (Refusal::Authentication(_) | Refusal::Tls(_)))) => return Err(refusal),
            (Err(error), heard) if Instant::now() >= deadline => {
                return Err(heard.unwrap_or_else(|| Refusal::Unreachable(error.to_string())));
            }
            (Err(_), _) => {}
        }
    }
}
