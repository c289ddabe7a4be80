//! The latest report of each resource, in memory.
//!
//! Only resources that a controller has seen have an entry, so memory is bounded by what is in the cluster.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use kube::runtime::reflector::ObjectRef;
use meander_crds::{CdcPipeline, ReplayJob};
use meander_proto::v1::{Directive, ProgressUpdate, progress_update::Progress};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use crate::conditions::PROGRESSING;

/// Reports lead to a reconcile at most this often, unless they say that a condition or a phase has changed.
const POKE_INTERVAL: Duration = crate::status::INTERVAL;
const POKES: usize = 1024;

/// The kinds that report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A `CdcPipeline`.
    CdcPipeline,
    /// A `ReplayJob`.
    ReplayJob,
}

impl Kind {
    /// As Kubernetes has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CdcPipeline => "CdcPipeline",
            Self::ReplayJob => "ReplayJob",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::CdcPipeline, Self::ReplayJob]
            .into_iter()
            .find(|kind| kind.as_str() == name)
    }
}

/// Names a resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResourceKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What is known of a resource's runtime.
#[derive(Clone, Debug)]
pub struct Observation {
    /// The latest report.
    pub report: Option<ProgressUpdate>,
    /// Time since the latest report or, before the first, since this operator first saw the resource or restarted its runtime.
    pub silence: Duration,
    /// Whether the runtime that gave that report is connected; before the first, whether any is.
    pub connected: bool,
    /// Time since the status was last written.
    pub since_written: Option<Duration>,
}

/// What those who follow a resource see.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    /// The full state; none before anybody knows it.
    pub update: Option<ProgressUpdate>,
    /// Nothing comes after it.
    pub last: bool,
}

impl Entry {
    fn connected(&self) -> bool {
        self.reporter
            .map_or(!self.streams.is_empty(), |reporter| self.streams.contains(&reporter))
    }
}

/// Names a connection of a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StreamId(u64);

#[derive(Debug)]
struct Entry {
    uid: String,
    /// When silence began, while there is no report.
    silent_from: Instant,
    report: Option<ProgressUpdate>,
    shown: watch::Sender<Shown>,
    reported: Option<Instant>,
    directive: watch::Sender<Option<Directive>>,
    /// The runtimes that are connected: the one that does the work, and perhaps one that stands by.
    streams: HashSet<StreamId>,
    /// Whose report it is.
    reporter: Option<StreamId>,
    poked: Option<Instant>,
    written: Option<Instant>,
    /// The resource's version after what this operator last wrote to it.
    version: Option<String>,
}

/// The latest report of each resource.
#[derive(Debug)]
pub struct Tracker {
    entries: Mutex<HashMap<ResourceKey, Entry>>,
    next_stream: AtomicU64,
    pipelines: mpsc::Sender<ObjectRef<CdcPipeline>>,
    replays: mpsc::Sender<ObjectRef<ReplayJob>>,
}

/// The resources that should be reconciled because of what their runtime reported.
#[derive(Debug)]
pub struct Pokes {
    /// Pipelines.
    pub pipelines: mpsc::Receiver<ObjectRef<CdcPipeline>>,
    /// Replays.
    pub replays: mpsc::Receiver<ObjectRef<ReplayJob>>,
}

impl Tracker {
    /// A tracker that knows nothing, and what it will ask to be reconciled.
    pub fn new() -> (Self, Pokes) {
        let (pipelines, pipeline_pokes) = mpsc::channel(POKES);
        let (replays, replay_pokes) = mpsc::channel(POKES);
        let tracker = Self {
            entries: Mutex::default(),
            next_stream: AtomicU64::default(),
            pipelines,
            replays,
        };
        (
            tracker,
            Pokes {
                pipelines: pipeline_pokes,
                replays: replay_pokes,
            },
        )
    }

    /// A controller has seen the resource; says what is known of its runtime.
    pub fn observe(&self, key: &ResourceKey, uid: &str) -> Observation {
        let mut entries = self.lock();
        if entries.get(key).is_some_and(|entry| entry.uid != uid) {
            retire(key, entries.remove(key));
        }
        let entry = entries.entry(key.clone()).or_insert_with(|| Entry {
            uid: uid.to_owned(),
            silent_from: Instant::now(),
            report: None,
            shown: watch::channel(Shown::default()).0,
            reported: None,
            directive: watch::channel(None).0,
            streams: HashSet::new(),
            reporter: None,
            poked: None,
            written: None,
            version: None,
        });
        Observation {
            report: entry.report.clone(),
            silence: entry.reported.unwrap_or(entry.silent_from).elapsed(),
            connected: entry.connected(),
            since_written: entry.written.map(|written| written.elapsed()),
        }
    }

