//! Opens a session: from preflight to being the one writer.
//!
//! The order is what keeps two runtimes from writing at once. Owning the slot comes first and acknowledges nothing; then the producer
//! fences every one before it; only then is the checkpoint read, since nobody can change it any more; it is compared with the slot;
//! and a checkpoint with the next owner generation is committed before Redis is claimed with that generation.

use std::{collections::HashSet, sync::Arc, time::Duration};

use meander_config::KafkaCluster;
use meander_config::{OnSourceGap, PostgresSource};
use meander_traces::step;
use rdkafka::message::BorrowedMessage;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{interval, timeout},
};

use crate::{
    batch::{Batch, Destination},
    capture::{
        CaptureError, Context,
        monitor::{self, Owner},
        session::encoder,
        status::{self, Received},
        stream::now_micros,
    },
    checkpoint::{Tail, TailError, last_checkpoint, read_schemas},
    kafka_client::require_admission,
    log::{
        AcceptedGap, CLAIMS_TOPIC, Checkpoint, POSITION_HEADER, REPLAY_JOB_HEADER, SnapshotState, checkpoint_key,
        checkpoint_topic, header, message_topic, schemas_topic, topic_name,
    },
    position::{Epoch, Lsn, Position},
    progress::ConditionType,
    schema::{Kept, Schemas},
    sink::{SinkError, claims::Claims, kafka::KafkaSink, redis, topics::Topics},
    size_limit::SizeLimit,
    source::{
        Change, Operation, Relation,
        postgres::{
            details::TableDetails,
            preflight::{Catalog, Credentials, Selection, SourceError, Table, wire_failure},
            start::{Loss, Pipeline, ServerIdentity, SlotState, SourceGap, Start, decide, timeline_history},
            upgrade::untouched_to,
            wire::{FrameReader, ReplicationConnection, WireError, quote_identifier},
        },
    },
};

/// How long reading the end of a partition may take.
const TAIL_DEADLINE: Duration = Duration::from_secs(15);
/// How often a standby looks whether the slot is free: what it takes to notice is part of every take-over.
const STANDBY_LOOK: Duration = Duration::from_millis(250);
/// A process that hangs, or is cut off, is waited for less long where another one stands by. Six statuses have to be missing then: a network that
/// drops packets, or a process that gets little of a processor, keeps the slot.
const SHORT_SILENCE: &str = "SET wal_sender_timeout = '3s'";
/// How long Redis may take to say whose the streams are.
const REDIS_DEADLINE: Duration = Duration::from_secs(5);

/// A session that owns the slot, and is the one writer of Kafka. Redis is fed from there on: it is nothing to wait for.
pub(super) struct Session {
    pub(super) catalog: Catalog,
    pub(super) selection: Selection,
    pub(super) topics: Topics,
    pub(super) reader: FrameReader,
    pub(super) received: Received,
    pub(super) status: status::Task,
    /// What the status says; none, and so nothing, until a checkpoint says it.
    pub(super) acknowledged: watch::Sender<Option<Lsn>>,
    pub(super) kafka: KafkaSink,
    pub(super) checkpoint: Checkpoint,
    pub(super) owner: Owner,
    pub(super) schemas: Schemas,
}

