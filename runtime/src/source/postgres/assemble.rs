//! Turns the messages of `pgoutput` into changes with coordinates.

use std::{collections::HashMap, sync::Arc};

use tokio_postgres::types::Type;

use crate::{
    log::Parting,
    position::{Epoch, Lsn, Position},
    source::{
        Change, Column, Message, MessageTransaction, Operation, Relation, TransactionMark, TransactionOrigin,
        postgres::{
            hypertable::moves_rows,
            pgoutput::{LogicalMessage, RelationMessage, Tuple},
        },
    },
};

/// The messages make no sense together. Nothing may be published after that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// A change of a table whose shape was never sent.
    #[error("a change of relation {0}, which the server never described")]
    UnknownRelation(u32),
    /// A row that does not fit its table.
    #[error("a row of {table} has {values} values, but the table {columns} columns")]
    WrongWidth {
        /// The table.
        table: String,
        /// Values of the row.
        values: usize,
        /// Columns of the table.
        columns: usize,
    },
    /// A change outside of a transaction, or a Begin or Commit where none belongs.
    #[error("{0} where it does not belong")]
    OutOfOrder(&'static str),
}

/// What a message amounts to.
pub enum Assembled<'a> {
    /// Nothing that concerns a consumer.
    Nothing,
    /// A transaction begins whose ends are marked.
    Begun(TransactionMark),
    /// Changes at consecutive ordinals: one, or as many as there are tables in a TRUNCATE.
    Changes(Changes<'a>),
    /// What an application wrote into the log. Within a transaction it takes an ordinal, as a change does. Outside of one it is complete
    /// in itself: its position is that of the last byte of its WAL record, which no commit record can start at.
    Message(Message<'a>),
    /// The transaction is complete.
    Committed {
        /// After every change of the transaction.
        complete: Position,
        /// What may be acknowledged once the transaction is durable.
        end_lsn: Lsn,
        /// Its end, where the ends of transactions are marked.
        mark: Option<TransactionMark>,
    },
}

/// The changes that one message stands for.
pub struct Changes<'a> {
    relations: &'a HashMap<u32, Arc<Relation>>,
    transaction: Transaction,
    lsn: Lsn,
    previous_end: Option<Lsn>,
    first: Position,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Row(u32, Operation<'a>),
    Truncate(crate::source::postgres::pgoutput::Oids<'a>),
}

impl Changes<'_> {
    /// Calls `take` for each change in order.
    ///
    /// # Errors
    /// The first error of `take`, or that of a change that does not fit its table.
    pub fn for_each<E: From<AssembleError>>(self, mut take: impl FnMut(Change<'_>) -> Result<(), E>) -> Result<(), E> {
        let mut one = |oid: u32, index: u64, operation: Operation<'_>| {
            let relation = self.relations.get(&oid).ok_or(AssembleError::UnknownRelation(oid))?;
            // Neither is a change of the hypertable: that a chunk is emptied, and that its rows are moved.
            let is_chunk = relation.oid != oid;
            if is_chunk && (self.transaction.moves_rows || matches!(operation, Operation::Truncate)) {
                return Ok(());
            }
            check_width(relation, &operation)?;
            take(Change {
                relation,
                schema_version: 0,
                operation,
                position: Position {
                    ordinal: self.first.ordinal + index,
                    ..self.first
                },
                commit_time_micros: self.transaction.commit_time_micros,
                transaction_id: self.transaction.xid,
                lsn: self.lsn,
                previous_end: self.previous_end,
                origin: self.transaction.origin.as_deref(),
            })
        };
        match self.kind {
            Kind::Row(oid, operation) => one(oid, 0, operation),
            Kind::Truncate(oids) => (0..)
                .zip(oids.iter())
                .try_for_each(|(index, oid)| one(oid, index, Operation::Truncate)),
        }
    }
}

fn check_width(relation: &Relation, operation: &Operation<'_>) -> Result<(), AssembleError> {
    let check = |tuple: Tuple<'_>| {
        if tuple.len() == relation.columns.len() {
            return Ok(());
        }
        Err(AssembleError::WrongWidth {
            table: format!("{}.{}", relation.schema, relation.table),
            values: tuple.len(),
            columns: relation.columns.len(),
        })
    };
    match operation {
        Operation::Insert { new } | Operation::Read { new, .. } => check(*new),
        Operation::Update { old, new } => {
            old.as_ref().map_or(Ok(()), |old| check(old.tuple()))?;
            check(*new)
        }
        Operation::Delete { old } => check(old.tuple()),
        Operation::SchemaChange { .. }
        | Operation::SourceGap { .. }
        | Operation::Truncate
        | Operation::SnapshotBegin { .. }
        | Operation::SnapshotEnd { .. } => Ok(()),
    }
}

