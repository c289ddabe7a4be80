//! What is on its way to Kafka. Whoever fills the queue waits for room, which is counted in bytes: batches are as small as what came
//! together, or as large as a batch can be.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::batch::Batch;

/// Memory of the batches in the queue. A larger batch finds room in an empty one.
pub const QUEUED_BYTES: usize = 2 << 20;

/// Room is counted in these.
const UNIT: usize = 1024;
const UNITS: usize = QUEUED_BYTES / UNIT;

/// The end that fills. When it is dropped, the queue is closed.
pub struct Queue {
    batches: mpsc::UnboundedSender<Queued>,
    room: Arc<Semaphore>,
}

/// Room for one batch.
pub struct Room {
    _permit: OwnedSemaphorePermit,
}

/// A batch in the queue, with the room that it takes for as long as it lives.
pub struct Queued {
    /// The batch.
    pub batch: Arc<Batch>,
    _room: Room,
}

/// An empty queue.
#[must_use]
pub fn queue() -> (Queue, mpsc::UnboundedReceiver<Queued>) {
    let (batches, queued) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(UNITS));
    (Queue { batches, room }, queued)
}

impl Queue {
    /// True when every batch was taken out and dropped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.room.available_permits() == UNITS
    }

    /// Waits until there is room for a batch as large as this. Cancel safe.
    pub async fn room(&self, batch: &Batch) -> Room {
        let units = batch.memory().div_ceil(UNIT).min(UNITS) as u32;
        // A semaphore that nobody closes always has them in the end.
        match Arc::clone(&self.room).acquire_many_owned(units).await {
            Ok(permit) => Room { _permit: permit },
            Err(_) => std::future::pending().await,
        }
    }

    /// Puts a batch into the queue. False when nobody takes it out any more.
    pub fn put(&self, batch: Arc<Batch>, room: Room) -> bool {
        self.batches.send(Queued { batch, _room: room }).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::FutureExt as _;

    use super::*;
    use crate::{
        batch::Destination,
        position::{Epoch, Lsn, Position},
    };

    fn batch(bytes: usize) -> Arc<Batch> {
        let mut batch = Batch::new();
        let position = Position::end_of_transaction(Epoch::FIRST, Lsn(16));
        let destination = Arc::new(Destination {
            topic: "t".to_owned(),
            ..Destination::default()
        });
        let value = |out: &mut Vec<u8>| {
            out.resize(out.len() + bytes, 0);
            Ok(true)
        };
        let Ok(()) = batch.push::<Infallible>(position, 0, 0, &destination, |_| Ok(false), value);
        Arc::new(batch)
    }

    #[test]
    fn what_waits_is_bounded_by_its_memory_and_a_batch_of_any_size_fits_an_empty_queue() {
        let (queue, mut queued) = queue();
        let put = |batch: &Arc<Batch>| {
            let room = queue.room(batch).now_or_never();
            room.is_some_and(|room| queue.put(Arc::clone(batch), room))
        };
        let small = batch(QUEUED_BYTES / 64);
        let count = (0..).take_while(|_| put(&small)).count();
        assert!((32..=64).contains(&count), "{count}");
        let huge = batch(4 * QUEUED_BYTES);
        assert!(!put(&huge));
        drop(queued.try_recv());
        assert!(put(&small) && !put(&small), "one left, one has its place");
        while queued.try_recv().is_ok() {}
        assert!(queue.is_empty());
        assert!(put(&huge) && !put(&small));
        drop(queued);
        assert!(!put(&small), "nobody takes it");
    }
}
