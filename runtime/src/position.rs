//! The coordinate of a change: its identity, its order, its dedupe key and the place to resume from.

use std::{fmt, str::FromStr};

/// A place in PostgreSQL's WAL, in bytes. Written `X/Y` as PostgreSQL writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// PostgreSQL's invalid LSN.
    pub const ZERO: Self = Self(0);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidPosition(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(invalid)?;
        let half = |digits: &str| match digits.len() {
            1..=8 if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
                u64::from_str_radix(digits, 16).map_err(|_| invalid())
            }
            _ => Err(invalid()),
        };
        Ok(Self((half(high)? << 32) | half(low)?))
    }
}

/// Counts the times that LSNs stopped being comparable with those before; starts at 1.
///
/// It fills the top 8 bits of a Redis entry id, so 255 is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u8);

impl Epoch {
    /// The epoch of a pipeline that never saw its source change.
    pub const FIRST: Self = Self(1);
}

/// `(epoch, commit_lsn, ordinal)`: ordered, unique, the same in every run over the same WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// See [`Epoch`].
    pub epoch: Epoch,
    /// Start of the transaction's commit record: `final_lsn` of pgoutput's Begin.
    pub commit_lsn: Lsn,
    /// Number of the change in its transaction, from 0, counted before any filter of ours.
    pub ordinal: u64,
}

impl Position {
    /// After every change of the transaction that commits at `commit_lsn`.
    #[must_use]
    pub fn end_of_transaction(epoch: Epoch, commit_lsn: Lsn) -> Self {
        Self {
            epoch,
            commit_lsn,
            ordinal: u64::MAX,
        }
    }
}

/// `epoch:LSN:ordinal`, for example `1:0/16B3748:3`.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.epoch.0, self.commit_lsn, self.ordinal)
    }
}

/// The text is not an LSN or a position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a position: expected epoch:X/Y:ordinal, for example 1:0/16B3748:3")]
pub struct InvalidPosition(pub String);

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidPosition(text.to_owned());
        let mut parts = text.split(':');
        let (Some(epoch), Some(lsn), Some(ordinal), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(invalid());
        };
        let epoch = Epoch(epoch.parse().map_err(|_| invalid())?);
        Ok(Self {
            epoch,
            commit_lsn: lsn.parse().map_err(|_| invalid())?,
            ordinal: ordinal.parse().map_err(|_| invalid())?,
        })
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl serde::Serialize for Position {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Position {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_position_reads_back_as_it_was_written(epoch in any::<u8>(), lsn in any::<u64>(), ordinal in any::<u64>()) {
            let position = Position { epoch: Epoch(epoch), commit_lsn: Lsn(lsn), ordinal };
            prop_assert_eq!(position.to_string().parse::<Position>(), Ok(position));
        }

        #[test]
        fn text_that_is_no_position_is_refused_without_a_panic(text in "\\PC*") {
            if let Ok(position) = text.parse::<Position>() {
                prop_assert_eq!(position.to_string().parse::<Position>(), Ok(position));
            }
        }
    }

    #[test]
    fn an_lsn_is_written_as_postgresql_writes_it() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!("0/16B3748".parse(), Ok(Lsn(0x16B_3748)));
        assert!("16B3748".parse::<Lsn>().is_err());
        assert!("0/+16B3748".parse::<Lsn>().is_err());
        assert!("0/123456789".parse::<Lsn>().is_err());
    }

    #[test]
    fn positions_are_ordered_by_epoch_then_commit_then_ordinal() {
        let order: Vec<Position> = ["1:0/10:0", "1:0/10:1", "1:0/20:0", "1:1/0:0", "2:0/10:0"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        assert!(order.is_sorted());
    }
}
