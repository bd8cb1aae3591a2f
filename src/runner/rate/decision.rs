//! What an agent's uptime earns it: by the policy, and by what its jobs say of the uptime it reports.

use std::time::Instant;

use super::claims::contradiction;
use super::policy::{Policy, Recovery, Trust};
use crate::runner::events::event::{Contradiction, Evidence, Freshness, RateReason};
use crate::units::{JobsPerMinute, Percent, Share};

/// What is known of an agent when its rate is decided.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Observation {
    /// How far the uptime can be trusted now.
    pub state: Freshness,
    /// The last known uptime.
    pub uptime: Option<Percent>,
    /// What its jobs say.
    pub evidence: Evidence,
}

/// What an agent's uptime earns it now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum RateDecision {
    /// A share of the base rate, which may be nothing.
    Earns {
        /// The uptime that the agent reports.
        uptime: Percent,
        /// The share that the policy gives for it.
        share: Share,
    },
    /// A share of the base rate, for less than the agent reports, because its jobs contradict that.
    Doubted {
        /// The uptime that the agent reports.
        uptime: Percent,
        /// The share that the policy gives for what its jobs say.
        share: Share,
    },
    /// No jobs, because no uptime of now is known.
    Suspended {
        /// The last known uptime.
        last_uptime: Option<Percent>,
        /// Why none of now is known.
        reason: RateReason,
    },
}

impl RateDecision {
    /// The share of the base rate; `None` where nothing is to be sent.
    #[must_use]
    pub(crate) fn share(self) -> Option<Share> {
        match self {
            Self::Earns { share, .. } | Self::Doubted { share, .. } => Some(share),
            Self::Suspended { .. } => None,
        }
    }

    /// The rate that this makes of a base rate: the policy's probe rate is sent in any case, but for an
    /// agent that is suspended.
    #[must_use]
    pub(crate) fn rate(self, policy: &Policy, base: JobsPerMinute) -> JobsPerMinute {
        let share = self.share();
        share.map_or(JobsPerMinute::ZERO, |share| policy.rate_of(base, share))
    }

    /// The last known uptime.
    #[must_use]
    pub(crate) fn uptime(self) -> Option<Percent> {
        match self {
            Self::Earns { uptime, .. } | Self::Doubted { uptime, .. } => Some(uptime),
            Self::Suspended { last_uptime, .. } => last_uptime,
        }
    }

    /// Why the share is what it is.
    #[must_use]
    pub(crate) fn reason(self) -> RateReason {
        match self {
            Self::Earns { .. } => RateReason::Uptime,
            Self::Doubted { .. } => RateReason::Evidence,
            Self::Suspended { reason, .. } => reason,
        }
    }
}

/// That an agent's jobs began to contradict the uptime it reports, or no longer do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ClaimChange {
    /// The uptime that it reports.
    pub uptime: Percent,
    /// What contradicts it, if anything does.
    pub contradiction: Option<Contradiction>,
}

/// What one agent's next decision depends on, beside what is observed.
#[derive(Debug)]
pub(crate) struct DecisionState {
    recovery: Recovery,
    decided: Option<RateDecision>,
    contradicted: bool,
}

impl DecisionState {
    /// Nothing is decided yet.
    #[must_use]
    pub(crate) fn new(policy: &Policy) -> Self {
        Self {
            recovery: Recovery::new(policy),
            decided: None,
            contradicted: false,
        }
    }

    /// What is decided; `None` until a first uptime was known.
    #[must_use]
    pub(crate) fn decided(&self) -> Option<RateDecision> {
        self.decided
    }

    /// When the share rises, if the uptime goes on to earn more.
    #[must_use]
    pub(crate) fn rises_at(&self) -> Option<Instant> {
        self.recovery.rises_at()
    }

