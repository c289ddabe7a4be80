//! The format DebeziumJson, above all against Debezium itself: one workload, captured by both from the same database, compared event by
//! event. What may differ is listed here with a name, as in `docs/debezium.md`, and a difference that does not occur any more fails too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{LIMIT, checkpoint, config};
use meander_config::{
    CaptureConfig, Format, PublicationManagement, ReplayConfig, ReplayEnd, ReplayOrder, ReplayStart, ReplayTarget,
    ResourceIdentity, SnapshotMode, Speed,
};
use meander_test_support::{Debezium, Kafka, Postgres, Redis, Runtime, eventually, free_address, unique_name};
use rdkafka::{Message as _, message::Headers as _};
use serde_json::{Value, json};

const SCHEMA: &str = include_str!("../../tests/differential/schema.sql");
const WORKLOAD: &str = include_str!("../../tests/differential/workload.sql");
/// Topics of heartbeats begin so, and end with the topics' prefix.
const HEARTBEATS: &str = "__debezium-heartbeat";

/// A record as both write it; the topic's prefix is replaced by `PREFIX`.
#[derive(Debug)]
struct Event {
    key: Option<Value>,
    value: Option<Value>,
    headers: BTreeMap<String, String>,
}

/// Every topic of a prefix, by its name after the prefix.
fn read_all(kafka: &Kafka, prefix: &str) -> BTreeMap<String, Vec<Event>> {
    let mut events: BTreeMap<String, Vec<Event>> = BTreeMap::new();
    kafka.read(
        |topic| topic.starts_with(&format!("{prefix}.")),
        |message| {
            let text = |bytes: &[u8]| std::str::from_utf8(bytes).unwrap().replace(prefix, "PREFIX");
            let json = |bytes: &[u8]| serde_json::from_str(&text(bytes)).unwrap();
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            events
                .entry(message.topic()[prefix.len() + 1..].to_owned())
                .or_default()
                .push(Event {
                    key: message.key().map(json),
                    value: message.payload().map(json),
                    headers: headers
                        .map(|header| (header.key.to_owned(), text(header.value.unwrap_or_default())))
                        .collect(),
                });
        },
    );
    events
}

/// Waits until a topic holds this many records.
async fn wait_for_events(kafka: &Kafka, prefix: &str, topic: &str, count: usize) -> Vec<Event> {
    eventually(&format!("{count} records in {prefix}.{topic}"), LIMIT, async || {
        let events = tokio::task::block_in_place(|| read_all(kafka, prefix))
            .remove(topic)
            .unwrap_or_default();
        if events.len() >= count {
            Ok(events)
        } else {
            Err(format!("{}", events.len()))
        }
    })
    .await
}

