//! Makes changes that can be checked, and receives replays.
//!
//! [`ledger`] has PostgreSQL note each change in the transaction that makes it, [`load`] makes changes, and [`receive`] takes
//! and judges a replay. What arrived in Kafka and Redis is compared with the ledger by `tests/verifier`.

pub mod ledger;
pub mod load;
pub mod receive;
pub mod subscribe;