    /// Decides again at `now`, and returns whether claim and evidence began or ceased to differ.
    pub(crate) fn decide(
        &mut self,
        policy: &Policy,
        observed: Observation,
        now: Instant,
    ) -> Option<ClaimChange> {
        let (Freshness::Fresh, Some(uptime)) = (observed.state, observed.uptime) else {
            // Rates begin with the first known uptime.
            if self.decided.is_some() {
                self.decided = Some(RateDecision::Suspended {
                    last_uptime: observed.uptime,
                    reason: observed.state.into(),
                });
            }
            return None;
        };
        let found = contradiction(policy, uptime, observed.evidence);
        let credible = match found {
            Some(found) if policy.trust() == Trust::Verified && found.success < uptime => {
                found.success
            }
            _ => uptime,
        };
        let share = self.recovery.allow(policy.share(credible), now);
        self.decided = Some(if credible < uptime {
            RateDecision::Doubted { uptime, share }
        } else {
            RateDecision::Earns { uptime, share }
        });
        let changed = found.is_some() != self.contradicted;
        self.contradicted = found.is_some();
        changed.then_some(ClaimChange {
            uptime,
            contradiction: found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::testing::percent;

    fn observed(state: Freshness, uptime: Option<f64>, jobs: u64, good: u64) -> Observation {
        Observation {
            state,
            uptime: uptime.map(percent),
            evidence: Evidence { jobs, good },
        }
    }

    fn fresh(uptime: f64) -> Observation {
        observed(Freshness::Fresh, Some(uptime), 0, 0)
    }

    fn sixty(decision: Option<RateDecision>, policy: &Policy) -> Option<u32> {
        decision.map(|decision| decision.rate(policy, JobsPerMinute::new(60)).get())
    }

    #[test]
    fn nothing_is_decided_before_the_first_known_uptime() {
        let policy = Policy::default();
        let mut state = DecisionState::new(&policy);
        let now = Instant::now();
        state.decide(&policy, observed(Freshness::Unknown, None, 0, 0), now);
        assert_eq!(state.decided(), None);
        state.decide(&policy, fresh(96.0), now);
        assert_eq!(sixty(state.decided(), &policy), Some(30));
        state.decide(&policy, observed(Freshness::Stale, Some(96.0), 0, 0), now);
        let suspended = state.decided().unwrap();
        assert_eq!(
            (suspended.share(), suspended.uptime()),
            (None, Some(percent(96.0)))
        );
        assert_eq!(suspended.reason(), RateReason::Stale);
    }

    #[test]
    fn the_probe_rate_is_sent_to_who_earned_nothing_but_not_to_who_is_suspended() {
        let policy: Policy = "tiers:99=100 probe_rate=2".parse().unwrap();
        let mut state = DecisionState::new(&policy);
        state.decide(&policy, fresh(50.0), Instant::now());
        assert_eq!(sixty(state.decided(), &policy), Some(2));
        let unknown = observed(Freshness::Unknown, None, 0, 0);
        state.decide(&policy, unknown, Instant::now());
        assert_eq!(sixty(state.decided(), &policy), Some(0));
    }

    #[test]
    fn a_claim_is_told_when_it_begins_and_ceases_to_be_contradicted() {
        for (policy, expected, reason) in [
            ("tiers:99=100,90=10", 60, RateReason::Uptime),
            ("tiers:99=100,90=10 trust=verified", 6, RateReason::Evidence),
        ] {
            let policy: Policy = policy.parse().unwrap();
            let mut state = DecisionState::new(&policy);
            let now = Instant::now();
            assert_eq!(state.decide(&policy, fresh(99.5), now), None);
            let failing = observed(Freshness::Fresh, Some(99.5), 100, 91);
            let change = state.decide(&policy, failing, now).unwrap();
            assert_eq!(change.contradiction.unwrap().evidence.good, 91);
            assert_eq!(state.decide(&policy, failing, now), None);
            assert_eq!(sixty(state.decided(), &policy), Some(expected));
            assert_eq!(state.decided().unwrap().reason(), reason);
            let change = state.decide(&policy, fresh(99.5), now).unwrap();
            assert_eq!(change.contradiction, None);
        }
    }
}