/// A capture of everything, in this format, with topics of one partition.
fn debezium_config(postgres: &Postgres, kafka: &Kafka, redis: Option<&Redis>, schemas: bool) -> CaptureConfig {
    let mut config = config(postgres, kafka, redis);
    config.format = Format::DebeziumJson {
        schemas,
        transaction_metadata: false,
    };
    config.source.tables.include = vec!["*.*".to_owned()];
    config.kafka.partitions = 1;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn the_events_are_those_of_debezium() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    client.batch_execute(SCHEMA).await.unwrap();
    client
        .batch_execute("CREATE PUBLICATION everything FOR ALL TABLES")
        .await
        .unwrap();
    let theirs_prefix = unique_name("theirs");
    let mut debezium = Debezium::start(&postgres, kafka, &theirs_prefix, "theirs", "everything").await;
    let mut config = debezium_config(&postgres, kafka, None, true);
    config.source.publication.name = "everything".to_owned();
    config.source.publication.management = PublicationManagement::External;
    config.source.heartbeat_interval_seconds = Some(1.try_into().unwrap());
    config.source.message_prefixes = vec!["*".to_owned()];
    config.format = Format::DebeziumJson {
        schemas: true,
        transaction_metadata: true,
    };
    let ours_prefix = config.kafka.topic_prefix.clone();
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;

    for (stage, statements) in WORKLOAD.split("----- then\n").enumerate() {
        for statement in statements.split_inclusive(";\n") {
            client
                .batch_execute(statement)
                .await
                .unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        client
            .execute("INSERT INTO finished VALUES ($1)", &[&i32::try_from(stage).unwrap()])
            .await
            .unwrap();
        for prefix in [&theirs_prefix, &ours_prefix] {
            wait_for_events(kafka, prefix, "public.finished", stage + 1).await;
        }
    }
    // Its producer does not keep the order of topics: only its end says that all is there.
    debezium.stop();
    runtime.terminate(LIMIT);

    let (mut theirs, ours) =
        tokio::task::block_in_place(|| (read_all(kafka, &theirs_prefix), read_all(kafka, &ours_prefix)));
    assert_eq!(theirs.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
    let mut unexplained = Vec::new();
    let mut reasons = BTreeSet::new();
    if drop_empty_transactions(theirs.get_mut("transaction").unwrap()) > 0 {
        reasons.insert(EMPTY.to_owned());
    }
    let mut compared = 0;
    for (topic, theirs) in &theirs {
        let ours = &ours[topic];
        assert_eq!(theirs.len(), ours.len(), "events of {topic}: {theirs:#?} {ours:#?}");
        for (number, (theirs, ours)) in theirs.iter().zip(ours).enumerate() {
            compared += 1;
            for difference in differences(theirs, ours) {
                match reason(topic, number, theirs, &difference) {
                    Some(reason) => drop(reasons.insert(reason)),
                    None => unexplained.push(format!("{topic} {number} {difference:?}")),
                }
            }
        }
    }
    assert!(
        unexplained.is_empty(),
        "{} differences:\n{}",
        unexplained.len(),
        unexplained.join("\n")
    );
    let gone: Vec<String> = all_reasons().difference(&reasons).cloned().collect();
    assert!(gone.is_empty(), "Debezium does this as we do now: {gone:?}");
    println!("{compared} events of {} topics are those of Debezium", theirs.len());

    let mut heartbeats = tokio::task::block_in_place(|| read_all(kafka, HEARTBEATS));
    let [theirs, ours_alive] = [&theirs_prefix, &ours_prefix].map(|prefix| heartbeats.remove(prefix).unwrap());
    let different: Vec<String> = differences(&theirs[0], &ours_alive[0])
        .into_iter()
        .map(|difference| difference.path)
        .collect();
    assert_eq!(different, ["key/payload/serverName", "value/payload/ts_ms"]);

    let unavailable = |topic: &str, number: usize| ours[topic][number].headers.get("meander-unavailable").cloned();
    assert_eq!(
        unavailable("public.extremes", 5).as_deref(),
        Some(r#"{"after":["ts"]}"#)
    );
    let large = unavailable("public.toasted", 1).unwrap();
    assert!(large.starts_with(r#"{"after":["t","v","ba","#), "{large}");
    assert_eq!(unavailable("public.toasted", 0), None);
}

/// Removes what is told of transactions without events; returns how many there were.
fn drop_empty_transactions(events: &mut Vec<Event>) -> usize {
    let payload = |event: &Event, field: &str| event.value.as_ref().unwrap()["payload"][field].clone();
    let id = |event: &Event| {
        payload(event, "id")
            .as_str()
            .unwrap()
            .split_once(':')
            .unwrap()
            .0
            .to_owned()
    };
    let empty: Vec<String> = events
        .iter()
        .filter(|event| payload(event, "event_count") == json!(0))
        .map(id)
        .collect();
    events.retain(|event| !empty.contains(&id(event)));
    empty.len()
}

#[derive(Debug)]
struct Difference {
    path: String,
    theirs: Value,
    ours: Value,
}

/// What stands for a field that is not there.
fn absent() -> Value {
    json!("<absent>")
}

fn differences(theirs: &Event, ours: &Event) -> Vec<Difference> {
    let mut out = Vec::new();
    let both = [("key", &theirs.key, &ours.key), ("value", &theirs.value, &ours.value)];
    for (path, theirs, ours) in both {
        let value = |value: &Option<Value>| value.clone().unwrap_or_else(absent);
        compare(path, &value(theirs), &value(ours), &mut out);
    }
    let headers = |event: &Event, not: &str| {
        let headers = event.headers.iter().filter(|(name, _)| !name.starts_with(not));
        json!(headers.collect::<BTreeMap<_, _>>())
    };
    compare(
        "headers",
        &headers(theirs, "__debezium.context."),
        &headers(ours, "meander-"),
        &mut out,
    );
    out
}

fn compare(path: &str, theirs: &Value, ours: &Value, out: &mut Vec<Difference>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for name in theirs.keys().chain(ours.keys()).collect::<BTreeSet<_>>() {
                let field = |object: &serde_json::Map<String, Value>| object.get(name).cloned().unwrap_or_else(absent);
                compare(&format!("{path}/{name}"), &field(theirs), &field(ours), out);
            }
        }
        // The fields of a schema, in their order but for those that only one has.
        (Value::Array(theirs), Value::Array(ours))
            if theirs.iter().all(|item| item["field"].is_string()) && !theirs.is_empty() =>
        {
            let names = |fields: &[Value]| fields.iter().map(|field| field["field"].clone()).collect::<Vec<_>>();
            let (their_names, our_names) = (names(theirs), names(ours));
            let common = |names: &[Value], others: &[Value]| -> Value {
                names.iter().filter(|name| others.contains(name)).cloned().collect()
            };
            compare(
                &format!("{path}/order"),
                &common(&their_names, &our_names),
                &common(&our_names, &their_names),
                out,
            );
            for name in their_names
                .iter()
                .chain(our_names.iter().filter(|name| !their_names.contains(name)))
            {
                let field = |fields: &[Value]| {
                    fields
                        .iter()
                        .find(|field| field["field"] == *name)
                        .cloned()
                        .unwrap_or_else(absent)
                };
                compare(
                    &format!("{path}/{}", name.as_str().unwrap()),
                    &field(theirs),
                    &field(ours),
                    out,
                );
            }
        }
        _ if theirs == ours => {}
        _ => out.push(Difference {
            path: path.to_owned(),
            theirs: theirs.clone(),
            ours: ours.clone(),
        }),
    }
}

/// Values that differ on purpose: the table, the number of the event, the field, what is ours, and why.
const VALUES: &[(&str, usize, &str, &str, &str)] = &[
    ("public.arrays", 0, "tm", "[45296123456]", "time[] to the microsecond"),
    (
        "public.arrays",
        0,
        "e",
        r#"["sad","very happy",null]"#,
        "arrays with a NULL",
    ),
    ("public.extremes", 16, "tv", r#"["'a'",null]"#, "arrays with a NULL"),
    (
        "public.extremes",
        16,
        "isa",
        r#"["0-393-04002-X",null]"#,
        "arrays with a NULL",
    ),
    (
        "public.extremes",
        10,
        "da",
        "[2146033979,-2147472691,18262]",
        "extremes in arrays",
    ),
    (
        "public.extremes",
        10,
        "tza",
        r#"["infinity","-infinity","2020-01-01T00:00:00.000000Z"]"#,
        "extremes in arrays",
    ),
    (
        "public.extremes",
        10,
        "tma",
        "[86400000000,45296999999,null]",
        "extremes in arrays",
    ),
    ("public.extremes", 11, "da", "[-735160]", "extremes in arrays"),
    (
        "public.extremes",
        11,
        "tsa",
        "[-63517824000000000]",
        "extremes in arrays",
    ),
    (
        "public.extremes",
        11,
        "tza",
        r#"["-0043-03-15T00:00:00.000000Z"]"#,
        "extremes in arrays",
    ),
    ("public.extremes", 17, "bxa", BOXES, "arrays of geometric types"),
    (
        "public.extremes",
        17,
        "lna",
        r#"[{"a":1.0,"b":2.0,"c":3.0}]"#,
        "arrays of geometric types",
    ),
    (
        "public.extremes",
        17,
        "cca",
        r#"[{"center":{"x":0.0,"y":0.0,"wkb":"AQEAAAAAAAAAAAAAAAAAAAAAAAAA","srid":null},"radius":1.0}]"#,
        "arrays of geometric types",
    ),
    (
        "public.extremes",
        17,
        "lsa",
        r#"[{"wkb":"AQIAAAACAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPA/AAAAAAAA8D8=","srid":null,"extensions":{"type":"lseg"}}]"#,
        "arrays of geometric types",
    ),
    (
        "public.extremes",
        17,
        "poa",
        r#"[{"wkb":"AQMAAAABAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPA/AAAAAAAA8D8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","srid":null,"extensions":{"type":"polygon"}}]"#,
        "arrays of geometric types",
    ),
    ("public.numbers", 0, "n5_m2", r#""ew==""#, "negative scale"),
    ("public.numbers", 1, "n5_m2", r#""/nlh""#, "negative scale"),
    ("public.numbers", 3, "n5_m2", r#""AQ==""#, "negative scale"),
    ("public.numbers", 21, "n5_m2", r#""ew==""#, "negative scale"),
    ("public.numbers", 5, "r", "1e-45", "shortest digits of float4"),
    ("public.texts", 0, "na", r#""a_name""#, "name, and quoted enums"),
    ("public.texts", 1, "na", r#""""#, "name, and quoted enums"),
    ("public.texts", 0, "em", r#""b'c""#, "name, and quoted enums"),
    ("public.texts", 1, "em", r#""a""#, "name, and quoted enums"),
    ("public.defaults", 0, "em", r#""a""#, "name, and quoted enums"),
    ("public.defaults", 1, "em", r#""a""#, "name, and quoted enums"),
    (
        "public.extremes",
        9,
        "tz",
        r#""20:00:01Z""#,
        "timetz with seconds in its offset",
    ),
    ("public.toasted", 1, "nu", UNAVAILABLE_NUMBER, "unchanged large values"),
    ("public.toasted", 1, "f", UNAVAILABLE_CODES, "unchanged large values"),
    ("public.toasted", 1, "tsa", UNAVAILABLE_CODES, "unchanged large values"),
    ("public.toasted", 4, "nu", UNAVAILABLE_NUMBER, "unchanged large values"),
    ("public.toasted", 4, "f", UNAVAILABLE_CODES, "unchanged large values"),
    ("public.toasted", 4, "tsa", UNAVAILABLE_CODES, "unchanged large values"),
    ("public.extremes", 13, "i2", "null", "arrays of more dimensions"),
    ("public.extremes", 14, "e2", "null", "arrays of more dimensions"),
    ("public.extremes", 14, "bo", "null", "arrays of more dimensions"),
    ("public.extremes", 5, "ts", "null", "timestamps beyond 64 bits"),
    ("public.unknown", 0, "ba", "\"<absent>\"", "bit(n)[]"),
];
const BOXES: &str = r#"[{"wkb":"AQMAAAABAAAABQAAAAAAAAAAAPA/AAAAAAAA8D8AAAAAAADwPwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA8D8AAAAAAADwPwAAAAAAAPA/","srid":null,"extensions":{"type":"box"}},{"wkb":"AQMAAAABAAAABQAAAAAAAAAAAABAAAAAAAAAAEAAAAAAAAAAQAAAAAAAAPA/AAAAAAAA8D8AAAAAAADwPwAAAAAAAPA/AAAAAAAAAEAAAAAAAAAAQAAAAAAAAABA","srid":null,"extensions":{"type":"box"}}]"#;
const UNAVAILABLE_NUMBER: &str = r#"{"scale":0,"value":"X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ=="}"#;
const UNAVAILABLE_CODES: &str =
    "[95,95,100,101,98,101,122,105,117,109,95,117,110,97,118,97,105,108,97,98,108,101,95,118,97,108,117,101]";

const VERSION: &str = "version";
const CLOCK: &str = "clock";
const NULL: &str = "NULL in a column with a default";
const ELEMENTS: &str = "elements are optional";
const HSTORE: &str = "order of an hstore";
const SCALE: &str = "negative scale";
const QUOTED_ENUM: &str = "name, and quoted enums";
const BIT_ARRAY: &str = "bit(n)[]";
const EMPTY: &str = "transactions without events";
const COLLECTIONS: &str = "order of data_collections";
const MESSAGES: &str = "messages are one collection";
const LEFT_OVER: &str = "time and origin of a message outside of transactions";
/// The message after a transaction from upstream: its number in the topic.
const AFTER_UPSTREAM: usize = 4;

fn all_reasons() -> BTreeSet<String> {
    let rules = [
        VERSION,
        CLOCK,
        NULL,
        ELEMENTS,
        HSTORE,
        SCALE,
        QUOTED_ENUM,
        BIT_ARRAY,
        EMPTY,
        COLLECTIONS,
        MESSAGES,
        LEFT_OVER,
    ];
    let values = VALUES.iter().map(|(.., reason)| *reason);
    rules.into_iter().chain(values).map(str::to_owned).collect()
}

/// True for two arrays with the same items in whatever order.
fn same_items(one: &Value, other: &Value) -> bool {
    let items = |value: &Value| {
        let items = value.as_array().into_iter().flatten();
        items.map(Value::to_string).collect::<BTreeSet<_>>()
    };
    items(one) == items(other)
}

/// Their `data_collections` with all messages as one: each is a collection of its own there, by what Java calls an object without a name.
fn messages_as_one(theirs: &Value) -> Value {
    let theirs = theirs.as_array().into_iter().flatten();
    let (messages, mut tables): (Vec<&Value>, Vec<&Value>) = theirs.partition(|collection| {
        let name = collection["data_collection"].as_str().unwrap();
        name.contains("$LogicalDecodingMessageId@")
    });
    let all = json!({"data_collection": "LOGICAL_DECODING_MESSAGE", "event_count": messages.len()});
    tables.extend((!messages.is_empty()).then_some(&all));
    json!(tables)
}

/// Why it differs, if it may.
fn reason(topic: &str, number: usize, theirs: &Event, difference: &Difference) -> Option<String> {
    let Difference {
        path,
        theirs: their,
        ours: our,
    } = difference;
    let parts: Vec<&str> = path.split('/').collect();
    let found = match parts[..] {
        ["value", "payload", "source", "version"] => Some(VERSION),
        ["value", "payload", "ts_ms" | "ts_us" | "ts_ns"] if our.is_i64() && topic != "transaction" => Some(CLOCK),
        ["value", "payload", "data_collections"] if same_items(their, our) => Some(COLLECTIONS),
        ["value", "payload", "data_collections"] if same_items(&messages_as_one(their), our) => Some(MESSAGES),
        ["value", "payload", "transaction", "data_collection_order"] if topic == "message" && *their == json!(1) => {
            Some(MESSAGES)
        }
        ["value", "payload", "source", "origin" | "origin_lsn"] if topic == "message" && number == AFTER_UPSTREAM => {
            our.is_null().then_some(LEFT_OVER)
        }
        ["value", "payload", "source", "ts_ms" | "ts_us" | "ts_ns"]
            if topic == "message" && number == AFTER_UPSTREAM =>
        {
            (our.as_i64() > their.as_i64()).then_some(LEFT_OVER)
        }
        ["value", "schema", .., "items", "optional"] if *our == json!(true) => Some(ELEMENTS),
        ["value", "schema", .., "n5_m2", "parameters", "scale"] if *our == json!("-2") => Some(SCALE),
        ["value", "schema", .., "em", "default"] if *our == json!("a") => Some(QUOTED_ENUM),
        ["value", "schema", .., "ba"] if topic == "public.unknown" && *our == absent() => Some(BIT_ARRAY),
        ["value", "payload", row @ ("before" | "after"), field, ..] => {
            let listed = VALUES.iter().find(|(table, event, name, value, _)| {
                // A value that is an object differs in its parts where theirs is one too.
                (*table, *event, *name) == (topic, number, field)
                    && parts.len() == 4
                    && serde_json::from_str::<Value>(value).unwrap() == *our
            });
            let rows = &theirs.value.as_ref().unwrap()["schema"]["fields"];
            let fields = &rows[usize::from(row == "after")]["fields"];
            let schema = fields
                .as_array()
                .unwrap()
                .iter()
                .find(|schema| schema["field"] == field);
            let object = |value: &Value| serde_json::from_str::<serde_json::Map<String, Value>>(value.as_str()?).ok();
            if let Some((.., reason)) = listed {
                Some(*reason)
            } else if our.is_null() && schema.is_some_and(|schema| schema["default"] == *their) {
                Some(NULL)
            } else if object(their).is_some_and(|their| Some(their) == object(our)) {
                Some(HSTORE)
            } else {
                None
            }
        }
        _ => None,
    };
    found.map(str::to_owned)
}

/// The entries of the streams of two tables and of messages: the id of each, and names and values of its fields.
async fn entries(redis: &Redis, prefix: &str) -> [Vec<(String, Vec<String>)>; 3] {
    let mut connection = redis.connection().await;
    let mut all = ["public.trades", "public.odd", "message"].map(|name| (name, Vec::new()));
    for (name, entries) in &mut all {
        *entries = redis::cmd("XRANGE")
            .arg(&[&format!("{prefix}.{name}"), "-", "+"])
            .query_async(&mut connection)
            .await
            .unwrap();
    }
    all.map(|(_, entries)| entries)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_schemas_a_record_is_the_payload_and_a_tombstone_survives_a_crash_and_reaches_redis_and_a_replay() {
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let client = postgres.client().await;
    client
        .batch_execute(
            "CREATE TABLE trades (id int PRIMARY KEY, price numeric(8, 2) NOT NULL, note text);
             CREATE TABLE odd (n numeric PRIMARY KEY)",
        )
        .await
        .unwrap();
    let mut config = debezium_config(&postgres, kafka, Some(&redis), false);
    config.source.message_prefixes = vec!["app.*".to_owned()];
    if let Some(redis) = &mut config.redis {
        redis.max_length = Some(1000);
    }
    let prefix = &config.kafka.topic_prefix;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    client
        .batch_execute(
            "BEGIN; INSERT INTO trades VALUES (1, 1.5, 'a'); UPDATE trades SET id = 2; COMMIT; DELETE FROM trades",
        )
        .await
        .unwrap();
    wait_for_events(kafka, prefix, "public.trades", 6).await;
    runtime.kill9();
    runtime.start_again();
    client
        .batch_execute(
            "SELECT pg_logical_emit_message(false, 'app.note', 'hello'); INSERT INTO trades VALUES (3, 2, NULL); INSERT INTO odd VALUES ('NaN')",
        )
        .await
        .unwrap();
    let events = wait_for_events(kafka, prefix, "public.trades", 7).await;
    let messages = wait_for_events(kafka, prefix, "message", 1).await;
    assert_eq!(messages[0].key, Some(json!({"prefix": "app.note"})));
    let message = messages[0].value.as_ref().unwrap();
    assert_eq!(message["message"], json!({"prefix": "app.note", "content": "aGVsbG8="}));

    let seen: Vec<Value> = events
        .iter()
        .map(|event| {
            let value = event.value.as_ref();
            json!([
                event.key,
                value.map(|value| [&value["op"], &value["before"], &value["after"]]),
                event.headers.get("meander-part")
            ])
        })
        .collect();
    let row = |id: i32, price: &str, note: Option<&str>| json!({"id": id, "price": price, "note": note});
    assert_eq!(
        seen,
        [
            json!([{"id": 1}, ["c", null, row(1, "AJY=", Some("a"))], null]),
            json!([{"id": 1}, ["d", row(1, "AA==", None), null], null]),
            json!([{"id": 1}, null, "1"]),
            json!([{"id": 2}, ["c", null, row(2, "AJY=", Some("a"))], "2"]),
            json!([{"id": 2}, ["d", row(2, "AA==", None), null], null]),
            json!([{"id": 2}, null, "1"]),
            json!([{"id": 3}, ["c", null, row(3, "AMg=", None)], null]),
        ]
    );
    let value = events[0].value.as_ref().unwrap();
    assert_eq!(value["source"]["table"], "trades");
    assert_eq!(value["source"]["snapshot"], "false");

    let entries = eventually("all entries are in Redis", LIMIT, async || {
        let entries = entries(&redis, prefix).await;
        let counts = entries.each_ref().map(Vec::len);
        if counts == [7, 1, 1] {
            Ok(entries)
        } else {
            Err(format!("{counts:?}"))
        }
    })
    .await;
    let [trades, odd, _] = entries.each_ref().map(|stream| {
        let fields = stream
            .iter()
            .map(|(_, fields)| fields.iter().map(String::as_str).collect());
        fields.collect::<Vec<Vec<&str>>>()
    });
    let tombstones: Vec<usize> = (0..7).filter(|at| trades[*at][5] == "default").collect();
    assert_eq!(tombstones, [2, 5]);
    let created = ["position", trades[0][1], "key", r#"{"id":1}"#, "value", trades[0][5]];
    assert_eq!(trades[0], created);
    assert_eq!(serde_json::from_str::<Value>(trades[0][5]).unwrap()["op"], "c");
    assert_eq!(trades[1][6..], ["__DEBEZIUM.NEWKEY", r#"{"id":2}"#]);
    assert_eq!(trades[3][6..], ["__DEBEZIUM.OLDKEY", r#"{"id":1}"#]);
    assert_eq!(odd[0][2..4], ["key", "default"]);
    assert_eq!(odd[0][6..], ["MEANDER-UNAVAILABLE", r#"{"key":["n"],"after":["n"]}"#]);

    // What is filled again from Kafka is the same to the last field.
    redis::cmd("FLUSHALL")
        .exec_async(&mut redis.connection().await)
        .await
        .unwrap();
    eventually("the entries are there again", LIMIT, async || {
        let again = self::entries(&redis, prefix).await;
        if again == entries {
            Ok(())
        } else {
            Err(format!("{again:?}"))
        }
    })
    .await;

    // A replay carries what is stored, tombstones too.
    let mut replay = Runtime::replay(&ReplayConfig {
        job: ResourceIdentity {
            name: unique_name("job"),
            ..config.pipeline.clone()
        },
        pipeline: config.pipeline.clone(),
        slot_name: config.source.slot_name.clone(),
        kafka: config.kafka.log(),
        from: ReplayStart::Beginning,
        to: ReplayEnd::Now,
        speed: Speed::Max,
        suspended: false,
        filter: None,
        max_gap_seconds: None,
        order: ReplayOrder::Commit,
        target: ReplayTarget::Log,
        operator: None,
        admin_address: free_address(),
        termination_message_file: None,
    });
    assert!(replay.process().wait(LIMIT).success());
    let log = std::fs::read_to_string(replay.process().log()).unwrap();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let replayed: Vec<Value> = lines
        .filter(|line| line["commitTime"].is_string())
        .map(|line| json!([line["key"], line["value"]["op"], line["part"]]))
        .collect();
    let mut stored: Vec<Value> = seen
        .iter()
        .map(|event| {
            let part = event[2].as_str().map_or(0, |part| part.parse::<u32>().unwrap());
            json!([event[0], event[1][0], part])
        })
        .collect();
    stored.insert(6, json!([{"prefix": "app.note"}, "m", 0]));
    stored.push(json!([null, "c", 0]));
    assert_eq!(replayed, stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_in_chunks_reads_each_row_once_through_a_crash_and_before_its_changes() {
    const ROWS: usize = 100_000;
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let client = postgres.client().await;
    client
        .batch_execute(&format!(
            "CREATE TABLE trades (id int PRIMARY KEY, note text);
             INSERT INTO trades SELECT n, repeat('x', 200) FROM generate_series(1, {ROWS}) n"
        ))
        .await
        .unwrap();
    let mut config = debezium_config(&postgres, kafka, None, false);
    config.source.snapshot.mode = SnapshotMode::Incremental;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    eventually("some rows are read", LIMIT, async || {
        let snapshot = checkpoint(&config).ok_or("no checkpoint yet")?.snapshot;
        assert!(
            snapshot.done.is_empty(),
            "the reading was over too soon to show anything"
        );
        match snapshot.reading {
            Some(cursor) if cursor.rows > 0 => Ok(()),
            _ => Err("not yet"),
        }
    })
    .await;
    client
        .batch_execute("UPDATE trades SET note = 'changed' WHERE id % 10 = 0; DELETE FROM trades WHERE id % 10 = 1")
        .await
        .unwrap();
    runtime.kill9();
    runtime.start_again();
    let topic = "public.trades";
    eventually("the rows are read", LIMIT, async || {
        match checkpoint(&config).unwrap().snapshot.done.len() {
            0 => Err("not yet"),
            _ => Ok(()),
        }
    })
    .await;
    let changes = ROWS / 10;
    let count = |events: &[Event], op: &str| {
        let is = |event: &&Event| event.value.as_ref().is_some_and(|value| value["op"] == op);
        events.iter().filter(is).count()
    };
    let events = eventually("the changes are in Kafka", LIMIT, async || {
        let events = tokio::task::block_in_place(|| read_all(kafka, &config.kafka.topic_prefix));
        match events.into_iter().find(|(name, _)| name == topic) {
            Some((_, events)) if count(&events, "d") == changes => Ok(events),
            _ => Err("not yet"),
        }
    })
    .await;
    assert_eq!(
        (count(&events, "u"), count(&events, "d"), count(&events, "c")),
        (changes, changes, 0)
    );
    let mut rows: BTreeMap<i64, String> = BTreeMap::new();
    let (mut read, mut deleted) = (BTreeSet::new(), BTreeSet::new());
    for event in &events {
        let id = event.key.as_ref().unwrap()["id"].as_i64().unwrap();
        let Some(value) = &event.value else { continue };
        let incremental = value["source"]["snapshot"] == "incremental";
        assert_eq!(incremental, value["op"] == "r", "{value}");
        if value["op"] == "d" {
            rows.remove(&id);
            deleted.insert(id);
            continue;
        }
        let note = value["after"]["note"].as_str().unwrap();
        if value["op"] == "r" {
            assert!(read.insert(id), "{id} is read twice");
            assert!(!deleted.contains(&id), "{id} was gone");
            assert!(rows.get(&id).is_none_or(|known| known == note), "{id} is stale");
        }
        rows.insert(id, note.to_owned());
    }
    let table = client.query("SELECT id::bigint, note FROM trades", &[]).await.unwrap();
    let table: BTreeMap<i64, String> = table.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(rows == table, "{} rows, not {}", rows.len(), table.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_told_of_once_and_counted_right_though_the_capture_died_in_the_middle_of_it() {
    const ROWS: u64 = 120_000;
    let (postgres, redis, kafka) = (Postgres::start(&[]).await, Redis::start().await, Kafka::shared().await);
    let client = postgres.client().await;
    client
        .batch_execute("CREATE TABLE many (id int PRIMARY KEY, filler text); CREATE TABLE few (id int PRIMARY KEY)")
        .await
        .unwrap();
    let mut config = debezium_config(&postgres, kafka, Some(&redis), false);
    config.format = Format::DebeziumJson {
        schemas: false,
        transaction_metadata: true,
    };
    config.source.message_prefixes = vec!["app".to_owned()];
    let prefix = &config.kafka.topic_prefix;
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    client
        .batch_execute(&format!(
            "BEGIN; INSERT INTO few VALUES (1); SELECT pg_logical_emit_message(true, 'app', ''); INSERT INTO many SELECT i, repeat('x', 200) FROM generate_series(1, {ROWS}) i;
             UPDATE few SET id = 2; COMMIT"
        ))
        .await
        .unwrap();
    // The beginning, the rows of both tables, the message, and the end take an ordinal each.
    let last = ROWS + 4;
    let mut reached = 0;
    for _ in 0..2 {
        eventually("the capture is further in the transaction", LIMIT, async || {
            let published = checkpoint(&config).and_then(|checkpoint| checkpoint.published);
            let ordinal = published.map_or(0, |published| published.ordinal);
            if ordinal > reached { Ok(()) } else { Err(ordinal) }
        })
        .await;
        runtime.kill9();
        reached = checkpoint(&config).unwrap().published.unwrap().ordinal;
        assert!(reached < last, "it died in the middle");
        runtime.start_again();
    }
    let told = wait_for_events(kafka, prefix, "transaction", 2).await;
    let mut connection = redis.connection().await;
    for (stream, entries) in [
        ("transaction", 2),
        ("message", 1),
        ("public.few", 4),
        ("public.many", ROWS),
    ] {
        eventually("Redis has everything once", LIMIT, async || {
            let length: redis::RedisResult<u64> = redis::cmd("XLEN")
                .arg(format!("{prefix}.{stream}"))
                .query_async(&mut connection)
                .await;
            if length.as_ref() == Ok(&entries) {
                Ok(())
            } else {
                Err(format!("{stream}: {length:?}"))
            }
        })
        .await;
    }
    runtime.terminate(LIMIT);
    let events = ROWS + 4;
    let told: Vec<Value> = told
        .iter()
        .map(|event| {
            let value = event.value.as_ref().unwrap();
            json!([value["status"], value["event_count"], value["data_collections"]])
        })
        .collect();
    assert_eq!(
        told,
        [
            json!(["BEGIN", null, null]),
            json!(["END", events, [
                {"data_collection": "LOGICAL_DECODING_MESSAGE", "event_count": 1},
                {"data_collection": "public.few", "event_count": 3},
                {"data_collection": "public.many", "event_count": ROWS},
            ]]),
        ]
    );
    let mut all = tokio::task::block_in_place(|| read_all(kafka, prefix));
    let mut orders = Vec::new();
    for (topic, count) in [("message", 1), ("public.few", 3), ("public.many", ROWS)] {
        let blocks: Vec<Value> = all
            .remove(topic)
            .unwrap()
            .into_iter()
            .filter_map(|event| Some(event.value?["transaction"].take()))
            .collect();
        let of_table: Vec<u64> = blocks
            .iter()
            .map(|block| block["data_collection_order"].as_u64().unwrap())
            .collect();
        assert_eq!(of_table, (1..=count).collect::<Vec<_>>(), "{topic}");
        orders.extend(blocks.iter().map(|block| block["total_order"].as_u64().unwrap()));
    }
    orders.sort_unstable();
    assert_eq!(orders, (1..=events).collect::<Vec<_>>());
    let state = checkpoint(&config).unwrap();
    assert_eq!(
        state.events_total,
        ROWS + 3,
        "changes and the message, and neither beginning nor end"
    );
    assert_eq!(state.published.unwrap().ordinal, last);
}