    /// What the resource's spec asks of its runtime now. An older spec than the last one asks nothing: several tasks read it.
    pub fn direct(&self, key: &ResourceKey, uid: &str, directive: Directive) {
        if let Some(entry) = self.lock().get(key).filter(|entry| entry.uid == uid) {
            entry.directive.send_if_modified(|current| {
                let news = current
                    .as_ref()
                    .is_none_or(|current| *current != directive && current.generation <= directive.generation);
                if news {
                    *current = Some(directive);
                }
                news
            });
        }
    }

    /// Shows to those who follow the resource what its status says, where no runtime knows better.
    pub fn show(&self, key: &ResourceKey, status: ProgressUpdate) {
        if let Some(entry) = self.lock().get(key).filter(|entry| entry.report.is_none()) {
            entry.shown.send_if_modified(|shown| {
                let same = |update: &ProgressUpdate| {
                    (&update.conditions, &update.progress) == (&status.conditions, &status.progress)
                };
                let news = !shown.last && !shown.update.as_ref().is_some_and(same);
                if news {
                    shown.update = Some(status);
                }
                news
            });
        }
    }

    /// The resource has come to its end, as its status says: those who follow it are told, and need not wait for more.
    pub fn conclude(&self, key: &ResourceKey, status: ProgressUpdate) {
        if let Some(entry) = self.lock().get(key).filter(|entry| !entry.shown.borrow().last) {
            entry.shown.send_replace(Shown {
                update: Some(status),
                last: true,
            });
        }
    }

    /// The resource's runtime starts anew: what the last one said is past, and the next one has yet to speak.
    pub fn restarted(&self, key: &ResourceKey) {
        if let Some(entry) = self.lock().get_mut(key) {
            entry.report = None;
            entry.reporter = None;
            entry.reported = None;
            entry.silent_from = Instant::now();
        }
    }

    /// The resource's status has just been written.
    pub fn written(&self, key: &ResourceKey) {
        if let Some(entry) = self.lock().get_mut(key) {
            entry.written = Some(Instant::now());
        }
    }

    /// This operator has just written to the resource, which came to this version by that.
    pub fn wrote(&self, key: &ResourceKey, version: Option<String>) {
        if let Some(entry) = self.lock().get_mut(key) {
            entry.version = version;
        }
    }

    /// Whether a resource that was seen at this version shows all that this operator wrote to it. Versions of one kind are numbers that
    /// rise; what is none is not relied upon.
    pub fn wrote_nothing_after(&self, key: &ResourceKey, seen: Option<&str>) -> bool {
        let entries = self.lock();
        let Some(wrote) = entries.get(key).and_then(|entry| entry.version.as_deref()) else {
            return true;
        };
        let number = |version: &str| version.parse::<u64>().ok();
        seen == Some(wrote)
            || matches!((seen.and_then(number), number(wrote)), (Some(seen), Some(wrote)) if seen > wrote)
    }

    /// The resource is gone; its streams end.
    pub fn forget(&self, key: &ResourceKey) {
        retire(key, self.lock().remove(key));
    }

    /// The resources of this kind of which `is_there` does not know are gone.
    pub fn forget_missing(&self, kind: Kind, is_there: impl Fn(&ResourceKey) -> bool) {
        let gone = self
            .lock()
            .extract_if(|key, _| key.kind == kind && !is_there(key))
            .collect::<Vec<_>>();
        for (key, entry) in gone {
            retire(&key, Some(entry));
        }
    }

    /// A runtime has connected; what it is to be told. None for a resource that no controller has seen, or that was created
    /// again since.
    pub(super) fn connect(
        &self,
        key: &ResourceKey,
        uid: &str,
    ) -> Option<(StreamId, watch::Receiver<Option<Directive>>)> {
        let mut entries = self.lock();
        let entry = entries.get_mut(key).filter(|entry| entry.uid == uid)?;
        let stream = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        entry.streams.insert(stream);
        Some((stream, entry.directive.subscribe()))
    }

