//! Replays to an HTTP endpoint that takes CloudEvents.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/replay.rs"]
mod replaying;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    io::BufReader,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use common::LIMIT;
use meander_config::{CaptureConfig, Format, HttpEndpoint, ReplayConfig, ReplayTarget, Speed};
use meander_runtime::{
    log::{PART_HEADER, POSITION_HEADER, dead_letters_topic},
    replay::End,
};
use meander_test_support::{Authority, Identity, Kafka, Runtime, eventually, free_address};
use rdkafka::{Message as _, message::Headers as _};
use replaying::{everything, recorded, replay};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

const KILLS: usize = 3;

/// Answers a post, before its events are noted; none to take it.
type Decide = Box<dyn Fn(usize, &HeaderMap, &[Value]) -> Option<Response> + Send + Sync>;

/// What came to the endpoint.
struct Endpoint {
    decide: Decide,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    posts: usize,
    keys: Vec<String>,
    attempts: Vec<usize>,
    /// Those that were taken, in the order in which they came.
    events: Vec<Value>,
}

impl Endpoint {
    fn new(decide: impl Fn(usize, &HeaderMap, &[Value]) -> Option<Response> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            decide: Box::new(decide),
            seen: Mutex::default(),
        })
    }

    fn router(self: &Arc<Self>) -> Router {
        Router::new().route("/changes", post(take)).with_state(Arc::clone(self))
    }

    async fn serve(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}/changes")
    }

    fn count(&self) -> usize {
        self.seen.lock().unwrap().events.len()
    }
}

async fn take(State(endpoint): State<Arc<Endpoint>>, headers: HeaderMap, body: Bytes) -> Response {
    assert_eq!(
        headers[header::CONTENT_TYPE],
        "application/cloudevents-batch+json; charset=utf-8"
    );
    let events: Vec<Value> = serde_json::from_slice(&body).unwrap();
    let mut seen = endpoint.seen.lock().unwrap();
    seen.posts += 1;
    seen.keys.push(headers["idempotency-key"].to_str().unwrap().to_owned());
    let attempt = headers["meander-replay-attempt"].to_str().unwrap();
    seen.attempts.push(attempt.parse().unwrap());
    if let Some(answer) = (endpoint.decide)(seen.posts, &headers, &events) {
        return answer;
    }
    seen.events.extend(events);
    StatusCode::ACCEPTED.into_response()
}

fn into_endpoint(pipeline: &CaptureConfig, url: String) -> ReplayConfig {
    let endpoint = HttpEndpoint {
        url,
        token_file: None,
        ca_file: None,
    };
    everything(pipeline, ReplayTarget::Http(endpoint))
}

/// The ids of everything in the log, in commit order.
fn ids(kafka: &Kafka, topics: &[String]) -> Vec<String> {
    let mut ids = BTreeMap::new();
    for topic in topics {
        for (position, part, _) in read(kafka, topic) {
            let at: meander_runtime::position::Position = position.parse().unwrap();
            ids.insert((at, part), format!("{position}#{part}"));
        }
    }
    ids.into_values().collect()
}

/// Position, part and headers of everything that a `read_committed` consumer sees of a topic.
fn read(kafka: &Kafka, topic: &str) -> Vec<(String, u32, BTreeMap<String, String>)> {
    let mut found = Vec::new();
    kafka.read(
        |name| name == topic,
        |message| {
            let headers = message.headers().unwrap().iter();
            let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
            let headers: BTreeMap<_, _> = headers
                .map(|header| (header.key.to_owned(), text(header.value)))
                .collect();
            let part = headers.get(PART_HEADER).map_or(0, |part| part.parse().unwrap());
            found.push((headers[POSITION_HEADER].clone(), part, headers));
        },
    );
    found
}

