//! `--require`: what must hold at the end of a run, for use in CI.

use std::fmt;
use std::str::FromStr;

use super::accounts::CapabilityStatistics;
use crate::units::{Percent, Span, milliseconds};

/// A threshold, such as `success_rate>=99` or `p99<=2s`.
#[derive(Debug, Clone, PartialEq)]
pub struct Requirement {
    text: String,
    figure: Figure,
    comparison: Comparison,
    /// Percent, a count, or milliseconds, as the figure has it.
    threshold: f64,
}

/// Text that is no requirement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a requirement: expected FIGURE, >= or <= or > or <, and a number, such as success_rate>=99, p99<=2s, jobs>=100 or dropped<=0; figures are {names}", names = Figure::names())]
pub struct NotARequirement(String);

macro_rules! figures {
    ($($variant:ident $name:literal $unit:ident $value:expr;)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Figure { $($variant),* }

        impl Figure {
            const ALL: &[(&str, Self, Unit)] = &[$(($name, Self::$variant, Unit::$unit)),*];

            fn of(self, total: &CapabilityStatistics) -> Option<f64> {
                match self { $(Self::$variant => { let value: fn(&CapabilityStatistics) -> Option<f64> = $value; value(total) })* }
            }
        }
    };
}

figures! {
    SuccessRate "success_rate" Percent |t| t.success_rate_percent.map(Percent::get);
    Jobs "jobs" Count |t| count(t.attempts);
    Successful "successful" Count |t| count(t.successful);
    Failed "failed" Count |t| count(t.failed);
    Delayed "delayed" Count |t| count(t.delayed);
    Dropped "dropped" Count |t| count(t.dropped);
    Mean "mean" Latency |t| Some(t.latency_ms.as_ref()?.mean);
    Min "min" Latency |t| Some(t.latency_ms.as_ref()?.min);
    Max "max" Latency |t| Some(t.latency_ms.as_ref()?.max);
    P50 "p50" Latency |t| Some(t.latency_ms.as_ref()?.p50);
    P90 "p90" Latency |t| Some(t.latency_ms.as_ref()?.p90);
    P99 "p99" Latency |t| Some(t.latency_ms.as_ref()?.p99);
    P999 "p999" Latency |t| Some(t.latency_ms.as_ref()?.p999);
}

#[derive(Debug, Clone, Copy)]
enum Unit {
    Percent,
    Count,
    Latency,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    AtLeast,
    AtMost,
    Over,
    Under,
}

impl Figure {
    fn names() -> String {
        Self::ALL
            .iter()
            .map(|(name, ..)| *name)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 2^53, more jobs than a run has"
)]
#[expect(clippy::unnecessary_wraps, reason = "the form that figures have")]
fn count(jobs: u64) -> Option<f64> {
    Some(jobs as f64)
}

impl Requirement {
    /// Whether it is met, with the actual figure. If no job was sent it is missed, unless it is about their number.
    #[must_use]
    pub fn evaluate(&self, total: &CapabilityStatistics) -> Evaluated {
        let has_data = total.attempts > 0 || self.figure == Figure::Jobs;
        let got = self.figure.of(total).filter(|_| has_data);
        let is_met = got.is_some_and(|got| match self.comparison {
            Comparison::AtLeast => got >= self.threshold,
            Comparison::AtMost => got <= self.threshold,
            Comparison::Over => got > self.threshold,
            Comparison::Under => got < self.threshold,
        });
        Evaluated {
            is_met,
            required: self.text.clone(),
            got,
            unit: self.figure.unit(),
        }
    }
}

impl Figure {
    fn unit(self) -> Unit {
        Self::ALL[self as usize].2
    }
}

