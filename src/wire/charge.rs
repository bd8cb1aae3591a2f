//! What a job is charged (`.github/docs/money.md`).

use std::time::Duration;

use super::outcome::Outcome;
use crate::money::{UnitPrice, Wei};

/// A stream is charged in whole steps: the gateway pays the orchestrator for each that has passed (go-livepeer,
/// byoc/stream_gateway.go).
const STREAM_STEP_SECONDS: u64 = 5;

/// All that a job's charge follows from, besides its price.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub outcome: Outcome,
    /// Whether the answer was an event stream.
    pub is_stream: bool,
    /// From the sending of the request to the end of the answer, or until the money of a stream ran out. It counts in whole
    /// microseconds, as it is recorded, so that anyone with the records computes the same figure.
    pub time: Duration,
    /// `timeout_seconds` of the job's header: the gateway gives the orchestrator one second more.
    pub timeout_seconds: u32,
}

impl Work {
    /// Each second begun, at least one and at most `timeout_seconds` + 1; of a stream whole steps of 5 s. Nothing where
    /// nobody worked.
    #[must_use]
    pub fn charged_seconds(self) -> u64 {
        if !self.outcome.is_charged(self.is_stream) {
            return 0;
        }
        let micros = u64::try_from(self.time.as_micros()).unwrap_or(u64::MAX);
        if self.is_stream {
            return micros / 1_000_000 / STREAM_STEP_SECONDS * STREAM_STEP_SECONDS;
        }
        let most = u64::from(self.timeout_seconds) + 1;
        micros.div_ceil(1_000_000).clamp(1, most)
    }

    /// The most that a job can be charged for if it ends within `timeout`.
    #[must_use]
    pub fn most_seconds(timeout: Duration, timeout_seconds: u32) -> u64 {
        let charged = |is_stream| {
            let work = Self {
                outcome: Outcome::Success,
                is_stream,
                time: timeout,
                timeout_seconds,
            };
            work.charged_seconds()
        };
        charged(false).max(charged(true))
    }
}

/// What a price is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChargedPer {
    /// A second of compute, each begun one whole: jobs that a gateway sends.
    Second,
    /// A job, however long it took: jobs of live runners.
    Job,
}

impl ChargedPer {
    /// Its name in statements and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Job => "job",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Second, Self::Job]
            .into_iter()
            .find(|per| per.name() == name)
    }
}

/// What an agent's jobs cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Price {
    pub unit: UnitPrice,
    pub per: ChargedPer,
}

impl Price {
    /// Wei for a second, in tests.
    #[cfg(test)]
    pub(crate) fn per_second(wei: u64) -> Self {
        Self {
            unit: wei.to_string().parse().unwrap(),
            per: ChargedPer::Second,
        }
    }

    /// How many units a job is charged for.
    #[must_use]
    pub fn units(&self, work: Work) -> u64 {
        match self.per {
            ChargedPer::Second => work.charged_seconds(),
            ChargedPer::Job => work.outcome.is_charged(work.is_stream).into(),
        }
    }

    /// The most units that a job can be charged for if it ends within `timeout`.
    #[must_use]
    pub fn most_units(&self, timeout: Duration, timeout_seconds: u32) -> u64 {
        match self.per {
            ChargedPer::Second => Work::most_seconds(timeout, timeout_seconds),
            ChargedPer::Job => 1,
        }
    }

    /// What a job costs.
    #[must_use]
    pub fn of(&self, work: Work) -> Wei {
        self.unit.for_units(self.units(work))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn charged(outcome: Outcome, is_stream: bool, micros: u64) -> u64 {
        let work = Work {
            outcome,
            is_stream,
            time: Duration::from_micros(micros),
            timeout_seconds: 60,
        };
        work.charged_seconds()
    }

    #[test]
    fn each_second_begun_is_charged_up_to_the_timeout() {
        for (micros, seconds) in [
            (0, 1),
            (1, 1),
            (1_000_000, 1),
            (1_000_001, 2),
            (61_000_000, 61),
            (77_000_000, 61),
        ] {
            assert_eq!(
                charged(Outcome::Success, false, micros),
                seconds,
                "{micros}"
            );
            assert_eq!(
                charged(Outcome::Timeout, false, micros),
                seconds,
                "{micros}"
            );
            assert_eq!(charged(Outcome::Connect, false, micros), 0);
        }
    }

    #[test]
    fn a_live_runners_job_costs_its_price_however_long_it_took() {
        let price = Price {
            unit: "7".parse().unwrap(),
            per: ChargedPer::Job,
        };
        for (outcome, is_stream, wei) in [
            (Outcome::Success, false, "7"),
            (Outcome::Success, true, "7"),
            (Outcome::WorkerGone, false, "7"),
            (Outcome::Unavailable, false, "0"),
        ] {
            let work = Work {
                outcome,
                is_stream,
                time: Duration::from_secs(9),
                timeout_seconds: 60,
            };
            assert_eq!(price.of(work).to_string(), wei, "{outcome:?}");
        }
    }

    #[test]
    fn streams_are_charged_in_steps() {
        for (micros, seconds) in [(0, 0), (4_999_999, 0), (5_000_000, 5), (14_999_999, 10)] {
            assert_eq!(charged(Outcome::Success, true, micros), seconds, "{micros}");
            assert_eq!(charged(Outcome::Unpaid, true, micros), seconds, "{micros}");
        }
        assert_eq!(charged(Outcome::Unpaid, false, 9_000_000), 0);
        let most = |seconds| Work::most_seconds(Duration::from_secs(seconds), 60);
        assert_eq!([1, 10, 61, 64, 77].map(most), [1, 10, 61, 61, 75]);
    }
}
