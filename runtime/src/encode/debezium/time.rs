//! Dates and times, from PostgreSQL's text (DateStyle ISO, TimeZone UTC) to Debezium's numbers and strings.

use super::{super::json, value::Unfit};

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;

/// What `infinity` and `-infinity` become: what Debezium's connector makes of them.
const DATE_INFINITY: [i64; 2] = [2_146_033_979, -2_147_472_691];
const MILLIS_INFINITY: [i64; 2] = [9_223_372_036_825_200_000, -9_223_372_036_832_400_000];
const MICROS_INFINITY: [i64; 2] = [i64::MAX, i64::MIN];

/// Days since 1970-01-01.
pub(super) fn date(text: &str) -> Result<i64, Unfit> {
    if let Some(value) = infinity(text, DATE_INFINITY) {
        return Ok(value);
    }
    let (text, before_christ) = era(text);
    let mut scan = Scan(text.as_bytes());
    let date = scan.date(before_christ).filter(|_| scan.0.is_empty());
    date.map(|date| date.days()).ok_or(Unfit::Malformed)
}

/// Microseconds since midnight.
pub(super) fn time(text: &str) -> Result<i64, Unfit> {
    let mut scan = Scan(text.as_bytes());
    let time = scan.time().filter(|_| scan.0.is_empty());
    time.map(|time| time.micros).ok_or(Unfit::Malformed)
}

/// Microseconds since 1970-01-01, or milliseconds.
pub(super) fn timestamp(text: &str, millis: bool) -> Result<i64, Unfit> {
    if let Some(value) = infinity(text, if millis { MILLIS_INFINITY } else { MICROS_INFINITY }) {
        return Ok(value);
    }
    let (text, before_christ) = era(text);
    let mut scan = Scan(text.as_bytes());
    let moment = scan.moment(before_christ).filter(|_| scan.0.is_empty());
    let (date, time) = moment.ok_or(Unfit::Malformed)?;
    if millis {
        return Ok(date.days() * (MICROS_PER_DAY / 1000) + time.micros.div_euclid(1000));
    }
    // The last years that PostgreSQL knows are beyond 64 bits of microseconds.
    let micros = i128::from(date.days()) * i128::from(MICROS_PER_DAY) + i128::from(time.micros);
    i64::try_from(micros).map_err(|_| Unfit::NoForm)
}

/// Writes an ISO 8601 string in UTC with `digits` digits of the second's fraction.
pub(super) fn write_zoned_timestamp(text: &str, digits: usize, out: &mut Vec<u8>) -> Result<(), Unfit> {
    if matches!(text, "infinity" | "-infinity") {
        json::write_string(text, out);
        return Ok(());
    }
    let (text, before_christ) = era(text);
    let mut scan = Scan(text.as_bytes());
    let moment = scan.moment(before_christ);
    // The session's time zone is UTC.
    let (date, time) = moment.filter(|_| scan.0 == b"+00").ok_or(Unfit::Malformed)?;
    out.push(b'"');
    match date.year {
        0..=9999 => json::write(out, format_args!("{:04}", date.year)),
        10_000.. => json::write(out, format_args!("+{}", date.year)),
        _ => json::write(out, format_args!("-{:04}", -date.year)),
    }
    json::write(out, format_args!("-{:02}-{:02}T", date.month, date.day));
    time.write(out);
    if digits > 0 {
        let fraction = format!("{:06}", time.fraction());
        out.push(b'.');
        out.extend_from_slice(&fraction.as_bytes()[..digits.min(6)]);
    }
    out.extend_from_slice(b"Z\"");
    Ok(())
}

/// Writes an ISO 8601 time in UTC, with as much of the second's fraction as there is.
pub(super) fn write_zoned_time(text: &str, out: &mut Vec<u8>) -> Result<(), Unfit> {
    let mut scan = Scan(text.as_bytes());
    let mut parse = || {
        let time = scan.time()?;
        let offset = scan.offset()?;
        scan.0.is_empty().then_some((time, offset))
    };
    let (time, offset) = parse().ok_or(Unfit::Malformed)?;
    let utc = if offset == 0 {
        time
    } else {
        Time {
            micros: (time.micros - offset * MICROS_PER_SECOND).rem_euclid(MICROS_PER_DAY),
        }
    };
    out.push(b'"');
    utc.write(out);
    if utc.fraction() > 0 {
        let fraction = format!("{:06}", utc.fraction());
        json::write(out, format_args!(".{}", fraction.trim_end_matches('0')));
    }
    out.extend_from_slice(b"Z\"");
    Ok(())
}