/// Opens a session. Can be given up at any point: nothing is published yet.
pub(super) async fn open(context: &Context) -> Result<Session, CaptureError> {
    let config = &context.config;
    let source = &config.source;

    // Preflight: nothing is made before everything is checked, and all that is missing is said at once.
    let credentials = Credentials::read(&source.server())?;
    let catalog = step(step!("connect"), Catalog::connect(source, &credentials)).await?;
    let selection = Selection::new(&source.tables)?;
    let mut slot = catalog.slot(source).await?;
    // Whoever does not own the slot has no business with anything else either.
    monitor::report(context, slot.as_ref(), None);
    if is_read(slot.as_ref()) {
        if !config.standby {
            let slot = source.slot_name.clone();
            return Err(SourceError::SlotActive { slot }.into());
        }
        slot = step(step!("stand by"), stand_by(context, &catalog)).await?;
    }
    let wire = |error| wire_failure(source, &credentials.user, error);
    let check = async {
        let connected = ReplicationConnection::connect(source, &credentials).await.map_err(wire);
        catalog.check(source, &selection, slot.as_ref(), connected).await
    };
    let (tables, mut connection) = step(step!("check source"), check).await?;
    let refused = tables.refused.into_iter().map(|refused| refused.table);
    let (tables, refused) = (tables.captured, refused.collect::<Vec<_>>());
    let server = identify(&mut connection, &catalog, &wire).await?;
    let checkpoint_topic = checkpoint_topic(&config.pipeline.namespace, &config.pipeline.name);
    admit(config.kafka.cluster(), checkpoint_topic.clone()).await?;
    let makes_slot = slot.as_ref().is_none_or(|slot| slot.lost || slot.unpublished);
    let mut accepted_loss = None;
    let mut known_checkpoint = None;
    if makes_slot {
        // There is no slot to own yet, so this look fences nobody, and what it finds is looked at again by the owner. But a pipeline
        // that will be refused must not leave a slot behind, which would keep WAL for nobody.
        known_checkpoint = match read_own_checkpoint(context, tail(context)?.into(), &checkpoint_topic).await {
            // Before the first start there is no topic.
            Err(CaptureError::Sink(SinkError::Checkpoint(TailError::NoSuchPartition { .. }))) => None,
            read => read?,
        };
        keys_stay(context, known_checkpoint.as_ref())?;
        if let Start::Accept { loss, .. } = start(known_checkpoint.as_ref(), context, slot.as_ref(), &server)? {
            accepted_loss = Some(loss);
        }
    }

    let kafka = &config.kafka;
    let mut topics = Topics::new(kafka)?.with_remarks(context.remarks.clone());
    let published = known_checkpoint.and_then(|checkpoint| checkpoint.published);
    if !makes_slot || published.is_some() {
        topics.begun();
    }
    topics.ensure_compacted(CLAIMS_TOPIC).await?;
    Claims::new(kafka.cluster(), &kafka.topic_prefix, own_key(context))
        .claim()
        .await?;
    if makes_slot {
        // With the prefix ours, what is in its topics past the checkpoint is no other pipeline's that could be named.
        check_log(context, tail(context)?.into(), &tables, published, &checkpoint_topic).await?;
        stream_prefix_is_free(context).await?;
    }
    topics.ensure_compacted(&checkpoint_topic).await?;
    let pipeline = &config.pipeline;
    topics
        .ensure_compacted(&schemas_topic(&pipeline.namespace, &pipeline.name))
        .await?;
    let own = |table: &Table| {
        let topic = topic_name(&kafka.topic_prefix, &table.schema, &table.name);
        (topic, format!("{}.{}", table.schema, table.name))
    };
    let mut wanted: Vec<_> = tables.iter().map(own).collect();
    // What is wrong with these is said now, and not in the midst of the stream.
    let encoder = encoder(context);
    if let Some(transactions) = encoder.transactions() {
        wanted.push((transactions.topic.clone(), "transactions".to_owned()));
    }
    if source.heartbeat_interval_seconds.is_some()
        && let Some(record) = encoder.heartbeat(0)
    {
        wanted.push((record.topic, "heartbeats".to_owned()));
    }
    drop(encoder);
    step(step!("make topics"), topics.ensure_all(wanted)).await?;
    // Where there is a slot, the publication is its owner's to change.
    if makes_slot {
        if slot.is_some() {
            // Nothing can be read from it any more, and that was accepted.
            catalog.drop_slot(source).await?;
        }
        catalog.prepare_publication(source, &tables).await?;
        step(
            step!("make slot"),
            create_slot(&mut connection, &catalog, source, &wire),
        )
        .await?;
    } else if let Some(failover) = source.slot_failover
        && slot.and_then(|slot| slot.failover).unwrap_or(false) != failover
    {
        let name = quote_identifier(&source.slot_name);
        let sql = format!("ALTER_REPLICATION_SLOT {name} (FAILOVER {failover})");
        connection.query(&sql).await.map_err(wire)?;
    }
    if config.standby {
        connection.query(SHORT_SILENCE).await.map_err(wire)?;
    }
    let process = connection.process();
    let replication = connection.start_replication(&source.slot_name, &source.publication.name, source.origin);
    let (reader, writer) = step(step!("own slot"), replication).await.map_err(wire)?;
    let received = Received::default();
    let (acknowledged, acknowledgements) = watch::channel(None);
    let status = status::Task::start(writer, received.clone(), acknowledgements);

    // From here on the slot is ours.
    context.set(
        ConditionType::SourceReady,
        true,
        "Ready",
        "The source is fit for capture.",
    );
    let (kafka, checkpoint, schemas, known) = open_kafka(
        context,
        &catalog,
        (&tables, &refused),
        &checkpoint_topic,
        server,
        &credentials,
        accepted_loss,
    )
    .await?;
    context.set(
        ConditionType::SourceGap,
        false,
        "NoGap",
        "The source has everything since the checkpoint.",
    );
    if context.config.redis.is_none() {
        context.sinks_are_ready();
    }
    topics.begun();
    tracing::info!(
        generation = checkpoint.owner_generation,
        epoch = checkpoint.epoch,
        acknowledged = %checkpoint.acknowledged,
        published = checkpoint.published.map(tracing::field::display),
        "capture starts"
    );
    Ok(Session {
        catalog,
        selection,
        topics,
        reader,
        received,
        status,
        acknowledged,
        kafka,
        checkpoint,
        owner: Owner { process, known },
        schemas,
    })
}

