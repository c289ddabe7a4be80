//! Certificates for services that speak TLS.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use tempfile::TempDir;

use crate::process::folder;

/// A certificate authority of the test's own, with the files that it has made.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: TempDir,
}

/// A certificate and its key, as files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate, PEM.
    pub certificate_file: PathBuf,
    /// Its private key, PEM.
    pub key_file: PathBuf,
}

impl Authority {
    /// Makes one.
    #[must_use]
    pub fn new() -> Self {
        let folder = folder("authority");
        let mut params = CertificateParams::default();
        params.distinguished_name = name("Authority of the tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(folder.path().join("ca.crt"), certificate.pem()).unwrap();
        Self {
            issuer: Issuer::new(params, key),
            folder,
        }
    }

    /// The file with its certificate.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// A certificate for a server with these host names and addresses.
    #[must_use]
    pub fn server(&self, hosts: &[&str]) -> Identity {
        self.issue(self.server_params(hosts))
    }

    /// One that has expired.
    #[must_use]
    pub fn expired_server(&self, hosts: &[&str]) -> Identity {
        let mut params = self.server_params(hosts);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
        self.issue(params)
    }

    /// A certificate for a client of this name.
    #[must_use]
    pub fn client(&self, common_name: &str) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(common_name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    fn server_params(&self, hosts: &[&str]) -> CertificateParams {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name = name("server");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params
    }

    fn issue(&self, params: CertificateParams) -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file = |ending| {
            self.folder
                .path()
                .join(format!("{}.{ending}", crate::unique_name("pair")))
        };
        let identity = Identity {
            certificate_file: file("crt"),
            key_file: file("key"),
        };
        fs::write(&identity.certificate_file, certificate.pem()).unwrap();
        fs::write(&identity.key_file, key.serialize_pem()).unwrap();
        identity
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Identity {
    /// Puts another certificate and its key where these are, as Kubernetes does when a Secret changes.
    pub fn replace_by(&self, other: &Self) {
        copy_over(&other.certificate_file, &self.certificate_file);
        copy_over(&other.key_file, &self.key_file);
    }
}

/// The owner and the mode of the file stay.
fn copy_over(from: &Path, to: &Path) {
    fs::write(to, fs::read(from).unwrap()).unwrap();
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}
