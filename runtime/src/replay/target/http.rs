//! Posts the changes as CloudEvents, in batches, each once the one before is taken.
//!
//! At least once: what was not answered is posted again. Each event has an id of its own, and a batch that is posted again has the same
//! idempotency key.

mod dead_letters;

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    HeaderMap, Method, Request, StatusCode, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT},
};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use jiff::{Timestamp, fmt::rfc2822::DateTimeParser};
use meander_config::{HttpEndpoint, KafkaLog, ResourceIdentity};
use rustls::{ClientConfig, crypto::ring};
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use self::dead_letters::DeadLetters;
use super::{Batch, Tally, Target, TargetError, Trouble, chain, job_id, log::line};
use crate::{
    log::REPLAY_ATTEMPT_HEADER,
    replay::{
        keeper::AtLeastOnce,
        patience::{PATIENCE, Patience},
        record::Record,
    },
    tls::root_store,
};

/// How long the endpoint may take for an answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest `Retry-After` that is kept to.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How much of an answer is read, and how much of it is told.
const ANSWER_BYTES: usize = 16 << 10;
const TOLD_CHARACTERS: usize = 200;

const MEDIA_TYPE: HeaderValue = HeaderValue::from_static("application/cloudevents-batch+json; charset=utf-8");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const ATTEMPT: HeaderName = HeaderName::from_static(REPLAY_ATTEMPT_HEADER);
const TYPE: &str = "dev.meander.change";

/// Where the changes go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The endpoint.
    pub endpoint: HttpEndpoint,
    /// The replay.
    pub job: ResourceIdentity,
    /// The pipeline whose log it is.
    pub pipeline: ResourceIdentity,
    /// The log, in whose cluster dead letters are kept.
    pub log: KafkaLog,
}

/// Posts to one URL.
pub struct Http {
    settings: Settings,
    job: String,
    attempt: u32,
    dead_letters: DeadLetters,
}

/// What came of a post.
enum Answer {
    Taken,
    /// The endpoint does not take what is in it.
    Unfit(String),
    /// It may take it later.
    Later {
        cause: String,
        after: Option<Duration>,
    },
    /// It takes nothing from this caller.
    Refused(StatusCode, String),
}

impl AtLeastOnce for Http {
    type Settings = Settings;

    fn new(settings: &Settings, attempt: u32) -> Self {
        let job = job_id(&settings.job);
        Self {
            dead_letters: DeadLetters::new(settings.log.clone(), &settings.job, job.clone()),
            settings: settings.clone(),
            job,
            attempt,
        }
    }
}

impl Target for Http {
    async fn run(mut self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        let client = self.client()?;
        tally.open();
        while let Some(batch) = batches.recv().await {
            self.deliver(&client, &batch.records, &tally).await?;
            tally.credit(&batch.mark);
        }
        Ok(())
    }
}

type Connection = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

impl Http {
    fn client(&self) -> Result<Connection, TargetError> {
        let roots = root_store(self.settings.endpoint.ca_file.as_deref())?;
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| self.unusable(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(Client::builder(TokioExecutor::new()).build(connector))
    }

    fn unusable(&self, cause: &dyn std::fmt::Display) -> TargetError {
        TargetError::InvalidUrl {
            url: self.settings.endpoint.url.clone(),
            cause: cause.to_string(),
        }
    }

    /// Delivers records in their order. Those that the endpoint does not take for what they are it finds out by halves.
    async fn deliver(&mut self, client: &Connection, records: &[Record], tally: &Tally) -> Result<(), TargetError> {
        // What is still to be delivered, the next of it last.
        let mut parts = vec![records];
        while let Some(part) = parts.pop() {
            let Some(refusal) = self.post(client, part, tally).await? else {
                continue;
            };
            match part {
                [record] => {
                    let url = &self.settings.endpoint.url;
                    self.dead_letters.keep(record, url, &refusal).await?;
                }
                _ => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
            }
        }
        Ok(())
    }

    /// Posts until the endpoint has decided. Returns why it does not take what is in it.
    async fn post(
        &self,
        client: &Connection,
        records: &[Record],
        tally: &Tally,
    ) -> Result<Option<String>, TargetError> {
        let (Some(first), Some(last)) = (records.first(), records.last()) else {
            return Ok(None);
        };
        let events = records.iter().map(|record| self.event(record));
        let events = Value::Array(events.collect::<Result<_, _>>()?);
        let body = Bytes::from(events.to_string());
        let key = format!("\"{}/{}/{}\"", self.job, first.coordinate, last.coordinate);
        let mut patience = Patience::default();
        loop {
            let (cause, after) = match self.ask(client, body.clone(), &key).await? {
                Answer::Taken => {
                    tally.set_trouble(None);
                    return Ok(None);
                }
                Answer::Unfit(refusal) => {
                    tally.set_trouble(None);
                    return Ok(Some(refusal));
                }
                Answer::Refused(status, said) => {
                    return Err(TargetError::EndpointRefused {
                        endpoint: self.settings.endpoint.url.clone(),
                        status: status.to_string(),
                        said,
                    });
                }
                Answer::Later { cause, after } => (cause, after),
            };
            let url = &self.settings.endpoint.url;
            let trouble = Trouble {
                reason: "ReceiverUnreachable",
                message: format!(
                    "Nothing is delivered to {url}: {cause}; start it, or correct the URL. It is tried again."
                ),
            };
            let Some(backoff) = patience.failed(trouble, |trouble| tally.set_trouble(Some(trouble))) else {
                return Err(TargetError::ReceiverUnreachable {
                    endpoint: url.clone(),
                    tried: PATIENCE,
                    cause,
                });
            };
            sleep(after.map_or(backoff, |after| after.min(LONGEST_PAUSE).max(backoff))).await;
        }
    }

    async fn ask(&self, client: &Connection, body: Bytes, key: &str) -> Result<Answer, TargetError> {
        let endpoint = &self.settings.endpoint;
        let uri: Uri = endpoint.url.parse().map_err(|error| self.unusable(&error))?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, MEDIA_TYPE);
        headers.insert(USER_AGENT, HeaderValue::from_static("meander"));
        headers.insert(
            IDEMPOTENCY_KEY,
            HeaderValue::from_str(key).map_err(|error| self.unusable(&error))?,
        );
        headers.insert(ATTEMPT, HeaderValue::from(self.attempt));
        if let Some(file) = &endpoint.token_file {
            headers.insert(AUTHORIZATION, bearer(file)?);
        }
        let answer = timeout(ANSWER_DEADLINE, async {
            let answer = client.request(request).await.map_err(|error| chain(&error))?;
            let (head, body) = answer.into_parts();
            // What is longer is not read, and its connection not used again.
            let said = Limited::new(body, ANSWER_BYTES).collect().await;
            let said = said.map(|said| said.to_bytes()).unwrap_or_default();
            Ok::<_, String>((head, told(&said)))
        });
        Ok(match answer.await {
            Ok(Ok((head, said))) => judged(head.status, &head.headers, said),
            Ok(Err(cause)) => Answer::Later { cause, after: None },
            Err(_) => Answer::Later {
                cause: format!("it did not answer within {} s", ANSWER_DEADLINE.as_secs()),
                after: None,
            },
        })
    }

