//! A subscriber that survives its own death: what it has taken, and where it goes on, are one line of a file.

use std::{
    fs::{self, File},
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
};

use anyhow::Context as _;
use meander_proto::v1::{ReplayEvent, ReplayRequest, replayer_client::ReplayerClient};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use crate::receive::position;

/// One message, as a line of the ledger.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// Position and part of each record.
    pub records: Vec<(String, u32)>,
    /// Where it goes on.
    pub resume_token: String,
}

/// Takes the replay to its end, from where the ledger ends.
///
/// # Errors
/// When the stream breaks, or the ledger cannot be written.
pub async fn run(endpoint: &str, token_file: &Path, ledger: &Path, credit: u32) -> anyhow::Result<()> {
    let (mut ledger, resume_token) = open(ledger).with_context(|| format!("cannot use {}", ledger.display()))?;
    let token = fs::read_to_string(token_file).with_context(|| format!("cannot read {}", token_file.display()))?;
    let mut client = ReplayerClient::connect(endpoint.to_owned()).await?;
    let (requests, sent) = mpsc::channel(16);
    requests.send(ReplayRequest { resume_token, credit }).await?;
    let mut request = Request::new(ReceiverStream::new(sent));
    let authorization = format!("Bearer {}", token.trim()).parse()?;
    request.metadata_mut().insert("authorization", authorization);
    let mut events = client.replay_event(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        note(&mut ledger, &event)?;
        let taken = ReplayRequest {
            resume_token: event.resume_token,
            credit: 1,
        };
        // If the stream has broken, its next message says so.
        let _ = requests.send(taken).await;
    }
    Ok(())
}

/// The ledger, and where it ends. A line that was not finished is none.
fn open(path: &Path) -> anyhow::Result<(File, String)> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    let text = fs::read_to_string(path)?;
    let end = text.rfind('\n').map_or(0, |last| last + 1);
    let last = text[..end].lines().next_back();
    let resume_token = match last {
        Some(line) => serde_json::from_str::<Line>(line)?.resume_token,
        None => String::new(),
    };
    file.set_len(u64::try_from(end)?)?;
    file.seek(SeekFrom::End(0))?;
    Ok((file, resume_token))
}

fn note(ledger: &mut File, event: &ReplayEvent) -> anyhow::Result<()> {
    let records = event.records.iter();
    let line = Line {
        records: records
            .filter_map(|record| record.coordinate.as_ref())
            .map(|coordinate| (position(coordinate), coordinate.part))
            .collect(),
        resume_token: event.resume_token.clone(),
    };
    let mut line = serde_json::to_vec(&line)?;
    line.push(b'\n');
    Ok(ledger.write_all(&line)?)
}
