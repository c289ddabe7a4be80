//! A connection to the server, before anybody has signed in: TCP, and TLS as `sslMode` says.
//!
//! Both kinds of connection use it, the one for SQL and the one for replication, so that both are protected alike.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use meander_config::{PostgresServer, SslMode};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, InvalidDnsNameError, ServerName, UnixTime},
    server::ParsedCertificate,
};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
};
use tokio_postgres::tls::{ChannelBinding, TlsConnect};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::tls::{TlsFileError, client_chain, root_store};

/// What a client sends to ask for TLS: its length, and a number that is no version of the protocol.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The network failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server has no TLS.
    #[error("the server does not offer TLS")]
    TlsNotOffered,
    /// The server's certificate is not good enough for `sslMode`.
    #[error("{0}")]
    Certificate(String),
    /// No agreement on TLS.
    #[error("{0}")]
    Handshake(io::Error),
    /// A file that TLS needs.
    #[error("{0}")]
    File(#[from] TlsFileError),
    /// The certificate and the key do not fit together.
    #[error("the client certificate cannot be used: {0}")]
    ClientCertificate(rustls::Error),
    /// A host that no certificate can be for.
    #[error("{0:?} is not a host name that a certificate can be for")]
    HostName(String, #[source] InvalidDnsNameError),
}

/// A connection, encrypted or not.
pub enum Socket {
    /// As `sslMode: Disable` wants it.
    Plain(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Connects, and encrypts the connection as `sslMode` says.
///
/// # Errors
/// When the server cannot be reached, or is not as secure as asked.
pub async fn open(server: &PostgresServer) -> Result<Socket, SocketError> {
    // Before the server is bothered.
    let tls = match server.ssl_mode {
        SslMode::Disable => None,
        mode => Some(tls_config(server, mode)?),
    };
    let mut stream = TcpStream::connect((server.host.as_str(), server.port)).await?;
    stream.set_nodelay(true)?;
    // An unplugged server is noticed by the keepalives that we ask it for; this makes the kernel give up as well.
    socket2::SockRef::from(&stream).set_tcp_keepalive(
        &socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(5))
            .with_interval(Duration::from_secs(2)),
    )?;
    let Some(config) = tls else {
        return Ok(Socket::Plain(stream));
    };
    let name =
        ServerName::try_from(server.host.clone()).map_err(|error| SocketError::HostName(server.host.clone(), error))?;
    stream.write_all(&SSL_REQUEST).await?;
    // One byte and no more: whatever came after it in plain text would be taken for the start of the handshake, and fail it.
    match stream.read_u8().await? {
        b'S' => {}
        _ => return Err(SocketError::TlsNotOffered),
    }
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|error| handshake_failure(error, server))?;
    Ok(Socket::Tls(Box::new(stream)))
}

fn tls_config(server: &PostgresServer, mode: SslMode) -> Result<ClientConfig, SocketError> {
    let provider = Arc::new(ring::default_provider());
    let roots = match mode {
        SslMode::Disable | SslMode::Require => RootCertStore::empty(),
        SslMode::VerifyCa | SslMode::VerifyFull => root_store(server.ca_file.as_deref())?,
    };
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(SocketError::ClientCertificate)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { provider, roots, mode }));
    match &server.client_certificate {
        None => Ok(config.with_no_client_auth()),
        Some(client) => {
            let (chain, key) = client_chain(client)?;
            config
                .with_client_auth_cert(chain, key)
                .map_err(SocketError::ClientCertificate)
        }
    }
}

