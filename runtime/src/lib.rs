//! The data plane of Meander.

pub mod admin;
pub mod batch;
pub mod capture;
pub mod checkpoint;
pub mod encode;
pub mod kafka_client;
pub mod log;
pub mod position;
pub mod progress;
pub mod replay;
pub mod schema;
pub mod sink;
pub mod size_limit;
pub mod source;
pub mod tls;
