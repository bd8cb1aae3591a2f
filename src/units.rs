//! Values that carry their unit: percentages, job rates and the syntax of durations.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A share from 0 to 100 %, always finite.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Percent(f64);

/// A number that is not a percentage.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{0} is not a percentage: expected a finite number from 0 to 100")]
pub struct NotAPercentage(pub f64);

impl Percent {
    pub const ZERO: Self = Self(0.0);
    pub const FULL: Self = Self(100.0);

    /// This many percent.
    ///
    /// # Errors
    /// A number that is not finite or not from 0 to 100.
    pub fn new(percent: f64) -> Result<Self, NotAPercentage> {
        if (0.0..=100.0).contains(&percent) {
            Ok(Self(percent))
        } else {
            Err(NotAPercentage(percent))
        }
    }

    /// This many whole percent, at most 100.
    #[must_use]
    pub const fn whole(percent: u8) -> Self {
        Self(if percent < 100 { percent as f64 } else { 100.0 })
    }

    /// Rounded, far finer than anything that is decided by it: 99.0 % must not be missed by a
    /// rounding error of binary numbers.
    #[must_use]
    pub fn to_a_billionth(self) -> Self {
        Self((self.0 * 1e9).round() / 1e9)
    }

    /// The number, from 0 to 100.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }

    /// Text with a fixed number of decimals, rounded down: what is shown never claims a tier that
    /// the value does not reach.
    #[must_use]
    pub fn floored(self, decimals: usize) -> String {
        // Far less than a digit is forgiven, so that 4.35, which binary numbers hold as a little
        // less, is not shown as 4.34.
        let scale = [1.0, 10.0, 100.0, 1000.0][decimals.min(3)];
        format!("{:.decimals$}", (self.0 * scale + 1e-8).floor() / scale)
    }
}

impl TryFrom<f64> for Percent {
    type Error = NotAPercentage;

    fn try_from(percent: f64) -> Result<Self, Self::Error> {
        Self::new(percent)
    }
}

impl From<Percent> for f64 {
    fn from(percent: Percent) -> Self {
        percent.0
    }
}

/// Whole jobs per minute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobsPerMinute(u32);

impl JobsPerMinute {
    /// Nothing is sent.
    pub const ZERO: Self = Self(0);
    /// The highest rate that can be asked for.
    pub const MAX: Self = Self(6_000_000);

    /// This many jobs per minute, at most [`Self::MAX`].
    #[must_use]
    pub const fn new(jobs: u32) -> Self {
        if jobs < Self::MAX.0 {
            Self(jobs)
        } else {
            Self::MAX
        }
    }

    /// The number of jobs in a minute.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// A share of this rate, rounded down to whole jobs.
    #[must_use]
    pub fn share(self, share: Share) -> Self {
        // Tolerates a rounding error: half of 60 must not be 29.
        let jobs = (f64::from(self.0) * share.0 + 1e-6).floor();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to this rate"
        )]
        let jobs = jobs as u32;
        Self(jobs.min(self.0))
    }
}

/// A part of something, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Share(f64);

impl Share {
    /// No part of it.
    pub const NOTHING: Self = Self(0.0);
    /// The whole of it.
    pub const ALL: Self = Self(1.0);

    /// This part, clamped to 0..=1; NaN is 0.
    #[must_use]
    pub fn new(share: f64) -> Self {
        Self(if share > 0.0 { share.min(1.0) } else { 0.0 })
    }

    /// The number, from 0 to 1.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

impl fmt::Display for JobsPerMinute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A length of time over 0 as people write it: `30` and `0.5` are seconds, `500ms`, `2m`, `1h30m`
/// and `7d` say their unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(Duration);

/// Text that is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a length of time: expected over 0, such as 30 (seconds), 500ms, 2m, 1h30m or 7d"
)]
pub struct NotASpan(String);

impl Span {
    /// A hundred years: adding it to any instant stays in range.
    const MAX_SECONDS: f64 = 100.0 * 365.0 * 86400.0;

    /// The length of time.
    #[must_use]
    pub fn get(self) -> Duration {
        self.0
    }

    fn from_seconds(seconds: f64) -> Option<Self> {
        if !(seconds > 0.0 && seconds <= Self::MAX_SECONDS) {
            return None;
        }
        let span = Duration::from_secs_f64(seconds);
        (!span.is_zero()).then_some(Self(span))
    }

