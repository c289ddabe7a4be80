//! The Protobuf messages and gRPC services of Meander.
//!
//! Everything here is generated from `proto/meander/v1/*.proto`, which carry the documentation.

/// Package `meander.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("meander.v1");
}

/// The descriptors of every file, as gRPC server reflection wants them.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/meander.v1.bin"));
