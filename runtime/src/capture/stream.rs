//! The loop that turns the replication stream into batches.

pub(super) mod bulk;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use meander_config::{CaptureConfig, OnOversizedRow};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::bulk::Bulk;
use crate::{
    batch::{Batch, Destination, Oversized},
    capture::{
        CaptureError,
        heartbeat::{self, Heartbeats},
        messages::Messages,
        observe::Inflight,
        snapshot::Incremental,
        status::Received,
        versions::Versions,
    },
    encode::{Encoder, oversized},
    log::{Checkpoint, topic_name},
    position::{Lsn, Position},
    schema::{SchemaChange, TableSchema},
    sink::{
        SinkError,
        queue::{Queue, Room},
        redis::live::Offers,
        topics::Topics,
    },
    size_limit::room_for,
    source::{
        Change, Operation, Relation, Snapshot,
        postgres::{
            assemble::{Assembled, Assembler},
            details::TableDetails,
            dropped::{DROPPED_PREFIX, told},
            hypertable::{Hypertable, is_chunk},
            pgoutput::{LogicalMessage, RelationMessage, decode},
            preflight::{Catalog, Selection, SourceError, stream_failure},
            snapshot::{
                chunks::{Answer, Chunk},
                overlap::Again,
                shape::Shape,
            },
            wire::{Frame, FrameReader, WireError},
        },
    },
};

/// A change of so many bytes may be more than its topic takes of one record, and no less can where the topic takes what Kafka does by default.
const LARGE_CHANGE: usize = 32 * 1024;
/// A change is late when the server sends it so long after its commit, by its own clock.
const LATE_MICROS: i64 = 1_000_000;

/// Where every batch goes: Kafka, which is waited for, and Redis, if there is one, which is waited for a moment.
pub(super) struct Queues {
    pub(super) kafka: Queue,
    pub(super) redis: Option<Offers>,
}

impl Queues {
    /// Waits until there is room for a batch as large as this. Cancel safe.
    async fn room(&self, batch: &Batch) -> Room {
        let room = self.kafka.room(batch).await;
        if let Some(redis) = &self.redis {
            redis.room(batch).await;
        }
        room
    }

    /// Hands a batch on. False when Kafka has ended, which the session learns by itself.
    fn take(&self, batch: Batch, room: Room) -> bool {
        let batch = Arc::new(batch);
        if let Some(redis) = &self.redis {
            redis.offer(&batch);
        }
        self.kafka.put(batch, room)
    }
}

/// The state of the loop.
pub(super) struct Stream<'a> {
    config: &'a CaptureConfig,
    assembler: Assembler,
    encoder: Box<dyn Encoder>,
    topics: Topics,
    selection: Selection,
    messages: Messages,
    /// Tables that an external publication holds and the globs do not: counted, and not captured.
    left_out: HashSet<u32>,
    /// Topics that have to be there before the next change of a table, by its OID, with its name. A partition of a table that is captured
    /// as one is described like the others, and has no changes of its own.
    topics_due: HashMap<u32, (String, String)>,
    /// The last change in Kafka when the session started; what comes up to there is known.
    published: Option<Position>,
    received: Received,
    inflight: Inflight,
    batch: Batch,
    batches: u64,
    high_time_micros: i64,
    complete: Option<Position>,
    safe: Lsn,
    heartbeats: Heartbeats,
    ownerless: watch::Sender<Option<String>>,
    /// The last thing that was complete when the session started: heartbeats up to there are known.
    known_complete: Option<Position>,
    /// When the heartbeat was written that the batch acknowledges.
    heartbeat: Option<i64>,
    /// The transaction that is read, or was read last, was sent long after its commit.
    is_late: bool,
    /// The batch says something that the one before did not.
    news: bool,
    snapshot: Option<Incremental>,
    versions: Versions,
    bulk: Option<Bulk>,
}