fn is_read(slot: Option<&SlotState>) -> bool {
    slot.is_some_and(|slot| slot.active_pid.is_some())
}

/// Waits until nobody reads the slot, doing nothing that would disturb whoever does. To stand by is this process's part, so it is ready
/// meanwhile. The connection is kept: who takes over has no time to open one first.
async fn stand_by(context: &Context, catalog: &Catalog) -> Result<Option<SlotState>, SourceError> {
    context.stands_by();
    let mut looks = interval(STANDBY_LOOK);
    loop {
        looks.tick().await;
        let slot = catalog.slot(&context.config.source).await?;
        if !is_read(slot.as_ref()) {
            tracing::info!("nobody reads the slot any more: taking over");
            return Ok(slot);
        }
    }
}

/// Makes the slot, in bounded time: the server waits for every transaction that is older, and would do so for ever.
async fn create_slot(
    connection: &mut ReplicationConnection,
    catalog: &Catalog,
    source: &PostgresSource,
    wire: impl Fn(WireError) -> SourceError,
) -> Result<(), SourceError> {
    let options = match source.slot_failover {
        Some(true) => "(SNAPSHOT 'nothing', FAILOVER)",
        // As version 14 understands it.
        _ => "NOEXPORT_SNAPSHOT",
    };
    let name = quote_identifier(&source.slot_name);
    let sql = format!("CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput {options}");
    match connection.query(&sql).await {
        Ok(_) => {
            tracing::info!(slot = source.slot_name, "made the replication slot");
            Ok(())
        }
        // Each transaction is waited for as long as lock_timeout says, and all of them as long as a request may take.
        Err(WireError::Timeout(_)) => Err(catalog.give_up_slot(&source.slot_name).await?),
        Err(WireError::Server { code, .. }) if code == "55P03" => Err(catalog.give_up_slot(&source.slot_name).await?),
        Err(error) => Err(wire(error)),
    }
}

