//! A `ReplayReceiver` that judges what it is sent: order, duplicates, pace.

use std::{collections::HashSet, net::SocketAddr, pin::Pin, time::Instant};

use anyhow::Context as _;
use meander_proto::v1::{
    Coordinate, DeliverAck, ReplayEvent,
    replay_receiver_server::{self, ReplayReceiver, ReplayReceiverServer},
};
use serde::Serialize;
use tokio::{net::TcpListener, signal::unix, sync::mpsc};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Records between two lines of progress.
const PROGRESS: u64 = 1000;

/// Serves until SIGTERM or SIGINT, and prints a [`Summary`] at the end of each replay.
///
/// # Errors
/// When the port cannot be had.
pub async fn serve(listen: SocketAddr, speed: Option<f64>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    println!("listening on {}", listener.local_addr()?);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ReplayReceiverServer<Receiver>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(meander_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(replay_receiver_server::SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health")
        .build_v1()?;
    let mut terminate = unix::signal(unix::SignalKind::terminate())?;
    let mut interrupt = unix::signal(unix::SignalKind::interrupt())?;
    Server::builder()
        .add_service(ReplayReceiverServer::new(Receiver { speed }))
        .add_service(health_service)
        .add_service(reflection)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await?;
    Ok(())
}

struct Receiver {
    speed: Option<f64>,
}

#[tonic::async_trait]
impl ReplayReceiver for Receiver {
    type DeliverStream = Pin<Box<dyn Stream<Item = Result<DeliverAck, Status>> + Send>>;

    async fn deliver(&self, request: Request<Streaming<ReplayEvent>>) -> Result<Response<Self::DeliverStream>, Status> {
        let mut events = request.into_inner();
        let mut replay = Replay::new(self.speed);
        // A replay waits for its answers, so there are never many.
        let (answers, answered) = mpsc::channel(16);
        tokio::spawn(async move {
            let ending = loop {
                match events.message().await {
                    Ok(Some(event)) => {
                        let answer = replay.take(&event, Instant::now());
                        let refused = answer.is_err();
                        if answers.send(answer).await.is_err() || refused {
                            break Some("broken off".to_owned());
                        }
                    }
                    Ok(None) => break None,
                    Err(status) => break Some(status.message().to_owned()),
                }
            };
            print(&replay.summary(ending));
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answered))))
    }
}

fn print(summary: &Summary) {
    match serde_json::to_string(summary) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("error: {error}"),
    }
}

/// One stream, from its first record on.
pub struct Replay {
    speed: Option<f64>,
    records: u64,
    duplicates: u64,
    out_of_order: u64,
    seen: HashSet<Place>,
    last: Option<Place>,
    pace: Option<Pace>,
    pacing_errors: Vec<f64>,
}

/// Epoch, commit LSN, ordinal, part.
type Place = (u32, u64, u64, u32);

struct Pace {
    first: Instant,
    last: Instant,
    first_commit: i64,
    /// The greatest so far: commit times can run backwards by a little.
    last_commit: i64,
}

impl Pace {
    fn wall(&self) -> f64 {
        (self.last - self.first).as_secs_f64()
    }

    fn commit_span(&self) -> f64 {
        (self.last_commit - self.first_commit) as f64 / 1e6
    }
}

impl Replay {
    /// Nothing has arrived yet. With a speed, the distance of each arrival from its due time is judged.
    #[must_use]
    pub fn new(speed: Option<f64>) -> Self {
        Self {
            speed,
            records: 0,
            duplicates: 0,
            out_of_order: 0,
            seen: HashSet::new(),
            last: None,
            pace: None,
            pacing_errors: Vec::new(),
        }
    }

    /// Takes one message; gives the answer to it.
    ///
    /// # Errors
    /// When a record has no coordinate.
    pub fn take(&mut self, event: &ReplayEvent, now: Instant) -> Result<DeliverAck, Status> {
        for record in &event.records {
            let coordinate = record
                .coordinate
                .as_ref()
                .ok_or_else(|| Status::invalid_argument("a record has no coordinate"))?;
            let place = place(coordinate);
            if !self.seen.insert(place) {
                self.duplicates += 1;
            } else if self.last.is_some_and(|last| place < last) {
                self.out_of_order += 1;
            }
            self.last = self.last.max(Some(place));
            self.pace(record.commit_time_micros, now);
            self.records += 1;
            if self.records.is_multiple_of(PROGRESS) {
                println!("{} records, up to {}", self.records, position(coordinate));
            }
        }
        Ok(DeliverAck {
            resume_token: event.resume_token.clone(),
        })
    }

    fn pace(&mut self, commit: i64, now: Instant) {
        let pace = self.pace.get_or_insert(Pace {
            first: now,
            last: now,
            first_commit: commit,
            last_commit: commit,
        });
        pace.last = now;
        pace.last_commit = pace.last_commit.max(commit);
        if let Some(speed) = self.speed {
            self.pacing_errors
                .push((pace.wall() - pace.commit_span() / speed).abs() * 1e3);
        }
    }

    /// What is to be said of it at its end.
    #[must_use]
    pub fn summary(mut self, error: Option<String>) -> Summary {
        self.pacing_errors.sort_by(f64::total_cmp);
        let wall = self.pace.as_ref().map_or(0.0, Pace::wall);
        let commit_span = self.pace.as_ref().map_or(0.0, Pace::commit_span);
        Summary {
            records: self.records,
            order_ok: self.out_of_order == 0 && self.duplicates == 0,
            out_of_order: self.out_of_order,
            duplicates: self.duplicates,
            first_commit_micros: self.pace.as_ref().map(|pace| pace.first_commit),
            last_commit_micros: self.pace.as_ref().map(|pace| pace.last_commit),
            commit_span_seconds: commit_span,
            wall_seconds: wall,
            ratio: (wall > 0.0).then(|| commit_span / wall),
            pacing_error_ms: PacingError::of(&self.pacing_errors),
            error,
        }
    }
}

