//! What a log comes to.

use std::collections::{BTreeMap, BTreeSet};

use meander_proto::v1::{Operation, Row, value::Kind};
use meander_test_support::Kafka;

#[path = "log.rs"]
#[allow(dead_code)] // What waits for a number of records is for others.
mod log;
use log::read_topic;

/// A record of the log.
#[derive(Clone, Debug)]
pub struct Entry {
    pub coordinate: (u32, u64, u64, u32),
    pub operation: Operation,
    /// One half of a change of the key.
    pub key_changed: bool,
    pub key: Option<String>,
    /// The values after the change, as text; `?` for one that the source did not say, nothing for NULL.
    pub row: Vec<String>,
    /// Id of the snapshot.
    pub snapshot: String,
    /// What the end of a snapshot says.
    pub rows: u64,
}

/// Everything that a `read_committed` consumer sees of a topic, in the order of coordinates.
pub fn read_log(kafka: &Kafka, topic: &str) -> Vec<Entry> {
    let entries: Vec<Entry> = read_topic(kafka, topic)
        .into_iter()
        .map(|(_, key, record)| {
            let at = record.coordinate.unwrap();
            let snapshot = record.snapshot.clone().unwrap_or_default();
            Entry {
                coordinate: (at.epoch, at.commit_lsn, at.ordinal, at.part),
                operation: record.operation(),
                key_changed: record.key_changed,
                key,
                row: record.after.as_ref().map(row).unwrap_or_default(),
                snapshot: snapshot.id,
                rows: snapshot.rows,
            }
        })
        .collect();
    let twice = entries.windows(2).find(|pair| pair[0].coordinate == pair[1].coordinate);
    assert!(twice.is_none(), "doubled: {twice:?}");
    entries
}

fn row(row: &Row) -> Vec<String> {
    row.values
        .iter()
        .map(|value| match &value.kind {
            None => String::new(),
            Some(Kind::Integer(number)) => number.to_string(),
            Some(Kind::Text(text)) => text.clone(),
            Some(Kind::Absent(_)) => UNSAID.to_owned(),
            Some(other) => format!("{other:?}"),
        })
        .collect()
}

/// Stands for a value that the source did not say.
pub const UNSAID: &str = "?";

/// Key to row.
pub type State = BTreeMap<String, Vec<String>>;

/// What the log comes to. Checks on the way that a row of a snapshot is never another than what the log has come to by then.
pub fn fold(log: &[Entry]) -> State {
    let mut state = State::new();
    let mut ended: BTreeSet<&str> = BTreeSet::new();
    // What the old key of a change of the key had.
    let mut moved = Vec::new();
    for entry in log {
        let Some(key) = &entry.key else {
            if entry.operation == Operation::Truncate {
                ended.extend(log.iter().filter_map(|entry| entry.key.as_deref()));
                state.clear();
            }
            continue;
        };
        let mut row = entry.row.clone();
        match entry.operation {
            Operation::Delete => {
                moved = state.remove(key).unwrap_or_default();
                ended.insert(key);
                continue;
            }
            Operation::Read => {
                assert!(!ended.contains(&key[..]), "the row had ended: {entry:?}");
                let known = state.get(key).into_iter().flatten();
                let same = known.zip(&row).all(|(known, read)| known == UNSAID || known == read);
                assert!(same, "stale: {entry:?} after {:?}", state.get(key));
            }
            Operation::Update => {
                let before = if entry.key_changed {
                    Some(&moved)
                } else {
                    state.get(key)
                };
                for (value, before) in row.iter_mut().zip(before.into_iter().flatten()) {
                    if value == UNSAID {
                        value.clone_from(before);
                    }
                }
            }
            _ => {}
        }
        ended.remove(&key[..]);
        state.insert(key.clone(), row);
    }
    state
}

/// The first difference between what the log comes to and what a table holds.
pub fn difference(log: &State, table: &State) -> Option<String> {
    let short = |row: Option<&Vec<String>>| format!("{row:?}").chars().take(200).collect::<String>();
    log.keys()
        .chain(table.keys())
        .find(|key| log.get(*key) != table.get(*key))
        .map(|key| {
            format!(
                "{key}: {} in the log, {} in the table",
                short(log.get(key)),
                short(table.get(key))
            )
        })
}

/// Panics if the log holds a key twice in one snapshot.
#[allow(dead_code)] // Not every table has a key.
pub fn assert_read_once(log: &[Entry]) {
    let mut read = BTreeSet::new();
    for entry in log.iter().filter(|entry| entry.operation == Operation::Read) {
        assert!(read.insert((&entry.snapshot, &entry.key)), "read twice: {entry:?}");
    }
}
