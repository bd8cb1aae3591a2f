//! From uptime to job rate: tiers by default, or another shape, and how soon the rate rises again.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::units::{JobsPerMinute, Percent, Share, Span};

/// How a rate follows from an uptime.
///
/// As text: a shape, and what else is wanted, separated by spaces: `tiers:99=100,95=50,90=10`,
/// `linear:90..99` or `proportional:4`, then `recover_after=10m`, `probe_rate=1` and `trust=verified`.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    shape: Shape,
    recover_after: Duration,
    probe_rate: JobsPerMinute,
    trust: Trust,
}

/// Which uptime counts if an agent's jobs contradict the one it reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Trust {
    /// The uptime that the agent reports.
    #[default]
    Reported,
    /// The lower of the two.
    Verified,
}

#[derive(Debug, Clone, PartialEq)]
enum Shape {
    /// The best tier whose uptime is reached; below the last one nothing.
    Tiers(Vec<Tier>),
    /// Nothing at one uptime and below, all at another and over, and evenly between.
    Linear { nothing: Percent, all: Percent },
    /// The uptime to a power.
    Proportional { power: f64 },
}

/// The minimum uptime, and the share of the base rate that it earns.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tier {
    uptime: Percent,
    share: Percent,
}

impl Default for Policy {
    fn default() -> Self {
        let tiers = [(99, 100), (95, 50), (90, 10)];
        let tiers = tiers.map(|(uptime, share)| Tier {
            uptime: Percent::whole(uptime),
            share: Percent::whole(share),
        });
        Self {
            shape: Shape::Tiers(tiers.into()),
            recover_after: Duration::ZERO,
            probe_rate: JobsPerMinute::ZERO,
            trust: Trust::default(),
        }
    }
}

impl Policy {
    /// These tiers, each the least uptime and the share that it earns, best first.
    #[must_use]
    pub fn of_tiers(tiers: impl IntoIterator<Item = (Percent, Percent)>) -> Self {
        let tiers = tiers.into_iter();
        let tiers = tiers.map(|(uptime, share)| Tier { uptime, share });
        Self {
            shape: Shape::Tiers(tiers.collect()),
            ..Self::default()
        }
    }

    /// The share of the base rate that an uptime earns.
    #[must_use]
    pub fn share(&self, uptime: Percent) -> Share {
        match &self.shape {
            Shape::Tiers(tiers) => tiers
                .iter()
                .find(|tier| uptime >= tier.uptime)
                .map_or(Share::NOTHING, |tier| Share::new(tier.share.get() / 100.0)),
            Shape::Linear { nothing, all } => {
                Share::new((uptime.get() - nothing.get()) / (all.get() - nothing.get()))
            }
            Shape::Proportional { power } => Share::new((uptime.get() / 100.0).powf(*power)),
        }
    }

    /// The rate that a share makes of a base rate: whole jobs per minute, rounded down, and at least
    /// the probe rate.
    #[must_use]
    pub fn rate_of(&self, base: JobsPerMinute, share: Share) -> JobsPerMinute {
        base.share(share).max(self.probe_rate.min(base))
    }

    /// The rate that an uptime earns.
    #[must_use]
    pub fn rate(&self, base: JobsPerMinute, uptime: Percent) -> JobsPerMinute {
        self.rate_of(base, self.share(uptime))
    }

    /// Which uptime counts if there is a contradiction.
    #[must_use]
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// The thresholds at which the share changes, best first; empty if it changes continuously.
    #[must_use]
    pub fn thresholds(&self) -> Vec<Percent> {
        match &self.shape {
            Shape::Tiers(tiers) => tiers.iter().map(|tier| tier.uptime).collect(),
            Shape::Linear { .. } | Shape::Proportional { .. } => Vec::new(),
        }
    }

