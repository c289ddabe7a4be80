//! Records that would be too large for their topic: they are made without their large values, which are marked as left out.
//!
//! Which of them is published is not decided here, but by `onOversizedRow`.

use crate::{
    batch::{Batch, Destination, Mark, Oversized},
    log::OVERSIZED_HEADER,
    position::Position,
    size_limit::{LARGE_BYTES, SizeLimit},
    source::{Change, Relation},
};

/// Appends a record of a change by `write`, which leaves out values of more than so many bytes, those of the key excepted: none of them,
/// if the topic takes it so, and otherwise no more than it has to.
///
/// # Errors
/// Those of `write`.
pub(super) fn fit<E>(
    batch: &mut Batch,
    change: &Change<'_>,
    destination: &Destination,
    mut write: impl FnMut(&mut Batch, usize) -> Result<(), E>,
) -> Result<(), E> {
    let mark = batch.mark();
    write(batch, usize::MAX)?;
    let limit = &destination.limit;
    let bytes = batch.since(&mark).len();
    if bytes >= LARGE_BYTES {
        batch.kafka_first = true;
    }
    if limit.takes(batch.since(&mark)) {
        return Ok(());
    }
    let mut most = usize::try_from(limit.bytes()).unwrap_or(usize::MAX);
    let fits = loop {
        most /= 2;
        batch.rewind(&mark);
        write(batch, most)?;
        batch.header(OVERSIZED_HEADER, |out| {
            out.extend_from_slice(bytes.to_string().as_bytes())
        });
        if limit.takes(batch.since(&mark)) || most == 0 {
            break limit.takes(batch.since(&mark));
        }
    };
    let Relation { oid, schema, table, .. } = &**change.relation;
    batch.oversized.push(Oversized {
        oid: *oid,
        table: format!("{schema}.{table}"),
        topic: destination.topic.clone(),
        position: change.position,
        bytes: bytes as u64,
        limit: limit.bytes(),
        fits,
    });
    Ok(())
}

/// Notes it if the records since `mark` are larger than their topic takes, and cannot be made smaller.
pub(crate) fn judge(batch: &mut Batch, mark: &Mark, what: &str, position: Position, destination: &Destination) {
    let limit: &SizeLimit = &destination.limit;
    let content = batch.since(mark);
    if !limit.takes(content) {
        let bytes = content.len() as u64;
        batch.oversized.push(Oversized {
            oid: 0,
            table: what.to_owned(),
            topic: destination.topic.clone(),
            position,
            bytes,
            limit: limit.bytes(),
            fits: false,
        });
    }
}