/// Microseconds of an interval, by a year of 365.25 days and a month of a twelfth of it.
pub(super) fn interval(text: &str) -> Result<i64, Unfit> {
    const SECONDS_PER_MONTH: i128 = 2_629_800;
    let mut micros = 0_i128;
    let mut words = text.split(' ');
    while let Some(word) = words.next() {
        if word.contains(':') {
            let (negative, digits) = match word.strip_prefix('-') {
                Some(digits) => (true, digits),
                None => (false, word.strip_prefix('+').unwrap_or(word)),
            };
            let time = time(digits)?;
            micros += i128::from(if negative { -time } else { time });
            continue;
        }
        let count: i128 = word.parse().map_err(|_| Unfit::Malformed)?;
        let seconds = match words.next().unwrap_or_default() {
            "year" | "years" => 12 * SECONDS_PER_MONTH,
            "mon" | "mons" => SECONDS_PER_MONTH,
            "day" | "days" => 86_400,
            _ => return Err(Unfit::Malformed),
        };
        micros += count * seconds * i128::from(MICROS_PER_SECOND);
    }
    // Beyond 292,000 years it is the most that there is, as with Debezium.
    Ok(i64::try_from(micros).unwrap_or(if micros < 0 { i64::MIN } else { i64::MAX }))
}

fn infinity(text: &str, [positive, negative]: [i64; 2]) -> Option<i64> {
    match text {
        "infinity" => Some(positive),
        "-infinity" => Some(negative),
        _ => None,
    }
}

fn era(text: &str) -> (&str, bool) {
    match text.strip_suffix(" BC") {
        Some(text) => (text, true),
        None => (text, false),
    }
}

/// A day of the Gregorian calendar, also before there was one. The year before 1 is 0.
#[derive(Clone, Copy)]
struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    /// Days since 1970-01-01.
    fn days(self) -> i64 {
        // Years that begin in March have their odd day at the end; 400 of them have always the same length.
        let year = if self.month <= 2 { self.year - 1 } else { self.year };
        let month = (self.month + 9) % 12;
        let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * month + 2) / 5 + self.day - 1;
        era * 146_097 + year * 365 + year / 4 - year / 100 + day_of_year - 719_468
    }
}

#[derive(Clone, Copy)]
struct Time {
    micros: i64,
}

impl Time {
    fn fraction(self) -> i64 {
        self.micros % MICROS_PER_SECOND
    }

    fn write(self, out: &mut Vec<u8>) {
        let seconds = self.micros / MICROS_PER_SECOND;
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        json::write(out, format_args!("{hours:02}:{minutes:02}:{seconds:02}"));
    }
}

/// What is left of a text. A method that returns none leaves it anywhere.
struct Scan<'a>(&'a [u8]);