    /// Tiers that earn something, but not as much as one job per minute.
    #[must_use]
    pub fn tiers_without_jobs(&self, base: JobsPerMinute) -> Vec<Percent> {
        let Shape::Tiers(tiers) = &self.shape else {
            return Vec::new();
        };
        let empty = tiers.iter().filter(|tier| {
            let share = Share::new(tier.share.get() / 100.0);
            share > Share::NOTHING && base.share(share).get() == 0
        });
        empty.map(|tier| tier.uptime).collect()
    }
}

/// Text that is no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0}: expected tiers:UPTIME=SHARE,… (best first), linear:FROM..TO or proportional:POWER, then recover_after=T, probe_rate=N and trust=reported|verified where wanted, as in 'tiers:99=100,95=50,90=10 recover_after=10m probe_rate=1'"
)]
pub struct NotAPolicy(String);

impl FromStr for Policy {
    type Err = NotAPolicy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_whitespace();
        let shape = words.next().unwrap_or_default();
        let mut policy = Self {
            shape: shape.parse()?,
            ..Self::default()
        };
        for word in words {
            let wrong = || NotAPolicy(format!("'{word}'"));
            match word.split_once('=') {
                Some(("recover_after", span)) => {
                    let span: Span = span.parse().map_err(|_| wrong())?;
                    policy.recover_after = span.get();
                }
                Some(("probe_rate", jobs)) => {
                    let jobs = jobs.parse().map_err(|_| wrong())?;
                    policy.probe_rate = JobsPerMinute::new(jobs);
                }
                Some(("trust", "reported")) => policy.trust = Trust::Reported,
                Some(("trust", "verified")) => policy.trust = Trust::Verified,
                _ => return Err(wrong()),
            }
        }
        Ok(policy)
    }
}

impl FromStr for Shape {
    type Err = NotAPolicy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAPolicy(format!("'{text}'"));
        let percent = |text: &str| -> Result<Percent, NotAPolicy> {
            let number = text.trim_end_matches('%').parse().map_err(|_| wrong())?;
            Percent::new(number).map_err(|_| wrong())
        };
        match text.split_once(':') {
            Some(("tiers", tiers)) => {
                let tier = |tier: &str| {
                    let (uptime, share) = tier.split_once('=').ok_or_else(wrong)?;
                    Ok(Tier {
                        uptime: percent(uptime)?,
                        share: percent(share)?,
                    })
                };
                let tiers: Vec<Tier> = tiers.split(',').map(tier).collect::<Result<_, _>>()?;
                // A better uptime must not earn less.
                let falling = |pair: &[Tier]| {
                    pair[0].uptime > pair[1].uptime && pair[0].share >= pair[1].share
                };
                if tiers.windows(2).all(falling) {
                    Ok(Self::Tiers(tiers))
                } else {
                    Err(wrong())
                }
            }
            Some(("linear", ends)) => {
                let (nothing, all) = ends.split_once("..").ok_or_else(wrong)?;
                let (nothing, all) = (percent(nothing)?, percent(all)?);
                if nothing < all {
                    Ok(Self::Linear { nothing, all })
                } else {
                    Err(wrong())
                }
            }
            Some(("proportional", power)) => {
                let power: f64 = power.parse().map_err(|_| wrong())?;
                if power > 0.0 && power.is_finite() {
                    Ok(Self::Proportional { power })
                } else {
                    Err(wrong())
                }
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.shape {
            Shape::Tiers(tiers) => {
                f.write_str("tiers:")?;
                for (n, tier) in tiers.iter().enumerate() {
                    let comma = if n == 0 { "" } else { "," };
                    write!(f, "{comma}{}={}", tier.uptime.get(), tier.share.get())?;
                }
            }
            Shape::Linear { nothing, all } => {
                write!(f, "linear:{}..{}", nothing.get(), all.get())?;
            }
            Shape::Proportional { power } => write!(f, "proportional:{power}")?,
        }
        if !self.recover_after.is_zero() {
            write!(f, " recover_after={}s", self.recover_after.as_secs_f64())?;
        }
        if self.probe_rate > JobsPerMinute::ZERO {
            write!(f, " probe_rate={}", self.probe_rate)?;
        }
        if self.trust == Trust::Verified {
            f.write_str(" trust=verified")?;
        }
        Ok(())
    }
}

/// Lets a share fall at once, and rise only after the uptime has earned more for long enough.
#[derive(Debug, Clone)]
pub(crate) struct Recovery {
    recover_after: Duration,
    share: Option<Share>,
    /// Since when more is earned, and the least of that.
    rising: Option<(Instant, Share)>,
}

impl Recovery {
    /// By this policy, with no share yet: the first one holds at once.
    #[must_use]
    pub(crate) fn new(policy: &Policy) -> Self {
        Self {
            recover_after: policy.recover_after,
            share: None,
            rising: None,
        }
    }