    /// A record as a CloudEvent.
    fn event(&self, record: &Record) -> Result<Value, TargetError> {
        let data = line(record)?;
        let ResourceIdentity { namespace, name, .. } = &self.settings.pipeline;
        Ok(json!({
            "specversion": "1.0",
            "id": record.coordinate.to_string(),
            "source": format!("/meander/{namespace}/{name}"),
            "type": TYPE,
            "subject": &*record.topic,
            "time": data["commitTime"],
            "datacontenttype": "application/json",
            "replayjob": self.job,
            "replaytopic": &*record.topic,
            "replaypartition": record.partition,
            // An Integer of CloudEvents has 32 bits.
            "replayoffset": record.offset.to_string(),
            "data": data,
        }))
    }
}

/// What an answer means.
fn judged(status: StatusCode, headers: &HeaderMap, said: String) -> Answer {
    let cause = || format!("it answered {status} {said}").trim_end().to_owned();
    match status.as_u16() {
        200..300 => Answer::Taken,
        400 | 413 | 422 => Answer::Unfit(cause()),
        // A 409 says that the batch before, of the same key, is still being looked at.
        408 | 409 | 425 | 429 | 500.. => Answer::Later {
            cause: cause(),
            after: retry_after(headers, Timestamp::now()),
        },
        _ => Answer::Refused(status, said),
    }
}

/// How long to wait, by seconds or by a date.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = DateTimeParser::new().parse_timestamp(text).ok()?;
    Some(Duration::try_from(date.duration_since(now)).unwrap_or_default())
}

/// The beginning of what an endpoint says, in one line.
fn told(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(TOLD_CHARACTERS).collect()
}

/// The token is read anew for every request, since Kubernetes replaces it when its Secret changes.
fn bearer(file: &PathBuf) -> Result<HeaderValue, TargetError> {
    let unreadable = |cause: &dyn std::fmt::Display| TargetError::NoBearerToken {
        path: file.clone(),
        cause: cause.to_string(),
    };
    let token = fs::read_to_string(file).map_err(|error| unreadable(&error))?;
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim())).map_err(|error| unreadable(&error))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_whether_to_try_again_and_when() {
        let judge = |status: u16, after: &'static str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(after))]);
            judged(StatusCode::from_u16(status).unwrap(), &headers, String::new())
        };
        for status in [200, 202, 204] {
            assert!(matches!(judge(status, ""), Answer::Taken), "{status}");
        }
        for status in [400, 413, 422] {
            assert!(matches!(judge(status, ""), Answer::Unfit(_)), "{status}");
        }
        for status in [301, 401, 403, 404, 405, 410, 415] {
            assert!(matches!(judge(status, ""), Answer::Refused(..)), "{status}");
        }
        for status in [408, 409, 425, 429, 500, 502, 503, 504] {
            let Answer::Later { after, .. } = judge(status, "7") else {
                panic!("{status}")
            };
            assert_eq!(after, Some(Duration::from_secs(7)));
        }
        let now: Timestamp = "2026-11-20T10:00:00Z".parse().unwrap();
        let after = |text: &'static str| {
            retry_after(
                &HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]),
                now,
            )
        };
        assert_eq!(after("Fri, 20 Nov 2026 10:00:05 GMT"), Some(Duration::from_secs(5)));
        assert_eq!(after("Fri, 20 Nov 2026 09:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(after("soon"), None);
    }
}
