//! Whether the slot on a server that `pg_upgrade` made is the one that `pg_upgrade` made there, before anybody else could write.
//!
//! As its last step but one, `pg_upgrade` has `pg_resetwal` begin new WAL; then it starts the server for itself alone, and makes each
//! logical slot of the old server again at the place where the new one is. So the segment that the slot stands in begins with the
//! record that `pg_resetwal` writes, which is the first of all and has none before it, and no record from there to the slot belongs to a
//! transaction. That is read from the WAL itself: a slot that was made later by hand, or moved, has transactions before it.

use meander_config::PostgresSource;

use crate::{
    position::Lsn,
    source::postgres::{
        preflight::{Catalog, Credentials, SourceError, wire_failure},
        start::SlotState,
        wire::{ReplicationConnection, WireError},
    },
};

/// The most WAL that is read. What `pg_upgrade` itself causes is a small part of it.
const LONGEST: u64 = 16 << 20;

/// Lengths and flags of `src/include/access/xlog_internal.h` and `xlogrecord.h`, which have been the same since version 9.5.
const SHORT_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
const IS_LONG: u16 = 2;
const RECORD_HEADER: usize = 24;
const ALIGNMENT: usize = 8;
/// The resource manager of logical messages, which need no transaction.
const LOGICAL_MESSAGES: u8 = 21;

/// Up to where nothing was written since the server's WAL was made anew: the place of the slot. None if that is not certain.
///
/// # Errors
/// When the server does not answer. That it refuses is no error, and makes nothing certain.
pub async fn untouched_to(
    source: &PostgresSource,
    credentials: &Credentials,
    catalog: &Catalog,
    slot: &SlotState,
) -> Result<Option<Lsn>, SourceError> {
    let Some(place) = slot.confirmed_flush else {
        return Ok(None);
    };
    let from = Lsn(place.0 - place.0 % catalog.wal_segment_size().await?);
    if place.0 - from.0 > LONGEST {
        return Ok(None);
    }
    let wire = |error| wire_failure(source, &credentials.user, error);
    let connection = ReplicationConnection::connect(source, credentials)
        .await
        .map_err(wire)?;
    match connection.read_wal(from, place).await {
        Ok(wal) => Ok(is_untouched(&wal, from).then_some(place)),
        Err(error @ WireError::Server { .. }) => {
            tracing::warn!(%error, "whether pg_upgrade made the slot cannot be seen in the WAL");
            Ok(None)
        }
        Err(error) => Err(wire(error)),
    }
}

/// True if these whole records, from the beginning of a segment on, begin with the first one that the server ever wrote, and none of
/// them is a transaction's.
fn is_untouched(wal: &[u8], from: Lsn) -> bool {
    only_others(wal, from) == Some(())
}

fn only_others(wal: &[u8], from: Lsn) -> Option<()> {
    let records = without_page_headers(wal, from)?;
    let mut at = 0;
    while at < records.len() {
        let record = &records[at..];
        let length = u32_at(record, 0)? as usize;
        let is_transactions = u32_at(record, 4)? != 0;
        let follows = u64_at(record, 8)? != 0;
        let manager = *record.get(17)?;
        if length < RECORD_HEADER || is_transactions || manager == LOGICAL_MESSAGES || follows != (at > 0) {
            return None;
        }
        at += length.next_multiple_of(ALIGNMENT);
    }
    // The last one ends where the slot stands, and there is at least that of the checkpoint.
    (at > 0 && at == records.len()).then_some(())
}

/// The pages' contents; none if these are no pages of these places, as those of a server with another order of bytes.
fn without_page_headers(wal: &[u8], from: Lsn) -> Option<Vec<u8>> {
    let block = u32_at(wal, 36).filter(|block| block.is_power_of_two() && *block as usize > LONG_HEADER)?;
    let mut contents = Vec::with_capacity(wal.len());
    let mut place = from.0;
    for page in wal.chunks(block as usize) {
        let is_long = u16::from_le_bytes([*page.get(2)?, *page.get(3)?]) & IS_LONG != 0;
        if u64_at(page, 8)? != place || is_long != (place == from.0) {
            return None;
        }
        contents.extend_from_slice(page.get(if is_long { LONG_HEADER } else { SHORT_HEADER }..)?);
        place += u64::from(block);
    }
    Some(contents)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Lsn = Lsn(0x0200_0000);
    const BLOCK: usize = 8192;

    /// A segment's beginning with these records: transaction, resource manager, length.
    fn wal(records: &[(u32, u8, usize)]) -> Vec<u8> {
        let mut wal = Vec::new();
        let page = |wal: &mut Vec<u8>| {
            if wal.len().is_multiple_of(BLOCK) {
                let (flags, length) = if wal.is_empty() {
                    (IS_LONG, LONG_HEADER)
                } else {
                    (0, SHORT_HEADER)
                };
                let mut header = vec![0; length];
                header[2..4].copy_from_slice(&flags.to_le_bytes());
                header[8..16].copy_from_slice(&(FROM.0 + wal.len() as u64).to_le_bytes());
                if length == LONG_HEADER {
                    header[36..40].copy_from_slice(&(BLOCK as u32).to_le_bytes());
                }
                wal.extend(header);
            }
        };
        for (index, (transaction, manager, length)) in records.iter().enumerate() {
            let mut record = vec![0; length.next_multiple_of(ALIGNMENT)];
            record[..4].copy_from_slice(&(*length as u32).to_le_bytes());
            record[4..8].copy_from_slice(&transaction.to_le_bytes());
            record[8..16].copy_from_slice(&(index as u64).to_le_bytes());
            record[17] = *manager;
            for byte in record {
                page(&mut wal);
                wal.push(byte);
            }
        }
        wal
    }

    #[test]
    fn only_what_follows_on_new_wal_without_any_transaction_is_untouched() {
        let made = [(0, 0, 114), (0, 0, 50), (0, 0, 8193), (0, 8, 50)];
        assert!(is_untouched(&wal(&made), FROM));
        for (what, written) in [
            ("a transaction", (742, 10, 60)),
            ("a message", (0, LOGICAL_MESSAGES, 60)),
        ] {
            let touched = [&made[..], &[written], &made[3..]].concat();
            assert!(!is_untouched(&wal(&touched), FROM), "{what}");
        }
        // The segment goes on from another one.
        let mut follows = wal(&made);
        follows[LONG_HEADER + 8] = 1;
        assert!(!is_untouched(&follows, FROM));
    }

    #[test]
    fn what_is_cut_or_of_another_place_says_nothing_and_breaks_nothing() {
        let whole = wal(&[(0, 0, 114), (0, 8, 9000)]);
        assert!(is_untouched(&whole, FROM));
        assert!(!is_untouched(&whole, Lsn(FROM.0 + 1)));
        for length in 0..whole.len() {
            assert!(
                !is_untouched(&whole[..length], FROM) || length == LONG_HEADER + 120,
                "{length}"
            );
        }
        for at in [0, 2, 8, 36, LONG_HEADER, LONG_HEADER + 3] {
            let mut other = whole.clone();
            other[at] ^= 0xff;
            assert!(!is_untouched(&other, FROM) || at == 0, "{at}");
        }
    }
}
