//! Delivers nothing, and so tells what a replay would deliver.

use tokio::sync::mpsc;

use super::{Batch, Tally, Target, TargetError};

/// Takes everything at once, and drops it.
pub struct DryRun;

impl Target for DryRun {
    const PACED: bool = false;

    async fn run(self, mut batches: mpsc::Receiver<Batch>, tally: Tally) -> Result<(), TargetError> {
        tally.open();
        while let Some(batch) = batches.recv().await {
            tally.credit(&batch.mark);
        }
        Ok(())
    }
}