impl Scan<'_> {
    fn literal(&mut self, byte: u8) -> Option<()> {
        self.0 = self.0.strip_prefix(&[byte])?;
        Some(())
    }

    /// At most nine digits, and how many they were.
    fn digits(&mut self) -> Option<(i64, u32)> {
        let mut value = 0;
        let mut count = 0;
        while let Some((digit @ b'0'..=b'9', rest)) = self.0.split_first() {
            value = value * 10 + i64::from(digit - b'0');
            count += 1;
            self.0 = rest;
            if count == 9 {
                break;
            }
        }
        (count > 0).then_some((value, count))
    }

    fn date(&mut self, before_christ: bool) -> Option<Date> {
        let (year, _) = self.digits()?;
        self.literal(b'-')?;
        let (month, _) = self.digits()?;
        self.literal(b'-')?;
        let (day, _) = self.digits()?;
        let is_date = year > 0 && (1..=12).contains(&month) && (1..=31).contains(&day);
        is_date.then_some(Date {
            year: if before_christ { 1 - year } else { year },
            month,
            day,
        })
    }

    fn time(&mut self) -> Option<Time> {
        let (hours, _) = self.digits()?;
        self.literal(b':')?;
        let (minutes, _) = self.digits()?;
        self.literal(b':')?;
        let (seconds, _) = self.digits()?;
        let mut fraction = 0;
        if self.literal(b'.').is_some() {
            let (digits, count) = self.digits()?;
            fraction = digits * 10_i64.pow(6_u32.checked_sub(count)?);
        }
        Some(Time {
            micros: (hours * 3600 + minutes * 60 + seconds) * MICROS_PER_SECOND + fraction,
        })
    }

    fn moment(&mut self, before_christ: bool) -> Option<(Date, Time)> {
        let date = self.date(before_christ)?;
        self.literal(b' ')?;
        Some((date, self.time()?))
    }

    /// `+HH`, `+HH:MM` or `+HH:MM:SS`, in seconds.
    fn offset(&mut self) -> Option<i64> {
        let sign = match self.literal(b'+') {
            Some(()) => 1,
            None => self.literal(b'-').map(|()| -1)?,
        };
        let (mut seconds, _) = self.digits().map(|(hours, count)| (hours * 3600, count))?;
        for unit in [60, 1] {
            if self.literal(b':').is_some() {
                seconds += self.digits()?.0 * unit;
            }
        }
        Some(sign * seconds)
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil;
    use proptest::prelude::*;

    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>) -> Result<(), Unfit>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn moments_are_counted_from_1970_in_the_gregorian_calendar_of_every_year() {
        assert_eq!(date("1970-01-01"), Ok(0));
        assert_eq!(date("2016-11-04"), Ok(17_109));
        assert_eq!(date("0001-12-31 BC"), Ok(-719_163));
        assert_eq!(date("5874897-12-31"), Ok(2_145_042_905));
        assert_eq!(timestamp("1936-10-25 22:10:12.608", false), Ok(-1_047_174_587_392_000));
        assert_eq!(timestamp("1969-12-31 23:59:59.999", true), Ok(-1));
        assert_eq!(
            timestamp("4713-12-31 23:59:59.999999 BC", false),
            Ok(-210_831_897_600_000_001)
        );
        assert_eq!(time("24:00:00"), Ok(86_400_000_000));
    }

    #[test]
    fn infinities_are_numbers_that_debezium_gives_them_and_what_does_not_fit_is_said() {
        assert_eq!(date("infinity"), Ok(2_146_033_979));
        assert_eq!(timestamp("-infinity", false), Ok(i64::MIN));
        assert_eq!(timestamp("infinity", true), Ok(9_223_372_036_825_200_000));
        assert_eq!(timestamp("294276-12-31 23:59:59.999999", false), Err(Unfit::NoForm));
        for wrong in [
            "",
            "2020",
            "2020-13-01",
            "0000-01-01",
            "2020-01-01 00:00:00",
            "2020-01-01x",
        ] {
            assert_eq!(date(wrong), Err(Unfit::Malformed), "{wrong}");
        }
    }

    #[test]
    fn zoned_values_are_iso_strings_in_utc() {
        let at = |text: &str, digits| written(|out| write_zoned_timestamp(text, digits, out));
        assert_eq!(at("2016-11-04 13:51:30.1+00", 6), "2016-11-04T13:51:30.100000Z");
        assert_eq!(at("2016-11-04 13:51:30+00", 0), "2016-11-04T13:51:30Z");
        assert_eq!(at("0044-03-15 12:00:00+00 BC", 3), "-0043-03-15T12:00:00.000Z");
        assert_eq!(at("0001-03-15 12:00:00+00 BC", 0), "0000-03-15T12:00:00Z");
        assert_eq!(at("21016-11-04 13:51:30.1+00", 6), "+21016-11-04T13:51:30.100000Z");
        assert_eq!(at("-infinity", 6), "-infinity");
        let time = |text: &str| written(|out| write_zoned_time(text, out));
        assert_eq!(time("13:51:30.123789+02"), "11:51:30.123789Z");
        assert_eq!(time("13:51:30.12-03:30"), "17:21:30.12Z");
        assert_eq!(time("24:00:00+00"), "24:00:00Z");
        assert_eq!(time("24:00:00+02"), "22:00:00Z");
        assert_eq!(time("00:00:00-15:59:59"), "15:59:59Z");
    }

    #[test]
    fn an_interval_is_the_sum_of_its_parts() {
        assert_eq!(interval("1 year 2 mons 3 days 04:05:06.78"), Ok(37_091_106_780_000));
        assert_eq!(
            interval("-1 years -2 mons +3 days -04:05:06.78"),
            Ok(-36_572_706_780_000)
        );
        assert_eq!(interval("-00:00:00.001"), Ok(-1000));
        assert_eq!(interval("00:00:00"), Ok(0));
        assert_eq!(interval("178000000 years"), Ok(i64::MAX));
        assert_eq!(interval("1 week"), Err(Unfit::Malformed));
    }

    proptest! {
        #[test]
        fn days_are_those_of_the_calendar(days in -3_600_000_i32..2_900_000) {
            let epoch = civil::date(1970, 1, 1);
            let Ok(day) = epoch.checked_add(jiff::Span::new().days(days)) else { return Ok(()) };
            let year = i64::from(day.year());
            let text = if year > 0 {
                format!("{year:04}-{:02}-{:02}", day.month(), day.day())
            } else {
                format!("{:04}-{:02}-{:02} BC", 1 - year, day.month(), day.day())
            };
            prop_assert_eq!(date(&text), Ok(i64::from(days)));
        }
    }
}