async fn identify(
    connection: &mut ReplicationConnection,
    catalog: &Catalog,
    wire: impl Fn(WireError) -> SourceError,
) -> Result<ServerIdentity, CaptureError> {
    let rows = connection.query("IDENTIFY_SYSTEM").await.map_err(&wire)?;
    let field = |index: usize| rows.first().and_then(|row| row.get(index)?.clone()).unwrap_or_default();
    let timeline = field(1).parse().unwrap_or(0);
    let history = match timeline {
        // The first has none.
        0 | 1 => vec![],
        timeline => {
            let rows = connection
                .query(&format!("TIMELINE_HISTORY {timeline}"))
                .await
                .map_err(wire)?;
            let file = rows.first().and_then(|row| row.get(1)?.as_deref()).unwrap_or_default();
            timeline_history(file)
        }
    };
    let (position, standby) = catalog.wal_position().await?;
    let (major_version, database_oid) = catalog.version_and_database().await?;
    Ok(ServerIdentity {
        system_identifier: field(0),
        timeline,
        position,
        standby,
        history,
        major_version,
        database_oid,
        untouched_to: None,
    })
}

fn start(
    checkpoint: Option<&Checkpoint>,
    context: &Context,
    slot: Option<&SlotState>,
    server: &ServerIdentity,
) -> Result<Start, CaptureError> {
    let pipeline = Pipeline {
        namespace: &context.config.pipeline.namespace,
        name: &context.config.pipeline.name,
        slot: &context.config.source.slot_name,
        accepted: context.config.accept_source_gap.as_deref(),
        resnapshots: context.config.on_source_gap == OnSourceGap::Resnapshot,
    };
    match decide(checkpoint, pipeline, slot, server) {
        // On the timeline that was captured, its primary sends it all that it lacks.
        Err(SourceGap::Lost {
            loss: Loss::ServerBehind { now, captured },
            ..
        }) if server.standby => Err(SourceError::StandbyBehind { now, captured }.into()),
        decision => Ok(decision?),
    }
}

/// The key of this pipeline's checkpoint.
fn own_key(context: &Context) -> String {
    let pipeline = &context.config.pipeline;
    checkpoint_key(&pipeline.namespace, &pipeline.name, &context.config.source.slot_name)
}

/// No slot is made for a pipeline whose streams are another's: where Redis has to have what is acknowledged, it would keep WAL for nobody.
/// A Redis that does not answer is nothing to wait for, and whoever owns the slot looks again.
async fn stream_prefix_is_free(context: &Context) -> Result<(), SinkError> {
    let Some(config) = &context.config.redis else {
        return Ok(());
    };
    match timeout(
        REDIS_DEADLINE,
        redis::look_at_claim(config, &own_key(context), &context.rival),
    )
    .await
    {
        Ok(Err(taken @ SinkError::StreamPrefixTaken { .. })) => Err(taken),
        _ => Ok(()),
    }
}

/// Before anything else is asked of Kafka: a client that is refused tries for as long as it may, and does not say why in the end.
async fn admit(cluster: KafkaCluster, topic: String) -> Result<(), CaptureError> {
    Ok(spawn_blocking(move || require_admission(&cluster, &topic)).await??)
}

fn tail(context: &Context) -> Result<Tail, SinkError> {
    Ok(Tail::new(&context.config.kafka.cluster(), TAIL_DEADLINE)?)
}

async fn read_own_checkpoint(
    context: &Context,
    tail: Arc<Tail>,
    topic: &str,
) -> Result<Option<Checkpoint>, CaptureError> {
    let (key, topic) = (own_key(context), topic.to_owned());
    let read = spawn_blocking(move || last_checkpoint(&tail, &topic, &key)).await?;
    Ok(read.map_err(SinkError::Checkpoint)?)
}

async fn read_own_schemas(context: &Context, tail: Arc<Tail>) -> Result<Vec<Kept>, CaptureError> {
    let pipeline = &context.config.pipeline;
    let topic = schemas_topic(&pipeline.namespace, &pipeline.name);
    let key = own_key(context);
    let read = spawn_blocking(move || read_schemas(&tail, &topic, &key)).await?;
    Ok(read.map_err(SinkError::Checkpoint)?)
}

/// Does what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SinkError> + Send + 'static,
) -> Result<T, CaptureError> {
    Ok(spawn_blocking(work).await??)
}

