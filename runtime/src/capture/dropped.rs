//! Looks which of the tables that the log knows are gone, and has that told in the log.

use std::collections::HashSet;

use tokio::sync::watch;

use crate::source::postgres::{
    dropped::Missing,
    preflight::{Catalog, SourceError},
};

/// What a session has seen of it.
pub(super) struct Dropped {
    /// Tables that the log knows.
    known: watch::Receiver<HashSet<u32>>,
    /// A look before.
    before: Option<Missing>,
    /// Tables that were told, and that the log still knows.
    told: HashSet<u32>,
}

impl Dropped {
    pub(super) fn new(known: watch::Receiver<HashSet<u32>>) -> Self {
        Self {
            known,
            before: None,
            told: HashSet::new(),
        }
    }

    /// To be called by the slot's owner every few seconds.
    pub(super) async fn look(&mut self, catalog: &Catalog) -> Result<(), SourceError> {
        let known: Vec<u32> = {
            let known = self.known.borrow();
            self.told.retain(|oid| known.contains(oid));
            known.difference(&self.told).copied().collect()
        };
        let now = catalog.missing(&known).await?;
        if let Some(before) = &self.before {
            let Some(gone) = now.for_good(before) else {
                return Ok(());
            };
            catalog.tell_dropped(&gone).await?;
            self.told.extend(gone);
        }
        self.before = Some(now);
        Ok(())
    }
}