    /// A runtime has gone. What it measured is not true any more, so the resource is reconciled.
    pub(super) fn disconnect(&self, key: &ResourceKey, uid: &str, stream: StreamId) {
        if let Some(entry) = self.lock().get_mut(key).filter(|entry| entry.uid == uid) {
            entry.streams.remove(&stream);
            if !entry.connected() {
                self.poke(key);
            }
        }
    }

    /// Asks for a reconcile. False if that found no room: then reconciles are behind already.
    fn poke(&self, key: &ResourceKey) -> bool {
        match key.kind {
            Kind::CdcPipeline => self
                .pipelines
                .try_send(ObjectRef::new(&key.name).within(&key.namespace))
                .is_ok(),
            Kind::ReplayJob => self
                .replays
                .try_send(ObjectRef::new(&key.name).within(&key.namespace))
                .is_ok(),
        }
    }

    /// Follows the reports of a resource.
    pub(super) fn follow(&self, key: &ResourceKey) -> Option<watch::Receiver<Shown>> {
        self.lock().get(key).map(|entry| entry.shown.subscribe())
    }

    /// Keeps a report, and has the resource reconciled if that is due. False for a resource that is gone. What a runtime that stands by
    /// says is of no interest while another one is there that does the work.
    pub(super) fn accept(&self, key: &ResourceKey, uid: &str, stream: StreamId, update: ProgressUpdate) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(key).filter(|entry| entry.uid == uid) else {
            return false;
        };
        let counts = |last: &ProgressUpdate| !stands_by(&update) && (stands_by(last) || owner(&update) >= owner(last));
        if entry.reporter != Some(stream) && entry.connected() && !entry.report.as_ref().is_none_or(counts) {
            return true;
        }
        let now = Instant::now();
        let news = entry
            .report
            .as_ref()
            .is_none_or(|last| significant(last) != significant(&update));
        entry.shown.send_if_modified(|shown| {
            if !shown.last {
                shown.update = Some(update.clone());
            }
            !shown.last
        });
        entry.report = Some(update);
        entry.reporter = Some(stream);
        entry.reported = Some(now);
        // One that found no room is made up for by the next report.
        if (news || entry.poked.is_none_or(|poked| now - poked >= POKE_INTERVAL)) && self.poke(key) {
            entry.poked = Some(now);
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ResourceKey, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A replay that is gone delivers nothing more: its runtime hears of it before Kubernetes has ended its pod.
fn retire(key: &ResourceKey, entry: Option<Entry>) {
    if let (Kind::ReplayJob, Some(entry)) = (key.kind, entry) {
        entry.directive.send_modify(|directive| {
            directive.get_or_insert_default().cancel = true;
        });
    }
}

/// Whether the report is that of a capture that waits for another one to end.
fn stands_by(update: &ProgressUpdate) -> bool {
    let mut conditions = update.conditions.iter();
    conditions.any(|condition| condition.r#type == PROGRESSING && condition.reason == "Standby")
}

/// The generation of the owner whose report it is: a capture that owned the slot before may not know yet that another one does.
fn owner(update: &ProgressUpdate) -> u64 {
    match &update.progress {
        Some(Progress::Capture(capture)) => capture.owner_generation,
        _ => 0,
    }
}

/// What of a report must be in the status at once.
fn significant(update: &ProgressUpdate) -> (Vec<(&str, bool, &str)>, i32) {
    let conditions = update
        .conditions
        .iter()
        .map(|c| (c.r#type.as_str(), c.status, c.reason.as_str()))
        .collect();
    let phase = match &update.progress {
        Some(Progress::Replay(replay)) => replay.phase,
        _ => 0,
    };
    (conditions, phase)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use meander_proto::v1::{CaptureProgress, Condition};

    fn report(reason: &str) -> ProgressUpdate {
        let condition = Condition {
            reason: reason.to_owned(),
            ..Condition::default()
        };
        ProgressUpdate {
            conditions: vec![condition],
            ..ProgressUpdate::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_asks_for_a_reconcile_when_it_is_news_or_a_status_is_due() {
        let (tracker, mut pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::CdcPipeline,
            namespace: "ns".into(),
            name: "p".into(),
        };
        assert!(tracker.connect(&key, "uid").is_none(), "no controller has seen it");
        tracker.observe(&key, "uid");
        let (stream, _) = tracker.connect(&key, "uid").unwrap();
        let mut poked = |reason| {
            assert!(tracker.accept(&key, "uid", stream, report(reason)));
            pokes.pipelines.try_recv().is_ok()
        };
        assert!(poked("A"));
        assert!(!poked("A"));
        assert!(poked("B"));
        tokio::time::advance(POKE_INTERVAL).await;
        assert!(poked("B"));
    }

    #[test]
    fn a_replay_that_is_gone_is_forgotten_and_its_runtime_told_to_end() {
        let (tracker, _pokes) = Tracker::new();
        let key = |name: &str| ResourceKey {
            kind: Kind::ReplayJob,
            namespace: "ns".into(),
            name: name.into(),
        };
        let [stays, goes] = ["stays", "goes"].map(|name| {
            tracker.observe(&key(name), "uid");
            tracker.connect(&key(name), "uid").unwrap().1
        });
        tracker.forget_missing(Kind::CdcPipeline, |_| false);
        tracker.forget_missing(Kind::ReplayJob, |key| key.name == "stays");
        let cancelled =
            |orders: &watch::Receiver<Option<Directive>>| orders.borrow().as_ref().is_some_and(|order| order.cancel);
        assert!(cancelled(&goes) && !cancelled(&stays));
        assert!(tracker.connect(&key("goes"), "uid").is_none() && tracker.connect(&key("stays"), "uid").is_some());
    }

    #[test]
    fn what_was_seen_counts_only_if_it_is_not_older_than_what_was_written() {
        let (tracker, _pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::CdcPipeline,
            namespace: "ns".into(),
            name: "p".into(),
        };
        assert!(tracker.wrote_nothing_after(&key, Some("9")), "nothing was written");
        tracker.observe(&key, "uid");
        tracker.wrote(&key, Some("10".into()));
        for (seen, enough) in [("9", false), ("10", true), ("11", true), ("x", false)] {
            assert_eq!(tracker.wrote_nothing_after(&key, Some(seen)), enough, "{seen}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_the_last_report_and_a_new_uid_starts_anew() {
        let (tracker, _pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::ReplayJob,
            namespace: "ns".into(),
            name: "r".into(),
        };
        tracker.observe(&key, "uid");
        tokio::time::advance(Duration::from_secs(40)).await;
        assert_eq!(tracker.observe(&key, "uid").silence, Duration::from_secs(40));
        let (stream, _) = tracker.connect(&key, "uid").unwrap();
        tracker.accept(&key, "uid", stream, report("A"));
        let seen = tracker.observe(&key, "uid");
        assert_eq!(seen.silence, Duration::ZERO);
        assert!(seen.report.is_some());
        assert!(tracker.observe(&key, "another").report.is_none());
        let late = tracker.accept(&key, "uid", stream, report("A"));
        assert!(!late, "it speaks of the one before");
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_starts_anew_has_its_time_to_speak() {
        let (tracker, _pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::CdcPipeline,
            namespace: "ns".into(),
            name: "p".into(),
        };
        tracker.observe(&key, "uid");
        let (stream, _) = tracker.connect(&key, "uid").unwrap();
        tracker.accept(&key, "uid", stream, report("A"));
        tokio::time::advance(Duration::from_secs(40)).await;
        tracker.restarted(&key);
        let seen = tracker.observe(&key, "uid");
        assert_eq!((seen.silence, seen.report), (Duration::ZERO, None));
    }

    #[tokio::test]
    async fn who_stands_by_is_heard_when_nobody_else_captures() {
        let (tracker, mut pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::CdcPipeline,
            namespace: "ns".into(),
            name: "p".into(),
        };
        let saying = |reason: &str| {
            let mut report = report(reason);
            report.conditions[0].r#type = PROGRESSING.to_owned();
            report
        };
        tracker.observe(&key, "uid");
        let (owner, _) = tracker.connect(&key, "uid").unwrap();
        let (standby, _) = tracker.connect(&key, "uid").unwrap();
        let shown = || {
            let seen = tracker.observe(&key, "uid");
            (seen.report.unwrap().conditions[0].reason.clone(), seen.connected)
        };
        assert!(tracker.accept(&key, "uid", standby, saying("Standby")));
        assert_eq!(
            shown(),
            ("Standby".to_owned(), true),
            "as long as nobody else has spoken"
        );
        assert!(tracker.accept(&key, "uid", owner, saying("Streaming")));
        assert!(tracker.accept(&key, "uid", standby, saying("Standby")));
        assert_eq!(shown(), ("Streaming".to_owned(), true));
        while pokes.pipelines.try_recv().is_ok() {}
        tracker.disconnect(&key, "uid", owner);
        assert_eq!(
            shown(),
            ("Streaming".to_owned(), false),
            "nobody vouches for it any more"
        );
        assert!(pokes.pipelines.try_recv().is_ok());
        assert!(tracker.accept(&key, "uid", standby, saying("Streaming")));
        assert_eq!(shown(), ("Streaming".to_owned(), true));
        tracker.disconnect(&key, "uid", standby);
        assert_eq!(shown(), ("Streaming".to_owned(), false));
    }

    #[tokio::test]
    async fn who_owned_the_slot_before_says_nothing_of_it_while_its_owner_is_there() {
        let (tracker, _pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::CdcPipeline,
            namespace: "ns".into(),
            name: "p".into(),
        };
        let owned = |owner_generation| ProgressUpdate {
            progress: Some(Progress::Capture(CaptureProgress {
                owner_generation,
                ..CaptureProgress::default()
            })),
            ..ProgressUpdate::default()
        };
        tracker.observe(&key, "uid");
        let (before, _) = tracker.connect(&key, "uid").unwrap();
        let (after, _) = tracker.connect(&key, "uid").unwrap();
        let shown = |stream, generation| {
            assert!(tracker.accept(&key, "uid", stream, owned(generation)));
            owner(&tracker.observe(&key, "uid").report.unwrap())
        };
        let said = [(before, 3), (after, 4), (before, 3), (after, 4), (before, 5)];
        assert_eq!(
            said.map(|(stream, generation)| shown(stream, generation)),
            [3, 4, 4, 4, 5]
        );
        tracker.disconnect(&key, "uid", before);
        assert_eq!(shown(after, 4), 4, "nobody else is there");
    }

    #[tokio::test]
    async fn a_directive_is_sent_when_it_changes() {
        let (tracker, mut pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::ReplayJob,
            namespace: "ns".into(),
            name: "r".into(),
        };
        tracker.observe(&key, "uid");
        let (stream, mut told) = tracker.connect(&key, "uid").unwrap();
        let directive = Directive {
            speed: "10".into(),
            ..Directive::default()
        };
        tracker.direct(&key, "uid", directive.clone());
        assert_eq!(told.borrow_and_update().clone(), Some(directive.clone()));
        let older = Directive {
            generation: directive.generation - 1,
            ..Directive::default()
        };
        tracker.direct(&key, "uid", directive.clone());
        tracker.direct(&key, "uid", older);
        tracker.direct(&key, "another", Directive::default());
        assert!(!told.has_changed().unwrap());
        assert!(tracker.observe(&key, "uid").connected);
        tracker.disconnect(&key, "uid", stream);
        assert!(!tracker.observe(&key, "uid").connected);
        assert!(pokes.replays.try_recv().is_ok(), "a runtime that hangs up is news");
        tracker.forget(&key);
        assert_eq!(
            told.borrow_and_update().clone(),
            Some(Directive {
                cancel: true,
                ..directive
            }),
            "what is deleted ends at once"
        );
    }

    #[tokio::test]
    async fn who_follows_sees_the_status_until_a_runtime_knows_better_and_then_the_end() {
        let (tracker, _pokes) = Tracker::new();
        let key = ResourceKey {
            kind: Kind::ReplayJob,
            namespace: "ns".into(),
            name: "r".into(),
        };
        tracker.observe(&key, "uid");
        let followed = tracker.follow(&key).unwrap();
        let seen = || {
            let shown = followed.borrow().clone();
            (shown.update, shown.last)
        };
        assert_eq!(seen(), (None, false));
        tracker.show(&key, report("Waiting"));
        assert_eq!(seen(), (Some(report("Waiting")), false));
        let (stream, _) = tracker.connect(&key, "uid").unwrap();
        tracker.accept(&key, "uid", stream, report("Replaying"));
        tracker.show(&key, report("Waiting"));
        assert_eq!(seen(), (Some(report("Replaying")), false));
        tracker.conclude(&key, report("Delivered"));
        tracker.accept(&key, "uid", stream, report("Replaying"));
        assert_eq!(seen(), (Some(report("Delivered")), true));
    }
}