#[derive(Clone)]
struct Transaction {
    epoch: Epoch,
    commit_lsn: Lsn,
    commit_time_micros: i64,
    xid: u32,
    next_ordinal: u64,
    origin: Option<Arc<TransactionOrigin>>,
    /// Rows are moved between the chunks of a hypertable and their compressed form.
    moves_rows: bool,
}

/// Keeps the shape of every table and the place within the open transaction.
pub struct Assembler {
    epoch: Epoch,
    /// Where the epochs before it ended, in order.
    partings: Vec<Parting>,
    /// The beginning and the end of a transaction take ordinals too.
    marks: bool,
    relations: HashMap<u32, Arc<Relation>>,
    type_names: HashMap<u32, String>,
    transaction: Option<Transaction>,
    /// Where the next message is in the WAL.
    place: Lsn,
    /// Where the last transaction ended, or the last message outside of one.
    last_end: Option<Lsn>,
}

impl Assembler {
    /// An assembler at the start of a replication stream. With `marks`, the beginning of a transaction has the ordinal 0, and its end
    /// one that is greater than those of its changes.
    #[must_use]
    pub fn new(epoch: Epoch, marks: bool) -> Self {
        Self {
            epoch,
            partings: Vec::new(),
            marks,
            relations: HashMap::new(),
            type_names: HashMap::new(),
            transaction: None,
            place: Lsn::ZERO,
            last_end: None,
        }
    }

    /// Says where the next message is in the WAL.
    pub fn at(&mut self, lsn: Lsn) {
        self.place = lsn;
    }

    /// Gives what commits before one of these places, which are in order, the epoch that ended there.
    #[must_use]
    pub fn with_partings(self, partings: Vec<Parting>) -> Self {
        Self { partings, ..self }
    }

    /// The epoch of what commits at this place.
    #[must_use]
    pub fn epoch_at(&self, commit_lsn: Lsn) -> Epoch {
        self.partings
            .iter()
            .find(|parting| commit_lsn < parting.at)
            .map_or(self.epoch, |parting| Epoch(parting.epoch))
    }

    /// True between Begin and Commit, when no position of the server may be acknowledged.
    #[must_use]
    pub fn in_transaction(&self) -> bool {
        self.transaction.is_some()
    }

    /// The table of a Relation message, with the key columns that its changes are published under.
    ///
    /// `primary_key` is asked only under REPLICA IDENTITY FULL, where the message flags every column.
    #[must_use]
    pub fn describe(&self, message: &RelationMessage<'_>, primary_key: &[String]) -> Relation {
        let full = message.replica_identity == b'f';
        // By a part of a key, rows are not told apart.
        let is_sent = |key: &String| message.columns.iter().any(|column| column.name == key);
        let has_key = primary_key.iter().all(is_sent);
        Relation {
            oid: message.oid,
            schema: message.schema.to_owned(),
            table: message.table.to_owned(),
            columns: message
                .columns
                .iter()
                .map(|column| Column {
                    name: column.name.to_owned(),
                    type_oid: column.type_oid,
                    type_name: self.type_name(column.type_oid),
                    type_modifier: column.type_modifier,
                    key: if full {
                        has_key && primary_key.iter().any(|key| key == column.name)
                    } else {
                        column.key
                    },
                })
                .collect(),
        }
    }

    fn type_name(&self, oid: u32) -> String {
        match (Type::from_oid(oid), self.type_names.get(&oid)) {
            (Some(builtin), _) => builtin.name().to_owned(),
            (None, Some(name)) => name.clone(),
            // The server names every type that is not built in before it uses it.
            (None, None) => format!("oid {oid}"),
        }
    }

