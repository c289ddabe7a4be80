//! TLS between the operator and those who call it: runtime pods, people and programs.
//!
//! The operator shows a certificate from one Secret in its namespace, which it makes and renews itself ([`issued`]) or somebody else does,
//! such as cert-manager. The authorities to trust are in the same Secret, and reach runtime pods in their ConfigMap. Whatever changes holds
//! for the next connection: nothing is restarted.

pub mod issued;
mod keeper;
pub mod served;

use std::{io, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};

pub use keeper::{Keeper, Management};

/// How long a caller may take to agree on TLS.
const GREETING: Duration = Duration::from_secs(10);
/// Callers that may be agreeing on TLS at the same time.
const HANDSHAKES: usize = 256;

/// The authorities by which runtime pods know the operator, as they are now.
#[derive(Clone, Debug)]
pub struct Trust(Option<watch::Receiver<Option<Arc<str>>>>);

impl Trust {
    /// Nothing is encrypted, and nobody proves anything.
    pub fn plain() -> Self {
        Self(None)
    }

    /// The authorities, PEM; none where nothing is encrypted, or while the operator has no certificate.
    pub fn authorities(&self) -> Option<Arc<str>> {
        self.0.as_ref()?.borrow().clone()
    }

    /// Whether the operator can be called.
    pub fn is_settled(&self) -> bool {
        self.0.as_ref().is_none_or(|authorities| authorities.borrow().is_some())
    }

    /// Waits until the operator can be called; for ever if it never can.
    pub async fn settled(&mut self) {
        if let Some(authorities) = &mut self.0
            && authorities.wait_for(Option::is_some).await.is_err()
        {
            std::future::pending().await
        }
    }

    /// Each change from now on.
    pub fn changes(&self) -> impl Stream<Item = ()> + Send + use<> {
        let changes = self.0.clone().map(WatchStream::from_changes);
        futures::stream::iter(changes).flatten().map(|_| ())
    }
}

/// Shows the certificate that the Secret held last.
#[derive(Debug)]
struct Shown(watch::Receiver<Option<Arc<CertifiedKey>>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().clone()
    }
}

/// How a server speaks gRPC over TLS with this certificate.
fn server(certificate: watch::Receiver<Option<Arc<CertifiedKey>>>) -> Result<TlsAcceptor, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Shown(certificate)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Callers that have agreed on TLS. One that does not is no more than a line in the log.
pub fn encrypted(listener: TcpListener, server: TlsAcceptor) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> {
    TcpListenerStream::new(listener)
        .map(move |connection| {
            let server = server.clone();
            async move { timeout(GREETING, server.accept(connection?)).await? }
        })
        .buffer_unordered(HANDSHAKES)
        .filter_map(async |agreed| {
            let agreed = agreed.inspect_err(|error| tracing::info!(%error, "no TLS with a caller"));
            agreed.ok().map(Ok)
        })
}