    /// The share at `now`, when `earned` is what the uptime earns.
    pub(crate) fn allow(&mut self, earned: Share, now: Instant) -> Share {
        let share = match self.share {
            Some(share) if earned > share && !self.recover_after.is_zero() => {
                let (since, least) = self.rising.unwrap_or((now, earned));
                let least = if earned < least { earned } else { least };
                if now.saturating_duration_since(since) >= self.recover_after {
                    // What is earned beyond that has yet to last as long.
                    self.rising = (earned > least).then_some((now, earned));
                    least
                } else {
                    self.rising = Some((since, least));
                    share
                }
            }
            _ => {
                self.rising = None;
                earned
            }
        };
        self.share = Some(share);
        share
    }

    /// When the share rises, if the uptime goes on to earn more.
    #[must_use]
    pub(crate) fn rises_at(&self) -> Option<Instant> {
        let (since, _) = self.rising?;
        since.checked_add(self.recover_after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn policy(text: &str) -> Policy {
        text.parse().unwrap()
    }

    fn rate(policy: &Policy, base: u32, uptime: f64) -> u32 {
        let uptime = Percent::new(uptime).unwrap();
        policy.rate(JobsPerMinute::new(base), uptime).get()
    }

    #[test]
    fn each_tier_begins_at_its_own_threshold() {
        for (uptime, base, expected) in [
            (100.0, 60, 60),
            (99.0, 60, 60),
            (98.999_999, 60, 30),
            (95.0, 61, 30),
            (94.999_999, 60, 6),
            (90.0, 60, 6),
            (90.0, 19, 1),
            (90.0, 9, 0),
            (89.999_999, 60, 0),
            (0.0, 6_000_000, 0),
            (99.0, 6_000_000, 6_000_000),
        ] {
            let got = rate(&Policy::default(), base, uptime);
            assert_eq!(got, expected, "{uptime} % of {base}");
        }
    }

    #[test]
    fn other_shapes_earn_what_they_say() {
        for (text, uptime, expected) in [
            ("tiers:99.9=100,50=12.5", 99.8, 12),
            ("tiers:99.9=100,50=12.5", 49.9, 0),
            ("tiers:0=100", 0.0, 100),
            ("linear:90..99", 99.5, 100),
            ("linear:90..99", 94.5, 50),
            ("linear:90..99", 90.9, 10),
            ("linear:90..99", 90.0, 0),
            ("linear:90..99", 12.0, 0),
            ("proportional:1", 62.5, 62),
            ("proportional:2", 50.0, 25),
            ("proportional:0.5", 25.0, 50),
            ("proportional:4", 100.0, 100),
            ("tiers:99=100 probe_rate=3", 5.0, 3),
            ("tiers:99=100 probe_rate=300", 5.0, 100),
        ] {
            assert_eq!(
                rate(&policy(text), 100, uptime),
                expected,
                "{text} {uptime}"
            );
        }
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        for bad in [
            "",
            "tiers",
            "tiers:",
            "tiers:99",
            "tiers:99=101",
            "tiers:90=10,99=100",
            "tiers:99=50,90=60",
            "tiers:99=50,99=40",
            "linear:99..90",
            "linear:90",
            "proportional:0",
            "proportional:inf",
            "steps:99=100",
            "linear:90..99 probe_rate=-1",
            "linear:90..99 recover_after=soon",
            "linear:90..99 trust=blind",
        ] {
            let wrong = bad.parse::<Policy>().unwrap_err().to_string();
            assert!(wrong.contains("expected tiers:"), "{wrong}");
        }
    }

    #[test]
    fn tiers_that_round_to_nothing_are_told() {
        let of = |base| Policy::default().tiers_without_jobs(JobsPerMinute::new(base));
        assert_eq!(of(10), []);
        assert_eq!(of(9), [Percent::whole(90)]);
        assert_eq!(of(1), [Percent::whole(95), Percent::whole(90)]);
    }

    #[test]
    fn a_rate_falls_at_once_and_rises_after_a_while() {
        let mut recovery = Recovery::new(&policy("tiers:99=100 recover_after=10s"));
        let begin = Instant::now();
        let mut at = |seconds: u64, earned: u32| {
            let now = begin + Duration::from_secs(seconds);
            let rate = recovery.allow(Share::new(f64::from(earned) / 60.0), now);
            let rate = JobsPerMinute::new(60).share(rate).get();
            let rises = recovery.rises_at().map(|at| (at - begin).as_secs());
            (rate, rises)
        };
        assert_eq!(at(0, 60), (60, None));
        assert_eq!(at(5, 6), (6, None));
        assert_eq!(at(6, 60), (6, Some(16)));
        assert_eq!(at(12, 30), (6, Some(16)));
        // The least that was earned all the time; more has yet to last.
        assert_eq!(at(16, 60), (30, Some(26)));
        assert_eq!(at(20, 30), (30, None));
        assert_eq!(at(21, 60), (30, Some(31)));
        assert_eq!(at(25, 0), (0, None));
        assert_eq!(at(30, 60), (0, Some(40)));
        assert_eq!(at(41, 60), (60, None));
    }

    proptest! {
        #[test]
        fn a_better_uptime_never_earns_less(
            shape in prop::sample::select(vec![
                "tiers:99=100,95=50,90=10", "linear:80..100", "proportional:3", "tiers:50=1 probe_rate=2",
            ]),
            base in 1_u32..=6_000_000, uptimes in [0.0..=100.0_f64, 0.0..=100.0],
        ) {
            let [low, high] = if uptimes[0] <= uptimes[1] { uptimes } else { [uptimes[1], uptimes[0]] };
            let policy = policy(shape);
            prop_assert!(rate(&policy, base, low) <= rate(&policy, base, high));
            prop_assert!(rate(&policy, base, high) <= base);
        }

        #[test]
        fn what_is_shown_is_read_as_the_same(text in mutated(&[
            "tiers:99=100,95=50,90=10", "linear:90..99.5 recover_after=10m", "proportional:4 probe_rate=1 trust=verified",
        ])) {
            if let Ok(policy) = String::from_utf8_lossy(&text).parse::<Policy>() {
                prop_assert_eq!(policy.to_string().parse::<Policy>(), Ok(policy));
            }
        }

        #[test]
        fn no_recovery_exceeds_what_is_earned(
            steps in prop::collection::vec((0_u64..20, 0_u32..=60), 1..40), recover in 0_u64..30,
        ) {
            let policy = Policy { recover_after: Duration::from_secs(recover), ..Policy::default() };
            let mut recovery = Recovery::new(&policy);
            let mut now = Instant::now();
            let mut before = None;
            for (later, earned) in steps {
                now += Duration::from_secs(later);
                let rate = recovery.allow(Share::new(f64::from(earned) / 60.0), now);
                let rate = JobsPerMinute::new(60).share(rate).get();
                prop_assert!(rate <= earned);
                // Never lower than both what it was and what is earned.
                prop_assert!(before.is_none_or(|before: u32| rate >= before.min(earned)));
                before = Some(rate);
            }
        }
    }
}
