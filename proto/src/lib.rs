//! The Protobuf messages and gRPC services of Meander.
//!
//! They are generated from `proto/meander/v1/*.proto`, which carry the documentation. [`FinalWord`] is what of them goes another way.

mod word;

pub use word::FinalWord;

/// Package `meander.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("meander.v1");
}

/// With UNAVAILABLE, what an operator answers that does not hold the lease.
pub const NO_LEADER: &str = "this operator does not lead; try again";

/// The descriptors of every file, as gRPC server reflection wants them.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/meander.v1.bin"));