fn topics(pipeline: &CaptureConfig) -> Vec<String> {
    ["trades", "orders", "last"]
        .map(|table| format!("{}.public.{table}", pipeline.kafka.topic_prefix))
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_over_http_delivers_everything_in_order_through_three_kills_and_repeats_little() {
    let kafka = Kafka::shared().await;
    let (pipeline, records) = recorded(kafka, None, Format::Protobuf).await;
    let records = usize::try_from(records).unwrap();
    let endpoint = Endpoint::new(|_, _, _| None);
    let mut config = into_endpoint(&pipeline, endpoint.serve().await);
    config.speed = Speed::Factor(0.5);
    let mut runtime = Runtime::replay(&config);
    for kill in 1..=KILLS {
        let wanted = records * kill / (KILLS + 1);
        eventually("events flow", LIMIT, async || match endpoint.count() {
            count if count >= wanted => Ok(()),
            count => Err(format!("{count} of {records}")),
        })
        .await;
        runtime.kill9();
        println!("kill {kill} after {} of {records} records", endpoint.count());
        runtime.start_again();
    }
    let status = runtime.process().wait(LIMIT);
    assert!(status.success(), "{}", runtime.process().log_tail());

    let seen = endpoint.seen.lock().unwrap();
    println!(
        "{} events in {} posts for {records} records",
        seen.events.len(),
        seen.posts
    );
    let mut known = HashSet::new();
    let first: Vec<&str> = (seen.events.iter().map(|event| event["id"].as_str().unwrap()))
        .filter(|id| known.insert(*id))
        .collect();
    assert_eq!(first, ids(kafka, &topics(&pipeline)));
    assert!(seen.events.len() < 2 * records, "each process began at the beginning");
    assert!(
        seen.attempts.is_sorted() && seen.attempts[0] == 1,
        "{:?}",
        seen.attempts
    );
    assert!(seen.attempts.last() > Some(&KILLS), "{:?}", seen.attempts);
    let event = &seen.events[0];
    let (name, topic) = (&pipeline.pipeline.name, event["subject"].as_str().unwrap());
    assert!(topics(&pipeline).iter().any(|known| known == topic), "{event}");
    for (field, value) in [
        ("specversion", "1.0".to_owned()),
        ("type", "dev.meander.change".to_owned()),
        ("source", format!("/meander/test/{name}")),
        ("datacontenttype", "application/json".to_owned()),
        ("replayjob", format!("test/{}/42", config.job.name)),
        ("replaytopic", topic.to_owned()),
        ("replayoffset", "0".to_owned()),
    ] {
        assert_eq!(event[field], value, "{event}");
    }
    assert_eq!(event["data"]["operation"], "INSERT", "{event}");
    assert_eq!(event["time"], event["data"]["commitTime"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_is_tried_again_and_what_is_not_taken_is_kept() {
    let kafka = Kafka::shared().await;
    let (pipeline, _) = recorded(kafka, None, Format::Protobuf).await;
    let of = |event: &Value, id: u64| event["data"]["table"] == "orders" && event["data"]["key"]["id"] == id;
    let unfit = move |event: &Value| of(event, 7) || of(event, 1400);
    let endpoint = Endpoint::new(move |post, _, events| {
        let answer = |status: u16| Some(StatusCode::from_u16(status).unwrap().into_response());
        match post {
            1 => Some((StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")]).into_response()),
            2 => answer(429),
            3 => answer(500),
            _ if events.iter().any(unfit) => {
                Some((StatusCode::UNPROCESSABLE_ENTITY, "no such\n order").into_response())
            }
            _ => None,
        }
    });
    let config = into_endpoint(&pipeline, endpoint.serve().await);
    assert_eq!(replay(&config).await.unwrap(), End::Complete);
    let letters = read(kafka, &dead_letters_topic("test", &config.job.name));
    let seen = endpoint.seen.lock().unwrap();
    assert_eq!(seen.keys[..3], [&seen.keys[0][..]; 3], "the same batch, the same key");
    let kept: BTreeSet<String> = letters
        .iter()
        .map(|(position, part, _)| format!("{position}#{part}"))
        .collect();
    // One is inserted, changed twice and deleted, the other only inserted.
    assert_eq!(kept.len(), 5, "{kept:?}");
    for (_, _, headers) in &letters {
        assert_eq!(
            headers["meander-replay-refusal"],
            "it answered 422 Unprocessable Entity no such order"
        );
        assert_eq!(
            headers["meander-replay-topic"],
            format!("{}.public.orders", pipeline.kafka.topic_prefix)
        );
        assert_eq!(headers["meander-replay-job"], format!("test/{}/42", config.job.name));
    }
    let taken: Vec<String> = seen
        .events
        .iter()
        .map(|event| event["id"].as_str().unwrap().to_owned())
        .collect();
    let expected: Vec<String> = (ids(kafka, &topics(&pipeline)).into_iter())
        .filter(|id| !kept.contains(id))
        .collect();
    assert_eq!(taken, expected, "everything else, once, in its order");
}

/// A listener that speaks TLS.
struct Secure {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Secure {
    async fn bind(identity: &Identity) -> Self {
        let pem = |file: &PathBuf| BufReader::new(fs::File::open(file).unwrap());
        let chain = CertificateDer::pem_reader_iter(pem(&identity.certificate_file))
            .map(Result::unwrap)
            .collect();
        let key = PrivateKeyDer::from_pem_reader(pem(&identity.key_file)).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Self {
            listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            acceptor: TlsAcceptor::from(Arc::new(config)),
        }
    }
}

impl axum::serve::Listener for Secure {
    type Addr = SocketAddr;
    type Io = TlsStream<TcpStream>;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, address) = self.listener.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_shown_the_token_over_tls_and_one_that_refuses_the_caller_ends_the_replay() {
    let kafka = Kafka::shared().await;
    let (pipeline, records) = recorded(kafka, None, Format::Protobuf).await;
    let authority = Authority::new();
    let endpoint = Endpoint::new(|_, headers, _| {
        let admitted = headers
            .get(header::AUTHORIZATION)
            .is_some_and(|token| token == "Bearer of-the-replay");
        (!admitted).then(|| (StatusCode::UNAUTHORIZED, "who are you?").into_response())
    });
    let listener = Secure::bind(&authority.server(&["localhost"])).await;
    let port = listener.listener.local_addr().unwrap().port();
    let router = endpoint.router();
    tokio::spawn(async move { axum::serve(listener, router).await });

    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    fs::write(&token_file, "another").unwrap();
    let secure = HttpEndpoint {
        url: format!("https://localhost:{port}/changes"),
        token_file: Some(token_file.clone()),
        ca_file: Some(authority.file()),
    };
    let error = replay(&everything(&pipeline, ReplayTarget::Http(secure.clone())))
        .await
        .unwrap_err();
    println!("{error}");
    assert_eq!(error.reason(), "EndpointRefused");
    assert!(
        error.is_permanent()
            && error.to_string().contains("401 Unauthorized")
            && error.to_string().contains("who are you?"),
        "{error}"
    );
    assert!(!error.to_string().contains("another"), "{error}");
    fs::write(&token_file, "of-the-replay\n").unwrap();
    assert_eq!(
        replay(&everything(&pipeline, ReplayTarget::Http(secure)))
            .await
            .unwrap(),
        End::Complete
    );
    assert_eq!(endpoint.count(), usize::try_from(records).unwrap());

    let nothing = into_endpoint(&pipeline, format!("http://{}/nothing", endpoint_without_routes().await));
    let error = replay(&nothing).await.unwrap_err();
    assert!(
        error.is_permanent() && error.to_string().contains("404 Not Found"),
        "{error}"
    );
}

async fn endpoint_without_routes() -> SocketAddr {
    let listener = TcpListener::bind(free_address()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new()).await });
    address
}
