//! What an agent claims against what became of its jobs.
//!
//! An agent that claims a tier says that its GPU was up for at least that share of the time, so at
//! least that share of the jobs that reached it should have succeeded. Were that so, `good` or fewer of
//! `jobs` would succeed by a chance of at most exp(−jobs × D), where D = q ln(q/p) + (1−q) ln((1−q)/(1−p)),
//! q = good ÷ jobs and p the tier (Chernoff's bound, which holds for any number of jobs). A chance of
//! at most one in 10000, over at least 50 jobs, contradicts the claim.

use super::policy::Policy;
use crate::runner::events::event::{Contradiction, Evidence};
use crate::units::Percent;
use crate::wire::outcome::{Outcome, Testimony};

/// Fewer jobs than this prove nothing.
pub(crate) const LEAST_JOBS: u64 = 50;
/// A chance over this proves nothing.
pub(crate) const LARGEST_CHANCE: f64 = 1e-4;
/// One job in a thousand may fail on any GPU, even where an uptime of 100 % is claimed.
const HIGHEST_CLAIM: f64 = 0.999;

/// What the jobs of an agent say of it that is tied to orchestrators of its own: they can go nowhere else, whatever the
/// orchestrators call themselves.
#[derive(Debug, Default)]
pub(crate) struct Witness {
    /// Whether its live runner was there before: a wrong label is answered as a runner that is gone.
    has_seen_runner: bool,
}

impl Witness {
    /// The orchestrator lists the agent's live runner.
    pub(crate) fn runner_listed(&mut self) {
        self.has_seen_runner = true;
    }

    /// What the next job to end says: whether the agent did it or failed it, `None` if it says nothing.
    pub(crate) fn says(&mut self, outcome: Outcome) -> Option<bool> {
        self.has_seen_runner |= outcome.shows_runner();
        match outcome.testimony() {
            Testimony::Against if outcome == Outcome::Unavailable => {
                self.has_seen_runner.then_some(false)
            }
            Testimony::For => Some(true),
            Testimony::Against => Some(false),
            Testimony::Nothing => None,
        }
    }
}

/// Whether the evidence contradicts the tier that an uptime claims; under the last one nothing is
/// claimed.
#[must_use]
pub(crate) fn contradiction(
    policy: &Policy,
    uptime: Percent,
    evidence: Evidence,
) -> Option<Contradiction> {
    let thresholds = policy.thresholds();
    let claimed_tier = if thresholds.is_empty() {
        uptime
    } else {
        thresholds.into_iter().find(|&tier| uptime >= tier)?
    };
    let Evidence { jobs, good } = evidence;
    if jobs < LEAST_JOBS {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "far fewer jobs than 2^53")]
    let (jobs, success) = (jobs as f64, good as f64 / jobs as f64);
    let chance = chance_of_so_few(jobs, success, claimed_tier.get() / 100.0);
    (chance <= LARGEST_CHANCE).then_some(Contradiction {
        claimed_tier,
        evidence,
        success: Percent::new(success * 100.0).unwrap_or(Percent::ZERO),
        chance,
    })
}

fn chance_of_so_few(jobs: f64, success: f64, claimed: f64) -> f64 {
    let claimed = claimed.min(HIGHEST_CLAIM);
    if success >= claimed {
        return 1.0;
    }
    // x ln x is 0 at 0.
    let part = |q: f64, p: f64| if q > 0.0 { q * (q / p).ln() } else { 0.0 };
    let divergence = part(success, claimed) + part(1.0 - success, 1.0 - claimed);
    (-jobs * divergence).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(policy: &str, uptime: f64, jobs: u64, good: u64) -> Option<Contradiction> {
        let uptime = Percent::new(uptime).unwrap();
        contradiction(&policy.parse().unwrap(), uptime, Evidence { jobs, good })
    }

    const TIERS: &str = "tiers:99=100,95=50,90=10";

    #[test]
    fn only_what_is_beyond_chance_contradicts() {
        // Of 100 jobs, 99 should be good: D(0.94 ‖ 0.99) × 100 = 5.9, a chance of 0.003.
        assert_eq!(of(TIERS, 99.5, 100, 94), None);
        // D(0.9 ‖ 0.99) × 100 = 14.4.
        let found = of(TIERS, 99.5, 100, 90).unwrap();
        assert_eq!(
            (found.claimed_tier, found.success),
            (Percent::whole(99), Percent::whole(90))
        );
        assert!(
            (found.chance.ln() + 14.448).abs() < 0.001,
            "{}",
            found.chance.ln()
        );
        // The tier of 90 % is kept.
        assert_eq!(of(TIERS, 92.0, 100, 90), None);
        // Nothing is claimed there.
        assert_eq!(of(TIERS, 89.9, 100, 0), None);
        // Too few to say anything.
        assert_eq!(of(TIERS, 100.0, 49, 0), None);
        assert!(of(TIERS, 100.0, 50, 0).is_some());
        assert_eq!(of("proportional:1", 100.0, 1000, 997), None);
        assert!(of("linear:90..100", 97.0, 1000, 900).is_some());
    }

    #[test]
    fn a_runner_that_was_never_seen_is_not_accused_of_being_gone() {
        let mut witness = Witness::default();
        assert_eq!(witness.says(Outcome::Unavailable), None);
        assert_eq!(witness.says(Outcome::HttpError), Some(false));
        assert_eq!(witness.says(Outcome::Unavailable), None);
        assert_eq!(witness.says(Outcome::NoPlace), None);
        assert_eq!(witness.says(Outcome::Unavailable), Some(false));
        let mut listed = Witness::default();
        listed.runner_listed();
        assert_eq!(listed.says(Outcome::Unavailable), Some(false));
    }

    /// P(at most `good` of `jobs`), exactly, term by term.
    fn binomial_tail(jobs: u64, good: u64, p: f64) -> f64 {
        let mut term = (1.0 - p).powi(jobs as i32);
        let mut sum = term;
        for k in 1..=good {
            term *= (jobs - k + 1) as f64 / k as f64 * p / (1.0 - p);
            sum += term;
        }
        sum
    }

    proptest! {
        #[test]
        fn the_chance_is_never_said_to_be_smaller_than_it_is(
            jobs in 1_u64..140, share in 0.0..=1.0_f64, claimed in 0.5..0.995_f64,
        ) {
            let good = (jobs as f64 * share) as u64;
            let said = chance_of_so_few(jobs as f64, good as f64 / jobs as f64, claimed);
            prop_assert!(binomial_tail(jobs, good, claimed) <= said * (1.0 + 1e-9) + 1e-12);
        }
    }
}
