//! From what agents earn to what each is sent: of its own rate, or of a total that they share.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::allocation::{Allotted, Split, base_rates, earned, redistribute};
use super::job_stats::TrackRecord;
use super::policy::Policy;
use crate::runner::agents::monitor::Verdict;
use crate::runner::roster::AgentIndex;
use crate::units::JobsPerMinute;

/// The part of a new weight that counts at once: one bad minute must not turn all rates over.
const SMOOTHING: f64 = 0.3;

/// Where base rates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each agent has its own.
    Own,
    /// All agents share one.
    Total {
        /// All of it.
        rate: JobsPerMinute,
        /// By what it is shared out.
        split: Split,
        /// Whether what a punished agent loses goes to the others.
        redistribute: bool,
    },
}

/// What an agent's submitter has to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Orders {
    /// The slots to account for.
    pub base: JobsPerMinute,
    /// The jobs to send.
    pub rate: JobsPerMinute,
    /// What the agent has earned them by.
    pub verdict: Verdict,
}

/// The rates of all agents.
#[derive(Debug)]
pub struct Rates {
    policy: Policy,
    sharing: Sharing,
    seats: Mutex<Vec<Option<Seat>>>,
}

#[derive(Debug)]
struct Seat {
    base: JobsPerMinute,
    weight: Option<f64>,
    verdict: Option<Verdict>,
    track_record: Arc<TrackRecord>,
    orders: watch::Sender<Option<Orders>>,
}

impl Seat {
    /// Publishes what it gets, once something is known of the agent.
    fn publish(&self, Allotted { base, rate }: Allotted) {
        let Some(verdict) = self.verdict else {
            return;
        };
        let orders = Some(Orders {
            base,
            rate,
            verdict,
        });
        self.orders.send_if_modified(|published| {
            let modified = *published != orders;
            *published = orders;
            modified
        });
    }
}

impl Rates {
    /// For no agent yet.
    #[must_use]
    pub fn new(policy: Policy, sharing: Sharing) -> Self {
        Self {
            policy,
            sharing,
            seats: Mutex::default(),
        }
    }

    /// Takes in an agent, whose orders come by what is returned. Of a total it has its part after the
    /// next [`Self::rebalance`].
    pub fn join(
        &self,
        AgentIndex(agent): AgentIndex,
        own: JobsPerMinute,
        track_record: Arc<TrackRecord>,
    ) -> watch::Receiver<Option<Orders>> {
        let (orders, receiver) = watch::channel(None);
        let base = match self.sharing {
            Sharing::Own => own,
            Sharing::Total { .. } => JobsPerMinute::ZERO,
        };
        let mut seats = self.seats.lock();
        if seats.len() <= agent {
            seats.resize_with(agent + 1, || None);
        }
        seats[agent] = Some(Seat {
            base,
            weight: None,
            verdict: None,
            track_record,
            orders,
        });
        receiver
    }

    /// Lets an agent go.
    pub fn leave(&self, AgentIndex(agent): AgentIndex) {
        self.seats.lock()[agent] = None;
    }

    /// Takes in what an agent earns now.
    pub fn decide(&self, AgentIndex(agent): AgentIndex, verdict: Verdict) {
        let mut seats = self.seats.lock();
        // It may have left since.
        let Some(seat) = seats.get_mut(agent).and_then(Option::as_mut) else {
            return;
        };
        seat.verdict = Some(verdict);
        if let Sharing::Total {
            redistribute: true, ..
        } = self.sharing
        {
            self.publish(&seats);
            return;
        }
        let allotted = earned(&self.policy, &[seat.base], &[verdict.share()]);
        seat.publish(allotted[0]);
    }

    /// Shares out a total anew, by what is known now.
    pub fn rebalance(&self) {
        let Sharing::Total { rate, split, .. } = self.sharing else {
            return;
        };
        let mut seats = self.seats.lock();
        let mut present: Vec<&mut Seat> = seats.iter_mut().flatten().collect();
        for seat in &mut present {
            let uptime = seat.verdict.and_then(Verdict::uptime);
            let new = split.weight(uptime, seat.track_record.performance());
            seat.weight = match (seat.weight, new) {
                (Some(old), Some(new)) if split == Split::Performance => {
                    Some(old + SMOOTHING * (new - old))
                }
                (old, new) => new.or(old),
            };
        }
        let weights: Vec<_> = present.iter().map(|seat| seat.weight).collect();
        for (seat, base) in present.into_iter().zip(base_rates(rate, split, &weights)) {
            seat.base = base;
        }
        self.publish(&seats);
    }

