//! How the API server is asked: nothing is waited for without an end. A connection can die without a word, and a cache whose watch waits on it
//! would stay as it was for good.

use std::time::Duration;

use kube::{Client, Config, runtime::watcher};

/// The API server ends a watch after this many seconds, and it is begun anew from where it was.
const WATCH_SECONDS: u32 = 25;
/// A connection from which nothing has come for this long, although something is waited for, is given up. A watch that shows nothing is
/// shorter.
const SILENCE: Duration = Duration::from_secs(30);

/// A client that gives up what is not answered.
///
/// # Errors
/// When the configuration does not lead to a client.
pub fn client(mut config: Config) -> kube::Result<Client> {
    config.read_timeout = Some(SILENCE);
    // A connection may have been idle for as long before it is used again.
    config.reset_reader_on_write = true;
    Client::try_from(config)
}

/// How everything is watched.
pub fn watching() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}
