//! The certificate that the operator makes for itself, and when another one takes its place.
//!
//! An authority of the operator's own signs it. Whoever connects trusts a bundle of authorities, and hears of a change of the bundle some
//! time after it was made: so a new authority is in the bundle for a day before it signs, and an old one stays there until its end. No
//! certificate is ever shown that a bundle of the day before does not know.

use std::slice;

use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;

use super::served::{self, AUTHORITIES, CERTIFICATE, Data, KEY, Served, accepted};

/// The key of a Secret under which the operator keeps the newest authority's key.
const AUTHORITY_KEY: &str = "ca.key";

const DAY: i64 = 86_400;
const AUTHORITY_LASTS: i64 = 730 * DAY;
/// Longer than a certificate lasts: none outlives its authority.
const AUTHORITY_RENEWAL: i64 = 180 * DAY;
const CERTIFICATE_LASTS: i64 = 90 * DAY;
const CERTIFICATE_RENEWAL: i64 = 30 * DAY;
/// By then every pod has the bundle with the new authority: the kubelet takes a minute or two.
const AUTHORITY_IS_KNOWN: i64 = DAY;
/// Clocks differ by less than this.
const SKEW: i64 = 3600;

/// What the Secret has to hold from `now` on, if that is not what it holds: a certificate for these names.
///
/// # Errors
/// When it cannot be made.
pub fn renewed(current: Option<&Data>, names: &[String], now: i64) -> Result<Option<Data>, rcgen::Error> {
    if let Some(current) = current.and_then(Issued::from_data)
        && let Ok(next) = current.next(names, now)
    {
        let is_new = next != current;
        let data = next.into_data();
        let is_good = names.iter().all(|name| Served::read(&data, name, now).is_ok());
        // What somebody has spoiled is made anew as a whole.
        if is_good {
            return Ok(is_new.then_some(data));
        }
    }
    Ok(Some(Issued::new(names, now)?.into_data()))
}

/// A certificate, its authority, and those that were before.
#[derive(Clone, PartialEq, Eq)]
struct Issued {
    /// The newest first.
    authorities: Vec<CertificateDer<'static>>,
    /// Of the newest, PEM.
    authority_key: String,
    chain: Vec<CertificateDer<'static>>,
    /// PEM.
    key: String,
}

impl Issued {
    fn new(names: &[String], now: i64) -> Result<Self, rcgen::Error> {
        let (authority, authority_key) = authority(now)?;
        let (certificate, key) = certificate(&authority, &authority_key, names, now)?;
        Ok(Self {
            authorities: vec![authority],
            authority_key,
            chain: vec![certificate],
            key,
        })
    }

    /// The same, with what it is time to replace replaced.
    fn next(&self, names: &[String], now: i64) -> Result<Self, rcgen::Error> {
        let mut next = self.clone();
        next.authorities.retain(|authority| validity(authority).1 > now);
        let newest = next.authorities.first().cloned();
        let newest = match newest.filter(|newest| validity(newest).1 - now > AUTHORITY_RENEWAL) {
            Some(newest) => newest,
            None => {
                let (authority, key) = authority(now)?;
                next.authorities.insert(0, authority.clone());
                next.authority_key = key;
                authority
            }
        };
        let is_known = next.authorities.len() == 1 || validity(&newest).0 + SKEW + AUTHORITY_IS_KNOWN <= now;
        let is_good = if is_known {
            self.is_accepted(names, slice::from_ref(&newest), now + CERTIFICATE_RENEWAL)
        } else {
            // What the one before has signed is shown as long as it can be.
            self.is_accepted(names, &next.authorities, now)
        };
        if !is_good {
            let (certificate, key) = certificate(&newest, &next.authority_key, names, now)?;
            next.chain = vec![certificate];
            next.key = key;
        }
        Ok(next)
    }