    fn publish(&self, seats: &[Option<Seat>]) {
        let present = || seats.iter().flatten();
        let bases: Vec<_> = present().map(|seat| seat.base).collect();
        let shares: Vec<_> = present()
            .map(|seat| seat.verdict.and_then(Verdict::share))
            .collect();
        let mut allotted = earned(&self.policy, &bases, &shares);
        if let Sharing::Total {
            redistribute: true, ..
        } = self.sharing
        {
            redistribute(&mut allotted, &shares);
        }
        for (seat, allotted) in present().zip(allotted) {
            seat.publish(allotted);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::runner::testing::percent;

    struct Fleet {
        rates: Rates,
        orders: Vec<watch::Receiver<Option<Orders>>>,
    }

    impl Fleet {
        fn of(agents: usize, sharing: Sharing) -> Self {
            let rates = Rates::new(Policy::default(), sharing);
            let orders = (0..agents).map(|agent| {
                let track_record = TrackRecord::new(None, Duration::from_hours(1));
                rates.join(
                    AgentIndex(agent),
                    JobsPerMinute::new(60),
                    Arc::new(track_record),
                )
            });
            let orders = orders.collect();
            rates.rebalance();
            Self { rates, orders }
        }

        fn uptime(&self, agent: usize, uptime: f64) {
            let uptime = percent(uptime);
            let share = Policy::default().share(uptime);
            self.rates
                .decide(AgentIndex(agent), Verdict::Earns { uptime, share });
        }

        /// Base and rate of each agent of which something is known.
        fn now(&self) -> Vec<Option<(u32, u32)>> {
            let orders = self.orders.iter().map(|orders| *orders.borrow());
            orders
                .map(|orders| orders.map(|o| (o.base.get(), o.rate.get())))
                .collect()
        }
    }

    fn total(split: Split, redistribute: bool) -> Sharing {
        Sharing::Total {
            rate: JobsPerMinute::new(100),
            split,
            redistribute,
        }
    }

    #[test]
    fn own_rates_do_not_depend_on_others() {
        let fleet = Fleet::of(2, Sharing::Own);
        fleet.uptime(0, 96.0);
        assert_eq!(fleet.now(), [Some((60, 30)), None]);
        fleet.uptime(1, 99.0);
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((60, 30)), Some((60, 60))]);
    }

    #[test]
    fn what_is_withheld_stays_so_unless_it_is_redistributed() {
        for (redistribute, expected) in [
            (false, [Some((50, 50)), Some((50, 25))]),
            (true, [Some((75, 75)), Some((25, 25))]),
        ] {
            let fleet = Fleet::of(2, total(Split::Equal, redistribute));
            fleet.uptime(0, 99.5);
            fleet.uptime(1, 96.0);
            assert_eq!(fleet.now(), expected);
        }
    }

    #[test]
    fn agents_that_come_and_go_change_the_shares() {
        let mut fleet = Fleet::of(2, total(Split::Equal, false));
        fleet.uptime(0, 99.5);
        let track_record = Arc::new(TrackRecord::new(None, Duration::from_hours(1)));
        let joined = fleet
            .rates
            .join(AgentIndex(2), JobsPerMinute::new(60), track_record);
        fleet.orders.push(joined);
        fleet.rates.rebalance();
        fleet.uptime(2, 99.5);
        assert_eq!(fleet.now(), [Some((34, 34)), None, Some((33, 33))]);
        fleet.rates.leave(AgentIndex(1));
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((50, 50)), None, Some((50, 50))]);
        // Too late to matter.
        fleet.uptime(1, 99.5);
    }

    #[test]
    fn a_total_by_uptime_follows_it_at_the_next_rebalancing() {
        let fleet = Fleet::of(2, total(Split::Uptime, false));
        fleet.uptime(0, 100.0);
        fleet.uptime(1, 100.0);
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((50, 50)); 2]);
        fleet.uptime(1, 0.0);
        assert_eq!(fleet.now(), [Some((50, 50)), Some((50, 0))]);
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((100, 100)), Some((0, 0))]);
    }
}
