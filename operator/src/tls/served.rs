//! What a Secret has to hold so that the operator can be called, whoever made it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::ByteString;
use pem::{EncodeConfig, LineEnding, Pem};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The data of a Secret.
pub type Data = BTreeMap<String, ByteString>;

/// The keys of a Secret of the type `kubernetes.io/tls`, as cert-manager writes it too.
pub const CERTIFICATE: &str = "tls.crt";
/// The certificate's private key.
pub const KEY: &str = "tls.key";
/// Who is to be trusted by those who connect.
pub const AUTHORITIES: &str = "ca.crt";

/// Why a Secret is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// A key is missing or empty.
    #[error(
        "it has no value for the key {0}; cert-manager writes all of tls.crt, tls.key and ca.crt where the issuer has an authority of its own, which ACME has not"
    )]
    Missing(&'static str),
    /// A key holds something else.
    #[error("its key {0} is not in PEM form, or not what it should be")]
    NotPem(&'static str),
    /// The certificate and the private key do not go together, or cannot be used.
    #[error("tls.crt and tls.key cannot be used together: {0}")]
    Pair(rustls::Error),
    /// Whoever trusts the authorities would refuse the certificate.
    #[error("who trusts its ca.crt refuses its tls.crt for {host}: {error}")]
    Refused {
        /// The name by which pods call the operator.
        host: String,
        /// Why.
        error: rustls::Error,
    },
}

/// A certificate that those who trust the bundle accept.
pub struct Served {
    /// The certificate and its key.
    pub certified: Arc<CertifiedKey>,
    /// The bundle, PEM: certificates and nothing else.
    pub authorities: String,
    /// When the certificate ends, in seconds since 1970.
    pub ends: i64,
}

impl Served {
    /// Reads a Secret's data.
    ///
    /// # Errors
    /// When a client that calls `host` could not connect now.
    pub fn read(data: &Data, host: &str, now: i64) -> Result<Self, Unusable> {
        let chain = certificates(data, CERTIFICATE)?;
        let authorities = certificates(data, AUTHORITIES)?;
        let key = PrivateKeyDer::from_pem_slice(value(data, KEY)?).map_err(|_| Unusable::NotPem(KEY))?;
        accepted(&chain, &authorities, host, now).map_err(|error| Unusable::Refused {
            host: host.to_owned(),
            error,
        })?;
        let ends = chain.first().and_then(validity).map_or(now, |(_, ends)| ends);
        let certified = CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(Unusable::Pair)?;
        Ok(Self {
            certified: Arc::new(certified),
            authorities: pem(&authorities),
            ends,
        })
    }
}

fn value<'a>(data: &'a Data, key: &'static str) -> Result<&'a [u8], Unusable> {
    let value = data.get(key).map(|value| value.0.as_slice());
    value.filter(|value| !value.is_empty()).ok_or(Unusable::Missing(key))
}

/// The certificates under a key, at least one.
pub fn certificates(data: &Data, key: &'static str) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    match CertificateDer::pem_slice_iter(value(data, key)?).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(Unusable::NotPem(key)),
    }
}

/// As PEM.
pub fn pem(certificates: &[CertificateDer<'_>]) -> String {
    let pems: Vec<Pem> = certificates
        .iter()
        .map(|certificate| Pem::new("CERTIFICATE", certificate.to_vec()))
        .collect();
    pem::encode_many_config(&pems, EncodeConfig::new().set_line_ending(LineEnding::LF))
}

/// Whether who trusts these authorities and calls `host` at that time accepts the certificate.
pub fn accepted(
    chain: &[CertificateDer<'static>],
    authorities: &[CertificateDer<'static>],
    host: &str,
    at: i64,
) -> Result<(), rustls::Error> {
    let other = |error: &dyn std::fmt::Display| rustls::Error::General(error.to_string());
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone())?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()))
        .build()
        .map_err(|error| other(&error))?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| other(&error))?;
    let (certificate, between) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
    let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(at).unwrap_or(0)));
    verifier.verify_server_cert(certificate, between, &name, &[], at)?;
    Ok(())
}

/// When a certificate begins and ends, in seconds since 1970.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(i64, i64)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    Some((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::issued::renewed;

    const NOW: i64 = 1_790_000_000;
    const HOST: &str = "operator.meander.svc";

    fn issued() -> Data {
        renewed(None, &[HOST.to_owned()], NOW).unwrap().unwrap()
    }

    #[test]
    fn what_a_pod_would_refuse_is_said_before_it_is_shown() {
        let good = issued();
        let other = issued();
        let with = |key: &str, value: &ByteString| {
            let mut data = good.clone();
            data.insert(key.to_owned(), value.clone());
            data
        };
        let text = ByteString(b"a password".to_vec());
        for (data, host, now, says) in [
            (
                with(AUTHORITIES, &ByteString::default()),
                HOST,
                NOW,
                "no value for the key ca.crt",
            ),
            (with(CERTIFICATE, &text), HOST, NOW, "key tls.crt is not in PEM form"),
            (with(KEY, &text), HOST, NOW, "key tls.key is not in PEM form"),
            (with(KEY, &other[KEY]), HOST, NOW, "cannot be used together"),
            (with(AUTHORITIES, &other[AUTHORITIES]), HOST, NOW, "refuses its tls.crt"),
            (good.clone(), "elsewhere", NOW, "elsewhere"),
            (good.clone(), HOST, NOW + 91 * 86_400, "expired"),
        ] {
            let error = Served::read(&data, host, now).err().map(|error| error.to_string());
            let error = error.unwrap_or_else(|| format!("accepted, and not: {says}"));
            assert!(error.contains(says), "{error}");
            assert!(!error.contains("password"), "{error}");
        }
    }

    #[test]
    fn nothing_but_certificates_reaches_the_pods() {
        let mut data = issued();
        let mut bundle = data[KEY].0.clone();
        bundle.extend(&data[AUTHORITIES].0);
        data.insert(AUTHORITIES.to_owned(), ByteString(bundle));
        let served = Served::read(&data, HOST, NOW).unwrap();
        assert!(
            served.authorities.starts_with("-----BEGIN CERTIFICATE-----"),
            "{}",
            served.authorities
        );
        assert_eq!(served.ends, NOW + 90 * 86_400);
    }
}
