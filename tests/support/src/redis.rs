//! Redis.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use redis::aio::MultiplexedConnection;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::{
    ports::free_port,
    process::{Process, folder},
    tls::Identity,
};

const LIMIT: Duration = Duration::from_secs(120);

/// A Redis server that keeps nothing on disk by itself: it is empty after every start, unless it was told SAVE or to keep more.
pub struct Redis {
    process: Process,
    port: u16,
    tls_port: u16,
    folder: TempDir,
}

impl Redis {
    /// Starts a server.
    pub async fn start() -> Self {
        Self::launch(&[], None).await
    }

    /// Starts a server with more arguments.
    pub async fn start_with(arguments: &[&str]) -> Self {
        Self::launch(arguments, None).await
    }

    /// Starts a server that has a second port, [`tls_port`](Self::tls_port), for TLS with this certificate.
    pub async fn start_secure(certificate: &Identity) -> Self {
        Self::launch(&[], Some(certificate)).await
    }

    async fn launch(arguments: &[&str], certificate: Option<&Identity>) -> Self {
        let folder = folder("redis");
        let port = free_port();
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
        ]);
        command.arg(folder.path()).args(arguments);
        let tls_port = free_port();
        if let Some(certificate) = certificate {
            command.args(["--tls-port", &tls_port.to_string(), "--tls-auth-clients", "no"]);
            command.arg("--tls-cert-file").arg(&certificate.certificate_file);
            command.arg("--tls-key-file").arg(&certificate.key_file);
            // Asked for though no client has to show a certificate.
            command.arg("--tls-ca-cert-file").arg(&certificate.certificate_file);
        }
        // What is to be kept is on disk already, so the quick end loses nothing.
        let process = Process::start("redis", folder.path(), &command, Signal::KILL);
        fs::write(folder.path().join("url"), format!("redis://127.0.0.1:{port}/0")).unwrap();
        let mut redis = Self {
            process,
            port,
            tls_port,
            folder,
        };
        redis.ready().await;
        redis
    }

    /// The port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port for TLS.
    #[must_use]
    pub fn tls_port(&self) -> u16 {
        self.tls_port
    }

    /// `redis://…`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// A file that holds the URL, as the runtime's configuration names it.
    #[must_use]
    pub fn url_file(&self) -> PathBuf {
        self.folder.path().join("url")
    }

    /// A connection.
    ///
    /// # Panics
    /// When the server does not answer.
    pub async fn connection(&self) -> MultiplexedConnection {
        self.try_connection()
            .await
            .unwrap_or_else(|error| panic!("redis: {error}"))
    }

    /// Ends the server; what it has not on disk is lost.
    pub fn stop(&mut self) {
        self.process.kill9();
    }

    /// Starts the server at the same port again, with what it has on disk; ends it first if it runs.
    pub async fn restart(&mut self) {
        self.process.kill9();
        self.process.start_again();
        self.ready().await;
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process, for whoever wants to hurt it in other ways.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    async fn try_connection(&self) -> redis::RedisResult<MultiplexedConnection> {
        redis::Client::open(self.url())?
            .get_multiplexed_async_connection()
            .await
    }

    async fn ready(&mut self) {
        let client = redis::Client::open(self.url()).unwrap();
        self.process
            .ready(LIMIT, async || {
                let mut connection = client
                    .get_multiplexed_async_connection()
                    .await
                    .map_err(|error| error.to_string())?;
                redis::cmd("PING")
                    .query_async::<String>(&mut connection)
                    .await
                    .map_err(|error| error.to_string())
            })
            .await;
    }
}