/// Becomes the one writer of Kafka.
async fn open_kafka(
    context: &Context,
    catalog: &Catalog,
    (tables, refused): (&[Table], &[Table]),
    checkpoint_topic: &str,
    mut server: ServerIdentity,
    credentials: &Credentials,
    accepted_loss: Option<Loss>,
) -> Result<(KafkaSink, Checkpoint, Schemas, HashSet<Table>), CaptureError> {
    let (config, remarks) = (context.config.clone(), context.remarks.clone());
    let opening = blocking(move || KafkaSink::open(&config, remarks));
    let kafka = step(step!("fence others"), opening).await?;
    // One reader for all that follows: each new one would have to find the brokers first. The topics exist: one that is not known is not yet known, and
    // never a beginning.
    let tail = Arc::new(tail(context)?.waiting());
    let reading = read_own_checkpoint(context, tail.clone(), checkpoint_topic);
    let before = step(step!("read checkpoint"), reading).await?;
    keys_stay(context, before.as_ref())?;
    // Only now: while the slot is ours nobody else can move it, and what is published cannot be newer than the server.
    let check = async {
        let slot = catalog.slot(&context.config.source).await?;
        (server.position, server.standby) = catalog.wal_position().await?;
        if let (Some(before), Some(slot)) = (&before, &slot)
            && before.system_identifier != server.system_identifier
            && before.ended_at.is_some()
        {
            server.untouched_to = untouched_to(&context.config.source, credentials, catalog, slot).await?;
        }
        let decision = start(before.as_ref(), context, slot.as_ref(), &server)?;
        Ok::<_, CaptureError>((slot, decision))
    };
    let (slot, decision) = step(step!("check for a gap"), check).await?;
    let server = &server;
    let mut checkpoint = before.unwrap_or(Checkpoint {
        epoch: Epoch::FIRST.0,
        partings: vec![],
        system_identifier: String::new(),
        timeline: 0,
        major_version: 0,
        database_oid: 0,
        ended_at: None,
        owner_generation: 0,
        published: None,
        complete: None,
        redis: None,
        acknowledged: Lsn::ZERO,
        high_time_micros: 0,
        events_total: 0,
        snapshot: SnapshotState::default(),
        records_total: 0,
        partitions: None,
        released: false,
        accepted_gap: None,
        oversized: Default::default(),
    });
    checkpoint.partitions = Some(context.config.kafka.partitions);
    let selected = [tables, refused].concat();
    let kafka = {
        let (cluster, tail) = (context.config.kafka.cluster(), tail.clone());
        let (topics, published) = (log_topics(context, &selected).collect(), checkpoint.published);
        let settled = move || {
            kafka
                .abort_left_open(&cluster, &tail, &topics, published)
                .map(|()| kafka)
        };
        step(step!("settle what is left open"), blocking(settled)).await?
    };
    let check = check_log(context, tail.clone(), &selected, checkpoint.published, checkpoint_topic);
    let known = step(step!("check log"), check).await?;
    let mut records = Batch::default();
    let before = checkpoint.system_identifier.clone();
    let mut upgrade = None;
    let stands_at = slot.and_then(|slot| slot.confirmed_flush);
    match (decision, stands_at) {
        (Start::Resume, _) => {}
        (Start::Follow(left), _) => follow(&mut checkpoint, left, server.timeline, context.config.redis.is_some())?,
        (Start::GoOver(at), _) => {
            let (from, to) = (checkpoint.major_version, server.major_version);
            tracing::warn!(from, to, %at, "the server was upgraded, and nothing is lost");
            let members = catalog
                .published_tables(&context.config.source.publication.name)
                .await?;
            checkpoint.go_over(at, server, &members);
            upgrade = Some((from, to));
        }
        (Start::Adopt(epoch, at), _) => {
            checkpoint.redis = None;
            checkpoint.begin_epoch(epoch, at, server);
        }
        (Start::Accept { id, epoch, loss }, Some(at)) => {
            let gap = AcceptedGap {
                id,
                // What was found before the slot was made says more than that the new one stands elsewhere.
                reason: accepted_loss.as_ref().unwrap_or(&loss).reason().to_owned(),
                lost_after: checkpoint.acknowledged,
                resumed_at: at,
                time_micros: now_micros(),
                read_anew: context.config.on_source_gap == OnSourceGap::Resnapshot,
            };
            records = accept(context, &mut checkpoint, tables, gap, epoch, server)?;
        }
        // The slot is being read by this session.
        (Start::CreateSlot(_) | Start::Accept { .. }, _) => {
            return Err(catalog
                .confused("the replication slot vanished while it was read")
                .into());
        }
    }
    checkpoint.released = false;
    checkpoint.ended_at = None;
    checkpoint.owner_generation += 1;
    let kept = read_own_schemas(context, tail.clone()).await?;
    let mut schemas = match upgrade {
        Some(_) => Schemas::new(kept, &before),
        None => Schemas::new(kept, &checkpoint.system_identifier),
    };
    if upgrade.is_some() {
        records.schemas = schemas.moved_to(&checkpoint.system_identifier);
    }
    if schemas.is_empty() {
        let tables = catalog
            .published_tables(&context.config.source.publication.name)
            .await?;
        records.schemas = schemas.begin(tables.into_keys());
    }
    let kafka = {
        let checkpoint = checkpoint.clone();
        let commit = blocking(move || kafka.commit_batch(&records, &checkpoint).map(|()| kafka));
        step(step!("first commit"), commit).await?
    };
    if let Some((from, to)) = upgrade {
        let message = format!("The server was upgraded from PostgreSQL {from} to {to}, and nothing is lost.");
        context.set(ConditionType::SourceReady, true, "Upgraded", message);
    }
    Ok((kafka, checkpoint, schemas, known))
}