/// What the server's certificate has to prove. In every mode the server has to prove that it owns the certificate's key.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    roots: RootCertStore,
    mode: SslMode,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if matches!(self.mode, SslMode::VerifyCa | SslMode::VerifyFull) {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
            if self.mode == SslMode::VerifyFull {
                verify_server_name(&certificate, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn handshake_failure(error: io::Error, server: &PostgresServer) -> SocketError {
    let Some(rustls::Error::InvalidCertificate(problem)) = error.get_ref().and_then(|inner| inner.downcast_ref())
    else {
        return SocketError::Handshake(error);
    };
    let host = &server.host;
    SocketError::Certificate(match problem {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "it does not come from an authority in caSecretRef; put the certificate of the authority that signed it there"
                .to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
            "its subjectAltName does not hold {host:?}; name a host that it does hold, have it issued for this one, or set sslMode to VerifyCA"
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired; renew it, and have the server read it: SELECT pg_reload_conf();".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; compare the clocks of the server and of this node".to_owned()
        }
        other => format!("{other}; have it issued anew"),
    })
}

impl Socket {
    /// What binds SCRAM to this very TLS session: a digest of the server's certificate (`tls-server-end-point`, RFC 5929). A server
    /// in the middle, which has another certificate, cannot pass on what the client proves with it.
    #[must_use]
    pub fn server_end_point(&self) -> Option<Vec<u8>> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => {
                let certificate = stream.get_ref().1.peer_certificates()?.first()?;
                certificate_digest(certificate)
            }
        }
    }
}

/// The digest of a certificate by the hash that its own signature uses. None where that is none of the usual ones.
fn certificate_digest(certificate: &[u8]) -> Option<Vec<u8>> {
    /// 1.2.840.113549.1.1: RSA.
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    /// 1.2.840.10045.4.3: ECDSA with SHA-2.
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03];
    // Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE { algorithm OBJECT IDENTIFIER, … }, … }
    let (fields, _) = der_element(certificate)?;
    let (_to_be_signed, fields) = der_element(fields)?;
    let (algorithm, _) = der_element(fields)?;
    let (identifier, _) = der_element(algorithm)?;
    match identifier.split_last()? {
        (11, RSA) | (2, ECDSA) => Some(Sha256::digest(certificate).to_vec()),
        (12, RSA) | (3, ECDSA) => Some(Sha384::digest(certificate).to_vec()),
        (13, RSA) | (4, ECDSA) => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

/// The content of the first element of DER, and what comes after the element.
fn der_element(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&[_tag, first], rest) = der.split_first_chunk()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        let length = bytes.iter().try_fold(0_usize, |length, byte| {
            Some(length.checked_mul(256)? | usize::from(*byte))
        })?;
        (length, rest)
    };
    rest.split_at_checked(length)
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl tokio_postgres::tls::TlsStream for Socket {
    fn channel_binding(&self) -> ChannelBinding {
        self.server_end_point()
            .map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

/// Tells `tokio-postgres` that TLS is settled: it takes the socket as it is, and its channel binding.
pub struct Settled;

impl TlsConnect<Socket> for Settled {
    type Stream = Socket;
    type Error = Infallible;
    type Future = Ready<Result<Socket, Infallible>>;

    fn connect(self, socket: Socket) -> Self::Future {
        ready(Ok(socket))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_cut_certificate_has_no_digest() {
        for der in [
            &[][..],
            &[0x30],
            &[0x30, 0x82, 1],
            &[0x30, 0x89, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            &[0x30, 2, 0x30, 5],
        ] {
            assert_eq!(certificate_digest(der), None, "{der:?}");
        }
    }

    /// What somebody in the middle sends before the handshake must not be taken for the server's word (as in CVE-2021-23222).
    #[tokio::test]
    async fn plain_text_before_the_handshake_is_never_taken_for_the_servers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = address(listener.local_addr().unwrap().port());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 8];
            stream.read_exact(&mut request).await.unwrap();
            assert_eq!(request, SSL_REQUEST);
            // "Yes", and in the same piece AuthenticationOk and ReadyForQuery.
            stream.write_all(b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await.unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        });
        assert!(matches!(open(&address).await, Err(SocketError::Handshake(_))));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_server_without_tls_is_not_spoken_to_in_plain_text() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = address(listener.local_addr().unwrap().port());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 8];
            stream.read_exact(&mut request).await.unwrap();
            stream.write_all(b"N").await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            rest
        });
        assert!(matches!(open(&address).await, Err(SocketError::TlsNotOffered)));
        assert_eq!(server.await.unwrap(), b"", "no user, no password");
    }

    fn address(port: u16) -> PostgresServer {
        serde_json::from_value(serde_json::json!({
            "host": "127.0.0.1",
            "port": port,
            "database": "shop",
            "usernameFile": "username",
            "passwordFile": "password",
            "sslMode": "Require",
        }))
        .unwrap()
    }
}
