//! Values as people read them.

use std::time::Duration;

use jiff::{Timestamp, Unit};

/// A position in the WAL as PostgreSQL writes it; none while it is unknown.
pub fn lsn(lsn: u64) -> Option<String> {
    (lsn != 0).then(|| format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF))
}

/// RFC 3339 with milliseconds; none for 0, which stands for no time.
pub fn time_of_micros(micros: i64) -> Option<String> {
    let time = Timestamp::from_microsecond(micros).ok().filter(|_| micros != 0)?;
    Some(format!("{:.3}", time.round(Unit::Millisecond).unwrap_or(time)))
}

/// RFC 3339 in whole seconds.
pub fn time(time: Timestamp) -> String {
    format!("{:.0}", crate::conditions::whole_seconds(time))
}

/// `0s`, `12s`, `3m`, `5h`, `2d`: the greatest unit that fits.
pub fn short_duration(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..=119 => format!("{seconds}s"),
        seconds @ 120..=7199 => format!("{}m", seconds / 60),
        seconds @ 7200..=172_799 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_as_people_read_them() {
        assert_eq!(lsn(0), None);
        assert_eq!(lsn(0x16B_3748).as_deref(), Some("0/16B3748"));
        assert_eq!(lsn(0x2_0000_00FF).as_deref(), Some("2/FF"));
        assert_eq!(time_of_micros(0), None);
        assert_eq!(
            time_of_micros(1_763_632_800_123_456).as_deref(),
            Some("2025-11-20T10:00:00.123Z")
        );
        for (seconds, text) in [(0, "0s"), (119, "119s"), (180, "3m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(short_duration(Duration::from_secs(seconds)), text);
        }
    }
}