impl FromStr for Requirement {
    type Err = NotARequirement;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| NotARequirement(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Requirement> {
    let (name, rest) = text.split_at(text.find(['<', '>'])?);
    let (comparison, threshold) = [
        (">=", Comparison::AtLeast),
        ("<=", Comparison::AtMost),
        (">", Comparison::Over),
        ("<", Comparison::Under),
    ]
    .into_iter()
    .find_map(|(sign, comparison)| Some((comparison, rest.strip_prefix(sign)?.trim())))?;
    let &(_, figure, unit) = Figure::ALL
        .iter()
        .find(|(known, ..)| *known == name.trim())?;
    let threshold = match unit {
        Unit::Latency => milliseconds(threshold.parse::<Span>().ok()?.get()),
        Unit::Percent => threshold.trim_end_matches('%').trim_end().parse().ok()?,
        Unit::Count => threshold.parse().ok()?,
    };
    (threshold.is_finite() && threshold >= 0.0).then(|| Requirement {
        text: text.trim().to_owned(),
        figure,
        comparison,
        threshold,
    })
}

/// What became of a requirement.
#[derive(Debug, Clone)]
pub struct Evaluated {
    pub is_met: bool,
    required: String,
    got: Option<f64>,
    unit: Unit,
}

impl fmt::Display for Evaluated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.is_met { "✅ met" } else { "❌ missed" };
        write!(f, "{mark}: required {}, got ", self.required)?;
        match (self.got, self.unit) {
            (None, _) => f.write_str("no data"),
            (Some(got), Unit::Percent) => write!(f, "{}%", (got * 1e4).floor() / 1e4),
            (Some(got), Unit::Count) => write!(f, "{got}"),
            (Some(got), Unit::Latency) => write!(f, "{got}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::accounts::LatencyStatistics;
    use super::*;
    use std::collections::BTreeMap;

    fn total() -> CapabilityStatistics {
        CapabilityStatistics {
            attempts: 100,
            successful: 99,
            failed: 1,
            delayed: 5,
            dropped: 0,
            under_way: 0,
            success_rate_percent: Percent::new(99.0).ok(),
            latency_ms: Some(LatencyStatistics {
                mean: 50.0,
                min: 10.0,
                max: 3000.0,
                p50: 45.0,
                p90: 80.0,
                p99: 1999.0,
                p999: 2500.0,
            }),
            outcomes: vec![("success", 99), ("connect", 1)],
            status_codes: BTreeMap::from([(200, 99)]),
        }
    }

    #[test]
    fn thresholds_are_compared_in_the_figures_unit() {
        for met in [
            "success_rate>=99",
            "success_rate >= 99%",
            "p99<=2s",
            "p99<2",
            "p50<=45ms",
            "jobs>=100",
            "jobs>99",
            "dropped<=0",
            "failed<2",
            "delayed>=5",
            "successful>=99",
            "mean<=0.05",
            "min>5ms",
            "max<=3s",
            "p90<1m",
            "p999<=2.5s",
        ] {
            let requirement: Requirement = met.parse().unwrap();
            assert!(requirement.evaluate(&total()).is_met, "{met}");
        }
        for (missed, said) in [
            (
                "success_rate>=99.5",
                "❌ missed: required success_rate>=99.5, got 99%",
            ),
            ("p99<=1s", "❌ missed: required p99<=1s, got 1999ms"),
            ("jobs>100", "❌ missed: required jobs>100, got 100"),
            ("jobs>=100", "✅ met: required jobs>=100, got 100"),
        ] {
            let requirement: Requirement = missed.parse().unwrap();
            assert_eq!(requirement.evaluate(&total()).to_string(), said);
        }
    }

    #[test]
    fn a_threshold_without_data_is_missed() {
        let nothing = CapabilityStatistics {
            attempts: 0,
            success_rate_percent: None,
            latency_ms: None,
            ..total()
        };
        for text in ["success_rate>=0", "p99<=1h", "failed<=0", "dropped<=0"] {
            let requirement: Requirement = text.parse().unwrap();
            let evaluated = requirement.evaluate(&nothing);
            assert!(!evaluated.is_met, "{text}");
            assert!(evaluated.to_string().ends_with("got no data"));
        }
        let none: Requirement = "jobs<=0".parse().unwrap();
        assert!(none.evaluate(&nothing).is_met);
    }

    #[test]
    fn what_is_no_requirement_is_refused() {
        for bad in [
            "",
            "jobs",
            "jobs>=",
            "jobs=>5",
            "speed>=5",
            "p99<=fast",
            "p99<=0",
            "jobs>=-1",
            "jobs>=nan",
            "success_rate>=inf",
        ] {
            assert!(bad.parse::<Requirement>().is_err(), "{bad}");
        }
    }
}