    fn is_accepted(&self, names: &[String], authorities: &[CertificateDer<'static>], at: i64) -> bool {
        names
            .iter()
            .all(|name| accepted(&self.chain, authorities, name, at).is_ok())
    }

    fn from_data(data: &Data) -> Option<Self> {
        let pem = |key: &str| String::from_utf8(data.get(key)?.0.clone()).ok();
        Some(Self {
            authorities: served::certificates(data, AUTHORITIES).ok()?,
            authority_key: pem(AUTHORITY_KEY)?,
            chain: served::certificates(data, CERTIFICATE).ok()?,
            key: pem(KEY)?,
        })
    }

    fn into_data(self) -> Data {
        [
            (AUTHORITIES, served::pem(&self.authorities)),
            (AUTHORITY_KEY, self.authority_key),
            (CERTIFICATE, served::pem(&self.chain)),
            (KEY, self.key),
        ]
        .map(|(key, pem)| (key.to_owned(), ByteString(pem.into_bytes())))
        .into()
    }
}

/// An authority that begins now, and its key.
fn authority(now: i64) -> Result<(CertificateDer<'static>, String), rcgen::Error> {
    let mut params = params(&[], "Authority of the Meander operator", now, AUTHORITY_LASTS)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok((certificate.der().clone(), key.serialize_pem()))
}

/// A certificate for a server with these names, by an authority, and its key.
fn certificate(
    authority: &CertificateDer<'static>,
    authority_key: &str,
    names: &[String],
    now: i64,
) -> Result<(CertificateDer<'static>, String), rcgen::Error> {
    let issuer = Issuer::from_ca_cert_der(authority, KeyPair::from_pem(authority_key)?)?;
    let mut params = params(names, "meander-operator", now, CERTIFICATE_LASTS)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    Ok((certificate.der().clone(), key.serialize_pem()))
}

fn params(names: &[String], common_name: &str, now: i64, lasts: i64) -> Result<CertificateParams, rcgen::Error> {
    let time = |seconds| OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| rcgen::Error::Time);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = time(now - SKEW)?;
    params.not_after = time(now + lasts)?;
    Ok(params)
}

/// When a certificate begins and ends; one that cannot be read has ended.
fn validity(certificate: &CertificateDer<'_>) -> (i64, i64) {
    served::validity(certificate).unwrap_or((i64::MIN, i64::MIN))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const NOW: i64 = 1_790_000_000;

    fn names() -> [String; 2] {
        ["operator.meander.svc", "operator"].map(str::to_owned)
    }

    #[test]
    fn for_years_whoever_has_the_bundle_of_the_day_before_accepts_what_is_shown() {
        let names = names();
        let mut data = renewed(None, &names, NOW).unwrap().unwrap();
        let mut bundles = VecDeque::new();
        let (mut authorities, mut certificates) = (0, 0);
        for now in (NOW..NOW + 5 * 365 * DAY).step_by(12 * 3600) {
            if let Some(next) = renewed(Some(&data), &names, now).unwrap() {
                authorities += u32::from(next[AUTHORITIES] != data[AUTHORITIES]);
                certificates += u32::from(next[CERTIFICATE] != data[CERTIFICATE]);
                data = next;
            }
            bundles.push_back((now, served::certificates(&data, AUTHORITIES).unwrap()));
            if bundles.get(1).is_some_and(|(since, _)| *since <= now - DAY) {
                bundles.pop_front();
            }
            let chain = served::certificates(&data, CERTIFICATE).unwrap();
            for (_, bundle) in &bundles {
                assert!(bundle.len() <= 2);
                accepted(&chain, bundle, &names[0], now).unwrap();
            }
        }
        // Each came, and each went once it had ended.
        assert_eq!((authorities, certificates), (3 + 2, 32));
    }

    #[test]
    fn other_names_get_another_certificate_of_the_same_authority() {
        let data = renewed(None, &names(), NOW).unwrap().unwrap();
        assert!(renewed(Some(&data), &names(), NOW).unwrap().is_none());
        let moved = renewed(Some(&data), &["elsewhere".to_owned()], NOW).unwrap().unwrap();
        assert!(moved[AUTHORITIES] == data[AUTHORITIES]);
        Served::read(&moved, "elsewhere", NOW).unwrap();
    }

    #[test]
    fn what_is_spoiled_is_made_anew() {
        let data = renewed(None, &names(), NOW).unwrap().unwrap();
        let other = renewed(None, &names(), NOW).unwrap().unwrap();
        for key in [AUTHORITIES, AUTHORITY_KEY, CERTIFICATE, KEY] {
            for value in [None, Some(ByteString(b"text".to_vec())), other.get(key).cloned()] {
                let mut spoiled = data.clone();
                spoiled.remove(key);
                spoiled.extend(value.map(|value| (key.to_owned(), value)));
                // At the second time there has to be another certificate.
                for now in [NOW, NOW + CERTIFICATE_LASTS] {
                    spoiled = renewed(Some(&spoiled), &names(), now).unwrap().unwrap_or(spoiled);
                    Served::read(&spoiled, &names()[0], now).unwrap();
                }
            }
        }
    }
}