/// Goes over to the timeline of a promoted server, which has everything that Kafka has.
///
/// Redis is ahead of Kafka, and nobody can say by how much before it answers. What it may have of the timeline that was left must not be
/// taken for what the new one has at the same places: so that gets the next epoch.
fn follow(checkpoint: &mut Checkpoint, left: Lsn, timeline: u32, redis: bool) -> Result<(), SourceGap> {
    if redis {
        checkpoint.part(left)?;
    }
    let epoch = checkpoint.epoch;
    tracing::warn!(from = checkpoint.timeline, to = timeline, %left, epoch, "the server was promoted, and nothing is lost");
    checkpoint.timeline = timeline;
    // Past that place LSNs stand for other WAL than they did; to acknowledge them would skip what is in it now.
    checkpoint.acknowledged = checkpoint.acknowledged.min(left);
    // The same of transactions that held nothing to publish; the last that did is whole if one after it was complete.
    if checkpoint.complete.is_some_and(|complete| complete.commit_lsn >= left) {
        checkpoint.complete = checkpoint
            .published
            .map(|published| Position::end_of_transaction(published.epoch, published.commit_lsn));
    }
    Ok(())
}

/// Goes on in the next epoch without what is lost, and notes that at its beginning: in the checkpoint, and in the topic of each table.
fn accept(
    context: &Context,
    checkpoint: &mut Checkpoint,
    tables: &[Table],
    gap: AcceptedGap,
    epoch: Epoch,
    server: &ServerIdentity,
) -> Result<Batch, CaptureError> {
    let at = gap.resumed_at;
    tracing::warn!(gap.id, gap.reason, resumed_at = %at, gap.read_anew, "a gap in the source was accepted");
    let mut encoder = encoder(context);
    let mut records = Batch::default();
    // A running maximum does not fall, and what is still to come may be older than now.
    records.high_time_micros = checkpoint.high_time_micros;
    checkpoint.begin_epoch(epoch, at, server);
    let mut position = Position {
        epoch,
        commit_lsn: Lsn::ZERO,
        ordinal: 0,
    };
    for table in tables {
        let relation = Relation {
            oid: 0,
            schema: table.schema.clone(),
            table: table.name.clone(),
            columns: vec![],
        };
        let destination = Destination {
            topic: topic_name(&context.config.kafka.topic_prefix, &table.schema, &table.name),
            stream: context
                .config
                .redis
                .as_ref()
                .map(|redis| topic_name(&redis.stream_prefix, &table.schema, &table.name))
                .unwrap_or_default(),
            // A record without a row is small.
            limit: SizeLimit::default(),
        };
        encoder.prepare(&relation, &TableDetails::default(), Arc::new(destination));
        let change = Change {
            relation: &Arc::new(relation),
            schema_version: 0,
            operation: Operation::SourceGap { gap: &gap },
            position,
            commit_time_micros: gap.time_micros,
            transaction_id: 0,
            lsn: at,
            previous_end: None,
            origin: None,
        };
        encoder.encode(&change, &mut records)?;
        position.ordinal += 1;
    }
    // They are no changes of the source, and records of the log.
    checkpoint.records_total += records.records().len() as u64;
    checkpoint.published = records.last().or(checkpoint.published);
    checkpoint.complete = Some(Position::end_of_transaction(epoch, Lsn::ZERO));
    checkpoint.accepted_gap = Some(gap);
    Ok(records)
}

