//! The program under test, as a process.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use meander_config::{CaptureConfig, ReplayConfig};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::process::{Process, folder};

/// `meander-runtime` with a configuration file of its own.
pub struct Runtime {
    process: Process,
    admin: SocketAddr,
    /// Removed with the handle.
    _folder: TempDir,
}

impl Runtime {
    /// Starts `meander-runtime capture`; returns before it is ready.
    #[must_use]
    pub fn capture(config: &CaptureConfig) -> Self {
        Self::start("capture", config, config.admin_address, &[])
    }

    /// As [`Runtime::capture`], with variables of its environment.
    #[must_use]
    pub fn capture_with(config: &CaptureConfig, variables: &[(&str, &str)]) -> Self {
        Self::start("capture", config, config.admin_address, variables)
    }

    /// Starts `meander-runtime replay`; returns before it is ready.
    #[must_use]
    pub fn replay(config: &ReplayConfig) -> Self {
        Self::start("replay", config, config.admin_address, &[])
    }

    /// As [`Runtime::replay`], with variables of its environment.
    #[must_use]
    pub fn replay_with(config: &ReplayConfig, variables: &[(&str, &str)]) -> Self {
        Self::start("replay", config, config.admin_address, variables)
    }

    fn start(subcommand: &str, config: &impl serde::Serialize, admin: SocketAddr, variables: &[(&str, &str)]) -> Self {
        let folder = folder(subcommand);
        let file = folder.path().join("config.yaml");
        fs::write(&file, meander_config::to_yaml(config).unwrap()).unwrap();
        let mut command = Command::new(binary());
        command.arg(subcommand).arg("--config").arg(&file);
        command.envs(variables.iter().copied());
        let process = Process::start(subcommand, folder.path(), &command, Signal::TERM);
        Self {
            process,
            admin,
            _folder: folder,
        }
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Panics
    /// When it does not within `limit`, or the process ends.
    pub async fn ready(&mut self, limit: Duration) {
        let admin = self.admin;
        self.process
            .ready(limit, async || match get(admin, "/readyz").await {
                Ok((200, _)) => Ok(()),
                Ok((status, body)) => Err(format!("{status}: {body}")),
                Err(error) => Err(error.to_string()),
            })
            .await;
    }

    /// Asks the admin server, for example for `/metrics`: status and body.
    ///
    /// # Errors
    /// When there is no answer, as in the first moments after a start.
    pub async fn get(&self, path: &str) -> std::io::Result<(u16, String)> {
        get(self.admin, path).await
    }

    /// Kills it, as a crash would.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Starts it again with the same configuration.
    pub fn start_again(&mut self) {
        self.process.start_again();
    }

    /// SIGTERM, as Kubernetes sends it, and the end of the process.
    ///
    /// # Panics
    /// When it has not ended within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.process.stop(limit)
    }

    /// The most memory that the process has had in use, in MiB.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn peak_memory(&self) -> u64 {
        let id = self.process.id().expect("it runs");
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }

    /// The process: its id, its log, other signals, its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The built program. Cargo names it to the integration tests of its own package; to others it lies beside the test.
fn binary() -> PathBuf {
    let path = env::var_os("CARGO_BIN_EXE_meander-runtime").map_or_else(
        || {
            let test = env::current_exe().unwrap();
            let folder = test.parent().and_then(Path::parent).unwrap();
            folder.join("meander-runtime")
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is missing: run cargo build -p meander-runtime",
        path.display()
    );
    path
}

/// How long an answer may take: one that was stopped gives none.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

async fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    tokio::time::timeout(ANSWER_LIMIT, ask(address, path)).await?
}

/// One HTTP request; nothing that the admin server does needs more.
async fn ask(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_default();
    let body = answer
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_owned())
        .unwrap_or_default();
    Ok((status, body))
}
