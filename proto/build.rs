//! Generates the messages and services, and the descriptor set that gRPC reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let files = [
        "meander/v1/change.proto",
        "meander/v1/replay.proto",
        "meander/v1/progress.proto",
    ];
    println!("cargo:rerun-if-changed=meander");
    // protox compiles .proto files in Rust, so that building needs no protoc.
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("meander.v1.bin"), descriptors.encode_to_vec())?;
    let mut build = tonic_prost_build::configure().bytes(".meander.v1.ReplayedRecord");
    // What a replay's last word holds, which is JSON; it says its phase by name.
    for message in ["ReplayProgress", "ResolvedRange", "TopicProgress", "OtherTopics"] {
        build = build.message_attribute(
            format!(".meander.v1.{message}"),
            "#[derive(serde::Serialize, serde::Deserialize)] #[serde(rename_all = \"camelCase\", default)]",
        );
    }
    build
        .field_attribute(".meander.v1.ReplayProgress.phase", "#[serde(skip)]")
        .compile_fds(descriptors)?;
    Ok(())
}
