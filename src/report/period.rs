//! The period that a report covers.

use std::str::FromStr;

use chrono::{DateTime, Local, NaiveDate, NaiveDateTime, NaiveTime, TimeDelta, TimeZone, Utc};

use super::timeline::Micros;
use crate::units::Span;

/// From an instant until before another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// The first instant that counts.
    pub from: Micros,
    /// The first instant that does not count any more.
    pub until: Micros,
}

impl Default for Period {
    fn default() -> Self {
        Self {
            from: Micros::MIN,
            until: Micros::MAX,
        }
    }
}

impl Period {
    /// Whether an instant lies in the period.
    #[must_use]
    pub fn holds(&self, at: Micros) -> bool {
        (self.from..self.until).contains(&at)
    }
}

/// An instant as people write it: RFC 3339, a date or a date and a time of the reader's zone, or how
/// long ago it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(DateTime<Utc>);

impl Moment {
    #[must_use]
    pub fn micros(self) -> Micros {
        self.0.timestamp_micros()
    }

    fn parse(text: &str, now: DateTime<Utc>, zone: &impl TimeZone) -> Option<Self> {
        if let Ok(exact) = DateTime::parse_from_rfc3339(text) {
            return Some(Self(exact.to_utc()));
        }
        let date =
            NaiveDate::parse_from_str(text, "%Y-%m-%d").map(|date| date.and_time(NaiveTime::MIN));
        let local = date
            .or_else(|_| NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M"))
            .or_else(|_| NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S"));
        if let Ok(local) = local {
            return zone
                .from_local_datetime(&local)
                .earliest()
                .map(|at| Self(at.to_utc()));
        }
        let ago: Span = text.parse().ok()?;
        let ago = TimeDelta::from_std(ago.get()).ok()?;
        now.checked_sub_signed(ago).map(Self)
    }
}

impl FromStr for Moment {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text.trim(), Utc::now(), &Local).ok_or(
            "expected a time such as 2026-11-24T10:00:00Z, a date such as 2026-11-24 or '2026-11-24 10:00' (here), or how long ago, such as 24h",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::FixedOffset;

    #[test]
    fn moments_are_read_in_the_readers_zone() {
        let zone = FixedOffset::east_opt(3600).unwrap();
        let now = "2026-11-24T12:00:00Z".parse().unwrap();
        for (text, expected) in [
            ("2026-11-24T10:00:00Z", "2026-11-24T10:00:00Z"),
            ("2026-11-24T10:00:00+02:00", "2026-11-24T08:00:00Z"),
            ("2026-11-24", "2026-11-23T23:00:00Z"),
            ("2026-11-24 10:30", "2026-11-24T09:30:00Z"),
            ("2026-11-24 10:30:05", "2026-11-24T09:30:05Z"),
            ("24h", "2026-11-23T12:00:00Z"),
            ("1h30m", "2026-11-24T10:30:00Z"),
        ] {
            let expected: DateTime<Utc> = expected.parse().unwrap();
            assert_eq!(
                Moment::parse(text, now, &zone),
                Some(Moment(expected)),
                "{text}"
            );
        }
        for bad in ["", "yesterday", "2026-13-01", "-5h", "0"] {
            assert_eq!(Moment::parse(bad, now, &zone), None, "{bad}");
        }
    }
}