    /// The shape that changes of the table have now, once it is known.
    #[must_use]
    pub fn relation(&self, oid: u32) -> Option<&Arc<Relation>> {
        self.relations.get(&oid)
    }

    /// Makes later changes of the table that the server calls `oid` use this shape. It has another OID where that is a chunk of it.
    pub fn learn(&mut self, oid: u32, relation: Relation) {
        let relation = Arc::new(relation);
        self.relations.insert(relation.oid, Arc::clone(&relation));
        self.relations.insert(oid, relation);
    }

    /// Takes the next message, other than a Relation, which goes through [`describe`](Self::describe) and [`learn`](Self::learn).
    ///
    /// # Errors
    /// When the message does not fit those before it.
    pub fn take<'a>(&'a mut self, message: &LogicalMessage<'a>) -> Result<Assembled<'a>, AssembleError> {
        match *message {
            LogicalMessage::Begin {
                final_lsn,
                commit_time_micros,
                xid,
            } => {
                if self.transaction.is_some() {
                    return Err(AssembleError::OutOfOrder("Begin"));
                }
                let mut transaction = Transaction {
                    epoch: self.epoch_at(final_lsn),
                    commit_lsn: final_lsn,
                    commit_time_micros,
                    xid,
                    next_ordinal: 0,
                    origin: None,
                    moves_rows: false,
                };
                let mark = self.mark(&transaction);
                transaction.next_ordinal += u64::from(self.marks);
                self.transaction = Some(transaction);
                Ok(mark.map_or(Assembled::Nothing, Assembled::Begun))
            }
            LogicalMessage::Commit { commit_lsn, end_lsn } => match self.transaction.take() {
                Some(transaction) if transaction.commit_lsn == commit_lsn => {
                    self.last_end = Some(end_lsn);
                    Ok(Assembled::Committed {
                        complete: Position::end_of_transaction(transaction.epoch, commit_lsn),
                        end_lsn,
                        mark: self.mark(&transaction),
                    })
                }
                _ => Err(AssembleError::OutOfOrder("Commit")),
            },
            LogicalMessage::Type { oid, schema, name } => {
                // A domain has its own OID and the name of the type that it is over.
                let name = match schema {
                    "pg_catalog" => name.to_owned(),
                    _ => format!("{schema}.{name}"),
                };
                self.type_names.insert(oid, name);
                Ok(Assembled::Nothing)
            }
            LogicalMessage::Origin { name, commit_lsn } => {
                let transaction = self.transaction.as_mut().ok_or(AssembleError::OutOfOrder("Origin"))?;
                transaction.origin = Some(Arc::new(TransactionOrigin {
                    name: name.to_owned(),
                    lsn: commit_lsn,
                }));
                Ok(Assembled::Nothing)
            }
            LogicalMessage::Relation(_) => Err(AssembleError::OutOfOrder("Relation")),
            LogicalMessage::Message {
                transactional: false,
                end_lsn,
                prefix,
                content,
            } => {
                if self.transaction.is_some() {
                    return Err(AssembleError::OutOfOrder("a message outside of transactions"));
                }
                let commit_lsn = Lsn(end_lsn.0.saturating_sub(1));
                self.last_end = Some(end_lsn);
                Ok(Assembled::Message(Message {
                    prefix,
                    content,
                    position: Position {
                        epoch: self.epoch_at(commit_lsn),
                        commit_lsn,
                        ordinal: 0,
                    },
                    lsn: end_lsn,
                    previous_end: self.last_end,
                    transaction: None,
                }))
            }
            LogicalMessage::Message {
                transactional: true,
                end_lsn,
                prefix,
                content,
            } => {
                let (transaction, position) = self.take_ordinals(1)?;
                if let (Some(moves_rows), Some(open)) = (moves_rows(prefix), &mut self.transaction) {
                    open.moves_rows = moves_rows;
                }
                Ok(Assembled::Message(Message {
                    prefix,
                    content,
                    position,
                    lsn: end_lsn,
                    previous_end: self.last_end,
                    transaction: Some(MessageTransaction {
                        commit_time_micros: transaction.commit_time_micros,
                        id: transaction.xid,
                        origin: transaction.origin,
                    }),
                }))
            }
            LogicalMessage::Insert { relation, new } => self.changes(Kind::Row(relation, Operation::Insert { new }), 1),
            LogicalMessage::Update { relation, old, new } => {
                self.changes(Kind::Row(relation, Operation::Update { old, new }), 1)
            }
            LogicalMessage::Delete { relation, old } => self.changes(Kind::Row(relation, Operation::Delete { old }), 1),
            LogicalMessage::Truncate { relations } => {
                self.changes(Kind::Truncate(relations), relations.iter().count() as u64)
            }
        }
    }