    fn parse(text: &str) -> Option<Self> {
        if let Ok(seconds) = text.parse::<f64>() {
            return Self::from_seconds(seconds);
        }
        let mut rest = text;
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let (number, tail) = rest.split_at(unit_at);
            let next_at = tail
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(next_at);
            let unit_seconds = match unit.trim() {
                "us" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" | "min" => 60.0,
                "h" => 3600.0,
                "d" => 86400.0,
                _ => return None,
            };
            seconds += number.parse::<f64>().ok()? * unit_seconds;
            rest = tail;
        }
        Self::from_seconds(seconds)
    }
}

impl FromStr for Span {
    type Err = NotASpan;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text.trim()).ok_or_else(|| NotASpan(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SpanVisitor;
        impl Visitor<'_> for SpanVisitor {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a length of time over 0, such as 30 (seconds), \"500ms\" or \"2m\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Span, E> {
                self.visit_str(&seconds.to_string())
            }

            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Span, E> {
                self.visit_str(&seconds.to_string())
            }

            fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Span, E> {
                self.visit_str(&seconds.to_string())
            }
        }
        deserializer.deserialize_any(SpanVisitor)
    }
}

/// `at + span`, or the latest time there is.
#[must_use]
pub fn saturating_add(at: DateTime<Utc>, span: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(span)
        .ok()
        .and_then(|span| at.checked_add_signed(span))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

/// `at - span`, or the earliest time there is.
#[must_use]
pub fn saturating_sub(at: DateTime<Utc>, span: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(span)
        .ok()
        .and_then(|span| at.checked_sub_signed(span))
        .unwrap_or(DateTime::<Utc>::MIN_UTC)
}

/// Writes an instant as RFC 3339 in UTC, to the microsecond.
///
/// # Errors
/// Those of the serializer.
pub fn serialize_timestamp<S: Serializer>(
    at: &DateTime<Utc>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&at.to_rfc3339_opts(SecondsFormat::Micros, true))
}

/// The milliseconds of a duration, to the microsecond.
#[must_use]
pub fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    #[test]
    fn a_percentage_is_finite_and_within_bounds() {
        for good in [0.0, 0.1, 99.0, 100.0] {
            assert_eq!(Percent::new(good).map(Percent::get), Ok(good));
        }
        for bad in [-0.001, 100.001, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(Percent::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown_percentages_are_rounded_down() {
        for (percent, one, two) in [
            (98.996, "98.9", "98.99"),
            (99.0, "99.0", "99.00"),
            (4.35, "4.3", "4.35"),
            (96.25, "96.2", "96.25"),
            (99.999_999, "99.9", "99.99"),
            (100.0, "100.0", "100.00"),
            (0.0, "0.0", "0.00"),
        ] {
            let value = Percent::new(percent).unwrap();
            assert_eq!(value.floored(1), one);
            assert_eq!(value.floored(2), two);
        }
    }

    #[test]
    fn spans_are_read_as_people_write_them() {
        for (text, milliseconds) in [
            ("30", 30_000),
            ("0.5", 500),
            ("500ms", 500),
            ("2m", 120_000),
            ("2min", 120_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("1.5h", 5_400_000),
            (" 7d ", 604_800_000),
        ] {
            assert_eq!(
                text.parse::<Span>().map(Span::get),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        for bad in [
            "",
            "0",
            "-1",
            "0s",
            "s",
            "5x",
            "1..5s",
            "nan",
            "inf",
            "1e300",
            "5 parsecs",
            "1h30",
        ] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_share_is_rounded_down() {
        for (base, part, share) in [
            (60, 0.5, 30),
            (61, 0.5, 30),
            (19, 0.1, 1),
            (9, 0.1, 0),
            (7, 0.0, 0),
            (6_000_000, 1.0, 6_000_000),
            (100, 0.29, 29),
        ] {
            assert_eq!(
                JobsPerMinute::new(base).share(Share::new(part)).get(),
                share
            );
        }
    }

    proptest! {
        #[test]
        fn nearly_right_spans_are_read_or_refused(text in mutated(&["1h30m", "500ms", "7d", "0.5"])) {
            if let Ok(span) = String::from_utf8_lossy(&text).parse::<Span>() {
                prop_assert!(!span.get().is_zero());
            }
        }

        #[test]
        fn any_text_is_a_span_over_zero_or_an_error(text in ".{0,40}") {
            if let Ok(span) = text.parse::<Span>() {
                prop_assert!(!span.get().is_zero());
            }
        }

        #[test]
        fn a_shown_percentage_never_exceeds_its_value(value in 0.0..=100.0_f64) {
            let shown: f64 = Percent::new(value).unwrap().floored(2).parse().unwrap();
            prop_assert!(shown <= value + 1e-5 && shown > value - 0.0101);
        }
    }
}