impl<'a> Stream<'a> {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        config: &'a CaptureConfig,
        assembler: Assembler,
        encoder: Box<dyn Encoder>,
        mut topics: Topics,
        selection: Selection,
        checkpoint: &Checkpoint,
        received: Received,
        inflight: Inflight,
        heartbeats: Heartbeats,
        ownerless: watch::Sender<Option<String>>,
        snapshot: Option<Incremental>,
        versions: Versions,
        bulk: Option<Bulk>,
    ) -> Self {
        let messages = Messages::new(config, &mut topics);
        Self {
            config,
            assembler,
            encoder,
            topics,
            selection,
            messages,
            left_out: HashSet::new(),
            topics_due: HashMap::new(),
            published: checkpoint.published,
            received,
            inflight,
            batch: Batch::new(),
            batches: 0,
            high_time_micros: checkpoint.high_time_micros,
            complete: None,
            safe: Lsn::ZERO,
            heartbeats,
            ownerless,
            known_complete: checkpoint.complete,
            heartbeat: None,
            is_late: false,
            news: false,
            snapshot,
            versions,
            bulk,
        }
    }

    /// True while a bulk snapshot is published, or made.
    fn held(&self) -> bool {
        self.bulk.as_ref().is_some_and(Bulk::holds)
    }

    /// Reads until `shutdown`, or until the connection or Kafka's sink ends.
    pub(super) async fn run(
        &mut self,
        mut reader: FrameReader,
        catalog: &Catalog,
        queues: Queues,
        shutdown: &CancellationToken,
    ) -> Result<(), CaptureError> {
        let source = &self.config.source;
        let wire = |error| stream_failure(source, error);
        loop {
            while !self.held() {
                let frame = match reader.next_frame() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => {
                        if matches!(error, WireError::ShutDown) {
                            self.ended(&queues).await;
                        }
                        return Err(wire(error).into());
                    }
                };
                if let Some(bulk) = &mut self.bulk
                    && bulk.comes_before(&frame, self.assembler.in_transaction())
                {
                    bulk.is_here(|place| self.assembler.epoch_at(place));
                    reader.put_back();
                    break;
                }
                match frame {
                    Frame::Data {
                        wal_end,
                        sent_micros,
                        message,
                    } => {
                        self.received.set_server(wal_end);
                        self.assembler.at(wal_end);
                        self.message(message, sent_micros, catalog).await?;
                        self.require_fit()?;
                    }
                    Frame::Keepalive {
                        wal_end,
                        reply_requested,
                    } => self.keepalive(wal_end, reply_requested),
                }
                if self.batch.is_full() {
                    tokio::select! {
                        room = queues.room(&self.batch) => if !self.hand_on(&queues, room) {
                            return Ok(());
                        },
                        () = shutdown.cancelled() => return Ok(()),
                    }
                }
            }
            // What a bulk snapshot leaves is read in chunks after it.
            let chunks = self.snapshot.as_ref().filter(|_| self.bulk.is_none());
            let due = chunks.and_then(Incremental::due);
            let (held, is_room) = (self.held(), !self.batch.is_full());
            // What has come is handed on at once; while Kafka is busy, more of it gathers. The snapshot comes last.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                room = queues.room(&self.batch), if self.news => if !self.hand_on(&queues, room) {
                    return Ok(());
                },
                answer = answer(self.snapshot.as_mut()) => if let Some(snapshot) = &mut self.snapshot {
                    snapshot.take(answer);
                },
                // The server is told all the while that somebody is here, and does not have to be listened to.
                filled = reader.fill(), if !held => filled.map_err(wire)?,
                event = bulk::event(self.bulk.as_mut()), if is_room => {
                    self.take_bulk(event, catalog).await?;
                    self.require_fit()?;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    if let Some(snapshot) = &mut self.snapshot {
                        // A chunk waits for the one before: they are large, and the changes come first.
                        if queues.kafka.is_empty() {
                            snapshot.ask();
                        } else {
                            snapshot.put_off();
                        }
                    }
                }
            }
        }
    }

    /// The server was shut down, and has nothing that was not sent. Noted in the log, for what comes in its place may be an upgraded one.
    async fn ended(&mut self, queues: &Queues) {
        self.batch.ended_at = Some(self.received.server());
        let room = queues.room(&self.batch).await;
        self.hand_on(queues, room);
    }

    /// False when Kafka has ended.
    fn hand_on(&mut self, queues: &Queues, room: Room) -> bool {
        let next = self.batch.next();
        let mut batch = std::mem::replace(&mut self.batch, next);
        batch.complete = self.complete;
        batch.safe = self.safe;
        // Of a bulk snapshot there is more to come, too.
        batch.is_late = self.is_late || self.held();
        self.batches += 1;
        let heartbeat = self.heartbeat.take();
        if let Some(time) = batch
            .records()
            .first()
            .map(|first| first.commit_time_micros)
            .or(heartbeat)
        {
            self.inflight.push(self.batches, time);
        }
        self.news = false;
        queues.take(batch, room)
    }

    fn keepalive(&mut self, wal_end: Lsn, reply_requested: bool) {
        self.received.set_server(wal_end);
        if reply_requested {
            self.received.reply_soon();
        }
        // The server has sent everything that committed before this, so it is safe once that is. In a transaction it may be a
        // place before the transaction's own commit, and is left alone.
        if self.assembler.in_transaction() {
            return;
        }
        self.is_late = false;
        if wal_end > self.safe {
            self.safe = wal_end;
            self.received.set_received(wal_end);
            self.news = true;
        }
    }

    /// Takes a message that the server sent at that time by its own clock.
    async fn message(&mut self, bytes: &[u8], sent_micros: i64, catalog: &Catalog) -> Result<(), CaptureError> {
        let message = decode(bytes)?;
        match &message {
            LogicalMessage::Relation(relation) => return self.relation(relation, catalog).await,
            LogicalMessage::Begin {
                final_lsn,
                commit_time_micros,
                xid,
            } => {
                self.begin(*final_lsn, *commit_time_micros);
                self.is_late = sent_micros.saturating_sub(*commit_time_micros) >= LATE_MICROS;
                if let Some(snapshot) = &mut self.snapshot {
                    snapshot.began(*xid);
                }
            }
            LogicalMessage::Insert { relation, .. }
            | LogicalMessage::Update { relation, .. }
            | LogicalMessage::Delete { relation, .. } => self.ensure_topic(*relation, bytes.len()).await?,
            LogicalMessage::Truncate { relations } => {
                for relation in relations.iter() {
                    self.ensure_topic(relation, 0).await?;
                }
            }
            _ => {}
        }
        let Self {
            assembler,
            encoder,
            batch,
            high_time_micros,
            published,
            left_out,
            messages,
            topics,
            complete,
            safe,
            received,
            news,
            snapshot,
            versions,
            config,
            heartbeats,
            known_complete,
            heartbeat,
            ..
        } = self;
        match assembler.take(&message)? {
            Assembled::Nothing => {}
            Assembled::Begun(mark) => encoder.begin(&mark, Some(mark.position) <= *published),
            Assembled::Changes(changes) => changes.for_each(|change| {
                let new = Some(change.position) > *published;
                // Also what is in the log already, and is sent again: a chunk comes after it.
                if let Some(snapshot) = snapshot
                    && snapshot.changed(&change, new)
                {
                    batch.snapshot = Some(snapshot.state());
                }
                if left_out.contains(&change.relation.oid) {
                    return Ok(());
                }
                if new {
                    batch.high_time_micros = *high_time_micros;
                    let schemas = versions.next(change.relation, change.position, &mut batch.schemas);
                    let change = Change {
                        schema_version: versions.version(change.relation.oid),
                        ..change
                    };
                    if let Some(schemas) = &schemas {
                        let operation = Operation::SchemaChange { change: schemas };
                        encoder.encode(
                            &Change {
                                operation,
                                ..change.clone()
                            },
                            batch,
                        )?;
                        // What is asked from the catalog, as a key under REPLICA IDENTITY FULL, can be another answer when it is made again.
                        batch.kafka_first = true;
                    }
                    encoder.encode(&change, batch)?;
                    *news = true;
                } else {
                    encoder.pass(&change);
                }
                Ok::<_, CaptureError>(())
            })?,
            Assembled::Message(message) => {
                if messages.hold(&message) {
                    if Some(message.position) <= *published {
                        encoder.pass_message(&message);
                        return Ok(());
                    }
                    let topic = &messages.destination.topic;
                    topics.ensure_data(topic, "logical messages").await?;
                    if bytes.len() >= LARGE_CHANGE && config.on_oversized_row == OnOversizedRow::OmitValues {
                        topics.learn_limit(topic).await;
                    }
                    let time = match &message.transaction {
                        Some(transaction) => transaction.commit_time_micros,
                        None => {
                            if *high_time_micros == 0 {
                                // The log is empty. A record from 1970 would be gone at once, and our clock says another time when this is made again.
                                *high_time_micros = now_micros();
                                batch.kafka_first = true;
                            }
                            *high_time_micros
                        }
                    };
                    batch.high_time_micros = *high_time_micros;
                    let mark = batch.mark();
                    encoder.encode_message(&message, time, &messages.destination, batch);
                    oversized::judge(
                        batch,
                        &mark,
                        "logical messages",
                        message.position,
                        &messages.destination,
                    );
                    *news = true;
                    if message.transaction.is_none() {
                        // It is complete in itself. Its position is that of the last byte of its record.
                        *complete = Some(message.position);
                        *safe = Lsn(message.position.commit_lsn.0 + 1);
                        received.set_received(*safe);
                    }
                    return Ok(());
                }
                if message.prefix == DROPPED_PREFIX && message.transaction.is_none() {
                    let (tables, position) = (told(message.content), message.position);
                    return self.dropped(&tables, position, catalog).await;
                }
                // Anybody may write one into the log, so it is believed within reason, and where they are asked for.
                if config.source.heartbeat_interval_seconds.is_some()
                    && message.transaction.is_none()
                    && let Some(time) = heartbeat::time_of(message.prefix, message.content, &config.source.slot_name)
                {
                    let time = time.clamp(0, now_micros());
                    heartbeats.came(time);
                    if Some(message.position) > *known_complete {
                        batch.heartbeat = encoder.heartbeat(time);
                        *heartbeat = Some(time);
                        *complete = Some(message.position);
                        *safe = Lsn(message.position.commit_lsn.0 + 1);
                        received.set_received(*safe);
                        *news = true;
                    }
                    return Ok(());
                }
                // A mark of our own: what needs it knows it by its prefix.
                let answer = snapshot
                    .as_mut()
                    .filter(|_| message.transaction.is_none())
                    .and_then(|snapshot| snapshot.watermark(message.prefix, message.content));
                let position = message.position;
                match answer {
                    Some(Answer::Described(shape)) => self.begin_table(&shape, position, catalog).await?,
                    Some(Answer::Chunk(chunk)) => self.publish_chunk(&chunk, position, catalog).await?,
                    _ => {}
                }
            }
            Assembled::Committed {
                complete,
                end_lsn,
                mark,
            } => {
                if let Some(mark) = mark {
                    self.batch.high_time_micros = self.high_time_micros;
                    self.encoder
                        .end(&mark, Some(mark.position) <= self.published, &mut self.batch);
                }
                self.complete = Some(complete);
                self.safe = end_lsn;
                self.received.set_received(end_lsn);
                self.news = true;
            }
        }
        Ok(())
    }

    /// Moves the running maximum of the commit times, clamped to our clock, which is the timestamp of the transaction's records.
    ///
    /// All records of a transaction share one timestamp, so that no time range ends inside it; also when a crash cut the
    /// transaction in two. So what Kafka had seen before, wholly or in part, does not move it again.
    fn begin(&mut self, commit_lsn: Lsn, commit_time_micros: i64) {
        let first = Position {
            epoch: self.assembler.epoch_at(commit_lsn),
            commit_lsn,
            ordinal: 0,
        };
        if self.published.is_none_or(|published| {
            first
                > Position {
                    ordinal: 0,
                    ..published
                }
        }) {
            self.high_time_micros = self.high_time_micros.max(commit_time_micros.min(now_micros()));
        }
    }

    /// A snapshot of a table begins at a watermark.
    async fn begin_table(&mut self, shape: &Shape, position: Position, catalog: &Catalog) -> Result<(), CaptureError> {
        self.learn_shape(shape, catalog).await?;
        self.ensure_topic(shape.oid, 0).await?;
        let snapshot = Snapshot {
            id: position.to_string(),
            incremental: true,
        };
        if let Some(incremental) = &mut self.snapshot {
            incremental.begin(shape, snapshot.id.clone());
        }
        let begin = Operation::SnapshotBegin { snapshot: &snapshot };
        self.read(shape.oid, position, now_micros(), [begin])?;
        self.chunk_is_in(position);
        Ok(())
    }

    /// Publishes a chunk at its watermark, without the rows whose keys the log has newer states of.
    async fn publish_chunk(
        &mut self,
        chunk: &Chunk,
        position: Position,
        catalog: &Catalog,
    ) -> Result<(), CaptureError> {
        let Some(incremental) = &mut self.snapshot else {
            return Ok(());
        };
        let Some(stale) = incremental.judge(chunk) else {
            return Ok(());
        };
        let shape = &chunk.shape;
        // By a part of a key, rows are not told apart.
        if !shape.has_key() && !stale.is_empty() {
            self.read_again(Again::Disturbed);
            return Ok(());
        }
        if !self.has_shape(shape) {
            if self.snapshot.as_ref().is_some_and(Incremental::was_described) {
                self.read_again(Again::Disturbed);
                return Ok(());
            }
            // The stream has not come to speak of the new shape; whatever it had before the watermark was of the old one.
            self.learn_shape(shape, catalog).await?;
        }
        self.ensure_topic(shape.oid, chunk.rows.largest()).await?;
        let Some(relation) = self.assembler.relation(shape.oid).cloned() else {
            return Ok(());
        };
        let mut fresh = Vec::with_capacity(chunk.rows.len());
        let mut key = Vec::new();
        for row in chunk.rows.iter() {
            key.clear();
            if !stale.is_empty() && crate::encode::key::write(&relation, row, None, &mut key)? {
                match stale.get(&key[..]) {
                    // The stream told its newer state, or that it is gone.
                    Some(true) => continue,
                    // The stream left out a large value that did not change, and nobody else would ever tell it.
                    Some(false) => {
                        self.read_again(Again::Disturbed);
                        return Ok(());
                    }
                    None => {}
                }
            }
            fresh.push(row);
        }
        let Some(incremental) = &mut self.snapshot else {
            return Ok(());
        };
        let Some(cursor) = incremental.cursor() else {
            // It was given up while the chunk was under way.
            incremental.put_down();
            return Ok(());
        };
        let snapshot = Snapshot {
            id: cursor.snapshot.clone(),
            incremental: true,
        };
        let rows = incremental.published(chunk, &fresh);
        let snapshot = &snapshot;
        let end = rows.map(|rows| Operation::SnapshotEnd { snapshot, rows });
        let reads = fresh.into_iter().map(|new| Operation::Read { new, snapshot });
        self.read(shape.oid, position, chunk.time_micros, reads.chain(end))?;
        self.chunk_is_in(position);
        Ok(())
    }

    /// What is done of a snapshot goes into the log with its records: both are in one batch, and so in one transaction.
    fn chunk_is_in(&mut self, at: Position) {
        self.batch.snapshot = self.snapshot.as_ref().map(Incremental::state);
        self.complete = Some(Position::end_of_transaction(at.epoch, at.commit_lsn));
    }

    fn read_again(&mut self, again: Again) {
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.again(again);
        }
    }

    /// Appends records of a snapshot, the first of them at this position. Returns how many.
    fn read<'r>(
        &mut self,
        oid: u32,
        at: Position,
        time_micros: i64,
        operations: impl IntoIterator<Item = Operation<'r>>,
    ) -> Result<u64, CaptureError> {
        let mut count = 0;
        let Some(relation) = self.assembler.relation(oid) else {
            return Ok(count);
        };
        self.high_time_micros = self.high_time_micros.max(time_micros.min(now_micros()));
        self.batch.high_time_micros = self.high_time_micros;
        // Every change of another schema came before the watermark: where the rows have one that the log does not know, it is so from here on.
        let schemas = self.versions.next(relation, at, &mut self.batch.schemas);
        let schema_change = schemas.iter().map(|change| Operation::SchemaChange { change });
        // They live longer than the event, which is made here: this gives both one lifetime.
        let operations = operations.into_iter().map(|operation: Operation<'_>| operation);
        for operation in schema_change.chain(operations) {
            let change = Change {
                relation,
                schema_version: self.versions.version(oid),
                operation,
                position: Position {
                    ordinal: at.ordinal + count,
                    ..at
                },
                commit_time_micros: time_micros,
                transaction_id: 0,
                lsn: at.commit_lsn,
                previous_end: None,
                origin: None,
            };
            count += 1;
            if let Operation::SnapshotEnd { snapshot, .. } = operation
                && let Ok(begin) = snapshot.id.parse()
            {
                self.batch.mended.push((oid, begin));
            }
            let before = self.batch.records().len();
            self.encoder.encode(&change, &mut self.batch)?;
            if !matches!(operation, Operation::Read { .. }) {
                self.batch.markers += self.batch.records().len() - before;
            }
        }
        self.batch.kafka_first = true;
        self.news = true;
        Ok(count)
    }

    /// True if the stream's changes of a table have this shape.
    fn has_shape(&self, shape: &Shape) -> bool {
        let message = shape.message();
        self.assembler.relation(shape.oid).is_some_and(|relation| {
            relation.schema == message.schema
                && relation.table == message.table
                && relation.columns.len() == message.columns.len()
                && (relation.columns.iter().zip(&message.columns).enumerate()).all(|(index, (known, column))| {
                    // Under REPLICA IDENTITY FULL every column is flagged, and the primary key is the key.
                    let is_key = match message.replica_identity {
                        b'f' => shape.key().contains(&index),
                        _ => column.key,
                    };
                    known.name == column.name
                        && known.type_oid == column.type_oid
                        && known.type_modifier == column.type_modifier
                        && known.key == is_key
                })
        })
    }

    async fn learn_shape(&mut self, shape: &Shape, catalog: &Catalog) -> Result<(), CaptureError> {
        if self.has_shape(shape) {
            return Ok(());
        }
        for (oid, schema, name) in shape.types() {
            self.assembler.take(&LogicalMessage::Type { oid, schema, name })?;
        }
        self.relation(&shape.message(), catalog).await
    }

    /// Before a change of so many bytes.
    async fn ensure_topic(&mut self, oid: u32, bytes: usize) -> Result<(), CaptureError> {
        if let Some((topic, table)) = self.topics_due.remove(&oid) {
            self.topics.ensure_data(&topic, &table).await?;
        }
        if bytes >= LARGE_CHANGE
            && self.config.on_oversized_row == OnOversizedRow::OmitValues
            && let Some(relation) = self.assembler.relation(oid)
            && !self.left_out.contains(&relation.oid)
        {
            let topic = topic_name(&self.config.kafka.topic_prefix, &relation.schema, &relation.table);
            self.topics.learn_limit(&topic).await;
        }
        Ok(())
    }

    /// Whether every record is one that its topic takes, and that may be published as it is.
    fn require_fit(&self) -> Result<(), SinkError> {
        let omits = self.config.on_oversized_row == OnOversizedRow::OmitValues;
        let Some(found) = self.batch.oversized.iter().find(|found| !(found.fits && omits)) else {
            return Ok(());
        };
        let Oversized {
            oid: _,
            table,
            topic,
            position,
            bytes,
            limit,
            fits,
        } = found;
        let remedy = match (*fits, room_for(*bytes)) {
            (true, _) => {
                "no topic takes it: set onOversizedRow: OmitValues, and it is published without its large values"
                    .to_owned()
            }
            (false, Some(room)) => {
                format!(
                    "it is too large without its large values as well: raise the topic's max.message.bytes to {room}"
                )
            }
            (false, None) => {
                "no topic takes it, also without its large values: exclude it from what is captured".to_owned()
            }
        };
        Err(SinkError::ChangeTooLarge {
            table: table.clone(),
            position: *position,
            topic: topic.clone(),
            bytes: *bytes,
            limit: *limit,
            remedy,
        })
    }

    async fn relation(&mut self, message: &RelationMessage<'_>, catalog: &Catalog) -> Result<(), CaptureError> {
        let hypertable = catalog.hypertable_of(message).await?;
        // One that was dropped before its last changes were read is as the log knew it last.
        let dropped = match hypertable {
            None if is_chunk(message) => self.dropped_hypertable(message.table, catalog).await?,
            _ => None,
        };
        let primary_key = match (&hypertable, &dropped) {
            _ if message.replica_identity != b'f' => Vec::new(),
            (Some(hypertable), _) => catalog.primary_key(hypertable.oid).await?,
            (None, Some(dropped)) => {
                let key = dropped.relation.columns.iter().filter(|column| column.key);
                key.map(|column| column.name.clone()).collect()
            }
            (None, None) => catalog.primary_key(message.oid).await?,
        };
        let mut relation = self.assembler.describe(message, &primary_key);
        if let Some(Hypertable {
            oid,
            table,
            chunks,
            differs,
        }) = hypertable
        {
            if differs && self.selection.holds(&table.schema, &table.name) {
                return Err(SourceError::ChunkDiffers {
                    chunk: format!("{}.{}", relation.schema, relation.table),
                    hypertable: format!("{}.{}", table.schema, table.name),
                }
                .into());
            }
            self.versions.has_chunks(oid, chunks);
            (relation.oid, relation.schema, relation.table) = (oid, table.schema, table.name);
        } else if let Some(TableSchema { relation: known, .. }) = dropped {
            (relation.oid, relation.schema, relation.table) = (known.oid, known.schema, known.table);
        } else if is_chunk(message) {
            tracing::warn!(
                chunk = message.table,
                "changes of a chunk that is no hypertable's are left out"
            );
            self.ownerless.send_modify(|first| {
                first.get_or_insert_with(|| message.table.to_owned());
            });
        }
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.described(relation.oid);
        }
        let (schema, table) = (&relation.schema, &relation.table);
        if !self.selection.holds(schema, table) {
            self.left_out.insert(relation.oid);
            self.assembler.learn(message.oid, relation);
            return Ok(());
        }
        self.left_out.remove(&relation.oid);
        let destination = self.destination(&relation);
        self.topics_due
            .insert(message.oid, (destination.topic.clone(), format!("{schema}.{table}")));
        let details = if self.encoder.wants_details() {
            catalog.details(&relation).await?
        } else {
            TableDetails::default()
        };
        self.versions.described(relation.oid, message.replica_identity);
        self.encoder.prepare(&relation, &details, destination);
        self.assembler.learn(message.oid, relation);
        Ok(())
    }

    async fn dropped_hypertable(&self, chunk: &str, catalog: &Catalog) -> Result<Option<TableSchema>, SourceError> {
        let Some(known) = self.versions.hypertable_of(chunk) else {
            return Ok(None);
        };
        let missing = catalog.missing(&[known.relation.oid]).await?;
        Ok((!missing.tables.is_empty()).then(|| known.clone()))
    }

    fn destination(&mut self, Relation { schema, table, .. }: &Relation) -> Arc<Destination> {
        let topic = topic_name(&self.config.kafka.topic_prefix, schema, table);
        Arc::new(Destination {
            limit: self.topics.limit(&topic),
            topic,
            stream: self
                .config
                .redis
                .as_ref()
                .map(|redis| topic_name(&redis.stream_prefix, schema, table))
                .unwrap_or_default(),
        })
    }

    /// The log says that tables are gone: nothing of them comes after this.
    async fn dropped(&mut self, tables: &[u32], mut at: Position, catalog: &Catalog) -> Result<(), CaptureError> {
        if Some(at) <= self.published {
            return Ok(());
        }
        // Whoever may write into the log could have written this.
        for oid in catalog.missing(tables).await?.tables {
            let dropped = self.versions.dropped(oid, &mut self.batch.schemas);
            self.batch.mended.push((oid, at));
            self.news = true;
            let Some(before) = dropped.filter(|schema| {
                let relation = &schema.relation;
                self.selection.holds(&relation.schema, &relation.table)
            }) else {
                continue;
            };
            let (relation, schema_version) = (Arc::new(before.relation.clone()), before.version);
            let destination = self.destination(&relation);
            let table = format!("{}.{}", relation.schema, relation.table);
            match self.topics.ensure_data(&destination.topic, &table).await {
                Err(error @ (SinkError::Topic { .. } | SinkError::TopicCollision { .. })) => {
                    // It is nothing to stop for, and would be so each time.
                    tracing::warn!(%error, "that a table was dropped cannot be told in its topic");
                    continue;
                }
                ensured => ensured?,
            }
            self.encoder.prepare(&relation, &TableDetails::default(), destination);
            let change = SchemaChange {
                before: Some(before),
                after: None,
            };
            let known = self.batch.records().len();
            self.batch.high_time_micros = self.high_time_micros;
            self.encoder.encode(
                &Change {
                    relation: &relation,
                    schema_version,
                    operation: Operation::SchemaChange { change: &change },
                    position: at,
                    commit_time_micros: self.high_time_micros,
                    transaction_id: 0,
                    lsn: at.commit_lsn,
                    previous_end: None,
                    origin: None,
                },
                &mut self.batch,
            )?;
            self.batch.markers += self.batch.records().len() - known;
            self.batch.kafka_first = true;
            self.complete = Some(Position::end_of_transaction(at.epoch, at.commit_lsn));
            at.ordinal += 1;
        }
        Ok(())
    }
}

/// The next answer to a question of the snapshot. Cancel safe.
async fn answer(snapshot: Option<&mut Incremental>) -> Answer {
    match snapshot {
        Some(snapshot) => snapshot.answer().await,
        None => std::future::pending().await,
    }
}

/// Our clock, in microseconds since the Unix epoch.
pub(super) fn now_micros() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
}