/// One replay, as one line of JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// How many arrived.
    pub records: u64,
    /// Each position was greater than the one before it.
    pub order_ok: bool,
    /// Records before which a greater position arrived.
    pub out_of_order: u64,
    /// Records that had arrived before.
    pub duplicates: u64,
    /// Commit time of the first record, in microseconds since the Unix epoch.
    pub first_commit_micros: Option<i64>,
    /// The greatest commit time.
    pub last_commit_micros: Option<i64>,
    /// From the first to the last commit.
    pub commit_span_seconds: f64,
    /// From the first to the last arrival.
    pub wall_seconds: f64,
    /// The speed that this comes to.
    pub ratio: Option<f64>,
    /// How far arrivals were from their due times, if a speed is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pacing_error_ms: Option<PacingError>,
    /// Why the stream ended, if not in good order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Milliseconds between due and actual arrival, counted from the first record.
#[derive(Debug, PartialEq, Serialize)]
pub struct PacingError {
    /// Half of the records were this near.
    pub p50: f64,
    /// All but one of a hundred.
    pub p99: f64,
    /// The farthest.
    pub max: f64,
}

impl PacingError {
    fn of(sorted: &[f64]) -> Option<Self> {
        let at = |percent: usize| {
            sorted
                .get((sorted.len() * percent).div_ceil(100).saturating_sub(1))
                .copied()
        };
        Some(Self {
            p50: at(50)?,
            p99: at(99)?,
            max: at(100)?,
        })
    }
}

fn place(coordinate: &Coordinate) -> Place {
    (
        coordinate.epoch,
        coordinate.commit_lsn,
        coordinate.ordinal,
        coordinate.part,
    )
}

/// `epoch:X/Y:ordinal`, as everywhere else.
#[must_use]
pub fn position(coordinate: &Coordinate) -> String {
    let Coordinate {
        epoch,
        commit_lsn,
        ordinal,
        ..
    } = coordinate;
    format!(
        "{epoch}:{:X}/{:X}:{ordinal}",
        commit_lsn >> 32,
        commit_lsn & 0xFFFF_FFFF
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use meander_proto::v1::ReplayedRecord;

    use super::*;

    fn event((epoch, commit_lsn, ordinal, part): Place, commit_time_micros: i64) -> ReplayEvent {
        let coordinate = Coordinate {
            epoch,
            commit_lsn,
            ordinal,
            part,
        };
        let record = ReplayedRecord {
            coordinate: Some(coordinate),
            commit_time_micros,
            ..Default::default()
        };
        ReplayEvent {
            records: vec![record],
            resume_token: format!("after {}", position(&coordinate)),
            topics: vec!["shop.public.trades".to_owned()],
        }
    }

    fn replay(places: &[Place]) -> Summary {
        let mut replay = Replay::new(None);
        for place in places {
            replay.take(&event(*place, 0), Instant::now()).unwrap();
        }
        replay.summary(None)
    }

    #[test]
    fn a_replay_in_commit_order_is_in_order() {
        let summary = replay(&[
            (1, 0xA0, 0, 0),
            (1, 0xA0, 1, 0),
            (1, 0xA0, 1, 1),
            (1, 0xB0, 0, 0),
            (2, 0x10, 0, 0),
        ]);
        assert_eq!((summary.records, summary.order_ok, summary.duplicates), (5, true, 0));
    }

    #[test]
    fn duplicates_and_disorder_are_told_apart() {
        let summary = replay(&[(1, 0xA0, 0, 0), (1, 0xC0, 0, 0), (1, 0xB0, 0, 0), (1, 0xC0, 0, 0)]);
        assert_eq!(
            (summary.order_ok, summary.out_of_order, summary.duplicates),
            (false, 1, 1)
        );
    }

    #[test]
    fn each_message_is_answered_with_its_own_token() {
        let answer = Replay::new(None)
            .take(&event((1, 0x7_0000_00A0, 3, 0), 0), Instant::now())
            .unwrap();
        assert_eq!(answer.resume_token, "after 1:7/A0:3");
        let nameless = ReplayEvent {
            records: vec![ReplayedRecord::default()],
            ..Default::default()
        };
        assert!(Replay::new(None).take(&nameless, Instant::now()).is_err());
    }

    #[test]
    fn the_pace_is_judged_from_the_first_record_on() {
        let mut replay = Replay::new(Some(10.0));
        let start = Instant::now();
        // Due after 0, 100 and 200 ms.
        for (commit_lsn, commit_seconds, arrival_ms) in [(5, 5, 0), (6, 6, 101), (7, 7, 204)] {
            let event = event((1, commit_lsn, 0, 0), commit_seconds * 1_000_000);
            replay.take(&event, start + Duration::from_millis(arrival_ms)).unwrap();
        }
        let summary = replay.summary(None);
        let error = summary.pacing_error_ms.unwrap();
        assert!(
            (error.p50 - 1.0).abs() < 1e-6 && (error.max - 4.0).abs() < 1e-6,
            "{error:?}"
        );
        assert!((summary.ratio.unwrap() - 2.0 / 0.204).abs() < 1e-6);
    }
}
