//! What every encrypted connection needs: the authorities to trust, and the certificate to show.
//!
//! The files are read anew for each connection, since Kubernetes replaces them when their Secret changes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use meander_config::ClientCertificate;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

/// A file is not what TLS needs.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
    /// It cannot be read.
    #[error("cannot read {path}: {error}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It holds something else.
    #[error("{path} does not hold {wanted} in PEM form")]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
    },
}

/// The certificates of the authorities in the file, or Mozilla's list where there is none, as PEM.
///
/// # Errors
/// When the file cannot be read or holds no certificate.
pub fn authorities(file: Option<&Path>) -> Result<Vec<u8>, TlsFileError> {
    let Some(path) = file else {
        return Ok(mozillas_list().into_bytes());
    };
    let pem = read(path)?;
    certificates(path, &pem)?;
    Ok(pem)
}

/// The same, for rustls.
///
/// # Errors
/// When the file cannot be read or holds no certificate.
pub fn root_store(file: Option<&Path>) -> Result<RootCertStore, TlsFileError> {
    let mut roots = RootCertStore::empty();
    match file {
        None => {
            roots.add_parsable_certificates(webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().cloned());
        }
        Some(path) => {
            for certificate in certificates(path, &read(path)?)? {
                roots.add(certificate).map_err(|_| not_certificates(path))?;
            }
        }
    }
    Ok(roots)
}

/// The certificate and its key, as PEM.
///
/// # Errors
/// When a file cannot be read or holds something else.
pub fn client_pem(client: &ClientCertificate) -> Result<(Vec<u8>, Vec<u8>), TlsFileError> {
    let certificate = read(&client.certificate_file)?;
    certificates(&client.certificate_file, &certificate)?;
    let key = read(&client.key_file)?;
    private_key(&client.key_file, &key)?;
    Ok((certificate, key))
}

/// The same, for rustls.
///
/// # Errors
/// When a file cannot be read or holds something else.
pub fn client_chain(
    client: &ClientCertificate,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsFileError> {
    let (certificate, key) = client_pem(client)?;
    Ok((
        certificates(&client.certificate_file, &certificate)?,
        private_key(&client.key_file, &key)?,
    ))
}

fn read(path: &Path) -> Result<Vec<u8>, TlsFileError> {
    fs::read(path).map_err(|error| TlsFileError::Unreadable {
        path: path.to_owned(),
        error,
    })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    match CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(not_certificates(path)),
    }
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsFileError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|_| TlsFileError::NotPem {
        path: path.to_owned(),
        wanted: "a private key without a passphrase",
    })
}

fn not_certificates(path: &Path) -> TlsFileError {
    TlsFileError::NotPem {
        path: path.to_owned(),
        wanted: "certificates",
    }
}

/// The image has no list of authorities of its own, so one comes with the program.
fn mozillas_list() -> String {
    let mut pem = String::new();
    for certificate in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        let base64 = BASE64_STANDARD.encode(certificate);
        for line in base64.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
    }
    pem
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_mozillas_list_is_trusted_and_reads_back_as_it_is() {
        let pem = authorities(None).unwrap();
        let read: Vec<_> = CertificateDer::pem_slice_iter(&pem).map(Result::unwrap).collect();
        assert_eq!(read, webpki_root_certs::TLS_SERVER_ROOT_CERTS);
        assert_eq!(root_store(None).unwrap().len(), read.len());
    }

    #[test]
    fn a_file_that_holds_something_else_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.crt");
        assert!(matches!(authorities(Some(&path)), Err(TlsFileError::Unreadable { .. })));
        fs::write(&path, "password").unwrap();
        let error = root_store(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("ca.crt does not hold certificates"), "{error}");
        assert!(!error.contains("password"), "{error}");
    }
}