/// Refuses another number of partitions than the one that the keys in the log went by: each would move to another one, past what is there of it.
fn keys_stay(context: &Context, before: Option<&Checkpoint>) -> Result<(), SinkError> {
    let kafka = &context.config.kafka;
    let began = before
        .filter(|before| before.published.is_some())
        .and_then(|before| before.partitions);
    match began {
        Some(began) if began != kafka.partitions => Err(SinkError::Topic {
            topic: format!("{}.*", kafka.topic_prefix),
            cause: format!(
                "keys go by {began} partitions since this pipeline began, and topics.partitions is {}: each key would go to another partition, and lose its order; create the CdcPipeline with topics.partitions: {began}, or with another topicPrefix and another name",
                kafka.partitions
            ),
        }),
        _ => Ok(()),
    }
}

/// The topics whose records have positions.
fn log_topics(context: &Context, tables: &[Table]) -> impl Iterator<Item = String> {
    let config = &context.config.kafka;
    let topic_of = |table: &Table| topic_name(&config.topic_prefix, &table.schema, &table.name);
    let transactions = encoder(context)
        .transactions()
        .map(|destination| destination.topic.clone());
    let messages = (!context.config.source.message_prefixes.is_empty()).then(|| message_topic(&config.topic_prefix));
    tables.iter().map(topic_of).chain(transactions).chain(messages)
}

/// The independent check of the checkpoint: no partition may hold a change past it. Says which tables the log has changes of.
async fn check_log(
    context: &Context,
    tail: Arc<Tail>,
    tables: &[Table],
    published: Option<Position>,
    checkpoint_topic: &str,
) -> Result<HashSet<Table>, CaptureError> {
    let topics = log_topics(context, tables).collect();
    let last = spawn_blocking(move || last_positions(&tail, topics))
        .await?
        .map_err(SinkError::Checkpoint)?;
    let mut filled = HashSet::new();
    for (topic, text) in last {
        let found: Option<Position> = text.parse().ok();
        if found.is_none() || found > published {
            return Err(SinkError::LogAhead {
                topic,
                found: text,
                checkpoint: published.map_or("nothing".to_owned(), |position| position.to_string()),
                checkpoint_topic: checkpoint_topic.to_owned(),
            }
            .into());
        }
        filled.insert(topic);
    }
    let topic_of = |table: &Table| topic_name(&context.config.kafka.topic_prefix, &table.schema, &table.name);
    Ok(tables
        .iter()
        .filter(|table| filled.contains(&topic_of(table)))
        .cloned()
        .collect())
}

/// Topic and position of the last record of each partition that has one.
fn last_positions(tail: &Tail, topics: Vec<String>) -> Result<Vec<(String, String)>, TailError> {
    let position = |record: &BorrowedMessage<'_>| match header(record, REPLAY_JOB_HEADER) {
        Some(job) => format!("what the replay {job} wrote"),
        None => header(record, POSITION_HEADER).unwrap_or_default().into_owned(),
    };
    tail.last_records(topics, position)
}