    /// What stands at the next ordinal of a transaction, if its ends are marked.
    fn mark(&self, transaction: &Transaction) -> Option<TransactionMark> {
        self.marks.then_some(TransactionMark {
            position: Position {
                epoch: transaction.epoch,
                commit_lsn: transaction.commit_lsn,
                ordinal: transaction.next_ordinal,
            },
            transaction_id: transaction.xid,
            commit_time_micros: transaction.commit_time_micros,
            lsn: self.place,
        })
    }

    fn changes<'a>(&'a mut self, kind: Kind<'a>, count: u64) -> Result<Assembled<'a>, AssembleError> {
        let (transaction, first) = self.take_ordinals(count)?;
        Ok(Assembled::Changes(Changes {
            relations: &self.relations,
            transaction,
            lsn: self.place,
            previous_end: self.last_end,
            first,
            kind,
        }))
    }

    /// The next `count` ordinals of the open transaction: the position of the first.
    fn take_ordinals(&mut self, count: u64) -> Result<(Transaction, Position), AssembleError> {
        let transaction = self.transaction.as_mut().ok_or(AssembleError::OutOfOrder("a change"))?;
        let first = Position {
            epoch: transaction.epoch,
            commit_lsn: transaction.commit_lsn,
            ordinal: transaction.next_ordinal,
        };
        transaction.next_ordinal += count;
        Ok((transaction.clone(), first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::postgres::pgoutput::decode;

    fn assembler() -> Assembler {
        let mut assembler = Assembler::new(Epoch::FIRST, false);
        for oid in [1, 2] {
            let relation = Relation {
                oid,
                schema: "public".to_owned(),
                table: format!("t{oid}"),
                columns: vec![Column {
                    name: "id".to_owned(),
                    type_oid: 23,
                    type_name: "int4".to_owned(),
                    type_modifier: -1,
                    key: true,
                }],
            };
            assembler.learn(oid, relation);
        }
        assembler
    }

    fn positions(assembler: &mut Assembler, message: &[u8]) -> Result<Vec<String>, AssembleError> {
        let mut seen = Vec::new();
        if let Assembled::Changes(changes) = assembler.take(&decode(message).unwrap())? {
            changes.for_each(|change| {
                seen.push(format!("{} {}", change.position, change.relation.table));
                Ok::<_, AssembleError>(())
            })?;
        }
        Ok(seen)
    }

    const BEGIN: &[u8] = b"B\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\x05";
    const COMMIT: &[u8] = b"C\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0";
    const INSERT: &[u8] = b"I\0\0\0\x01N\0\x01t\0\0\0\x017";
    const TRUNCATE_BOTH: &[u8] = b"T\0\0\0\x02\0\0\0\0\x01\0\0\0\x02";

    #[test]
    fn ordinals_count_every_change_and_every_truncated_table() {
        let mut assembler = assembler();
        assert!(positions(&mut assembler, BEGIN).unwrap().is_empty());
        assert_eq!(positions(&mut assembler, INSERT).unwrap(), ["1:0/10:0 t1"]);
        assert_eq!(
            positions(&mut assembler, TRUNCATE_BOTH).unwrap(),
            ["1:0/10:1 t1", "1:0/10:2 t2"]
        );
        assert_eq!(positions(&mut assembler, INSERT).unwrap(), ["1:0/10:3 t1"]);
        let Assembled::Committed {
            complete,
            end_lsn,
            mark: None,
        } = assembler.take(&decode(COMMIT).unwrap()).unwrap()
        else {
            panic!("not committed");
        };
        assert_eq!(
            (complete, end_lsn),
            (Position::end_of_transaction(Epoch::FIRST, Lsn(0x10)), Lsn(0x20))
        );
        assert!(!assembler.in_transaction());
    }

    #[test]
    fn what_commits_before_timelines_parted_keeps_its_coordinate() {
        let parting = |epoch, at| Parting {
            epoch,
            at: Lsn(at),
            high_time_micros: 0,
        };
        for (partings, position) in [
            (vec![], "3:0/10:0 t1"),
            (vec![parting(1, 0x10), parting(2, 0x11)], "2:0/10:0 t1"),
            (vec![parting(1, 0x11), parting(2, 0x11)], "1:0/10:0 t1"),
            (vec![parting(1, 0xF), parting(2, 0x10)], "3:0/10:0 t1"),
        ] {
            let mut assembler = Assembler {
                epoch: Epoch(3),
                ..assembler()
            }
            .with_partings(partings);
            positions(&mut assembler, BEGIN).unwrap();
            assert_eq!(positions(&mut assembler, INSERT).unwrap(), [position]);
        }
    }

    #[test]
    fn the_ends_of_a_transaction_take_ordinals_where_they_are_marked() {
        let mut assembler = Assembler {
            marks: true,
            ..assembler()
        };
        let Assembled::Begun(begin) = assembler.take(&decode(BEGIN).unwrap()).unwrap() else {
            panic!("not begun");
        };
        assert_eq!(begin.position.to_string(), "1:0/10:0");
        assert_eq!(positions(&mut assembler, INSERT).unwrap(), ["1:0/10:1 t1"]);
        let Assembled::Committed { mark: Some(end), .. } = assembler.take(&decode(COMMIT).unwrap()).unwrap() else {
            panic!("not committed");
        };
        assert_eq!(end.position.to_string(), "1:0/10:2");
    }

    #[test]
    fn a_message_takes_an_ordinal_of_its_transaction_or_stands_for_itself() {
        let message = |transactional: u8| [&[b'M', transactional], &b"\0\0\0\0\0\0\0\x11app\0\0\0\0\x01x"[..]].concat();
        let position = |assembler: &mut Assembler, transactional| {
            let bytes = message(transactional);
            match assembler.take(&decode(&bytes).unwrap())? {
                Assembled::Message(message) => {
                    Ok::<_, AssembleError>((message.position.to_string(), message.transaction.is_some()))
                }
                _ => panic!("not a message"),
            }
        };
        let mut assembler = assembler();
        assert_eq!(position(&mut assembler, 0), Ok(("1:0/10:0".to_owned(), false)));
        assert!(position(&mut assembler, 1).is_err());
        positions(&mut assembler, BEGIN).unwrap();
        positions(&mut assembler, INSERT).unwrap();
        assert_eq!(position(&mut assembler, 1), Ok(("1:0/10:1".to_owned(), true)));
        assert_eq!(positions(&mut assembler, INSERT).unwrap(), ["1:0/10:2 t1"]);
        assert!(position(&mut assembler, 0).is_err());
    }

    #[test]
    fn a_change_that_nothing_explains_stops_the_stream() {
        assert_eq!(
            positions(&mut assembler(), INSERT),
            Err(AssembleError::OutOfOrder("a change"))
        );
        assert_eq!(
            positions(&mut assembler(), COMMIT),
            Err(AssembleError::OutOfOrder("Commit"))
        );
        let mut assembler = assembler();
        positions(&mut assembler, BEGIN).unwrap();
        assert_eq!(
            positions(&mut assembler, BEGIN),
            Err(AssembleError::OutOfOrder("Begin"))
        );
        let unknown = b"I\0\0\0\x09N\0\x01t\0\0\0\x017";
        assert_eq!(
            positions(&mut assembler, unknown),
            Err(AssembleError::UnknownRelation(9))
        );
        let wide = b"I\0\0\0\x01N\0\x02t\0\0\0\x017n";
        assert!(matches!(
            positions(&mut assembler, wide),
            Err(AssembleError::WrongWidth {
                values: 2,
                columns: 1,
                ..
            })
        ));
    }
}
