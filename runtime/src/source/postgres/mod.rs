//! PostgreSQL 14 to 18: a logical replication slot, read through `pgoutput`.

pub mod assemble;
pub mod details;
pub mod dropped;
pub mod hypertable;
pub mod pgoutput;
pub mod preflight;
pub mod prerequisites;
pub mod publication;
pub mod snapshot;
pub mod socket;
pub mod standbys;
pub mod start;
pub mod upgrade;
pub mod wire;
