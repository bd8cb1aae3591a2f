//! What may still be spent, in total and by each agent. Before a job is sent the most that it can cost is
//! reserved, so that a budget is never exceeded.

use parking_lot::Mutex;

use crate::money::Wei;
use crate::runner::roster::AgentIndex;
use crate::wire::charge::Price;

/// The budgets of a run.
#[derive(Debug)]
pub(crate) struct Budgets(Mutex<Balances>);

#[derive(Debug)]
struct Balances {
    common: Option<Balance>,
    agents: Vec<Option<Balance>>,
}

#[derive(Debug)]
struct Balance {
    /// Neither spent nor reserved.
    free: Wei,
    /// Jobs in flight: each may give back a part of its reservation.
    under_way: u64,
}

impl Balance {
    fn new(budget: Wei) -> Self {
        Self {
            free: budget,
            under_way: 0,
        }
    }
}

/// The answer to a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grant {
    /// Reserved: a job that is charged for at most this many units of its price.
    Units(u64),
    /// Nothing is left now, but jobs in flight may give something back.
    NotNow,
    /// The agent's budget is spent.
    AgentSpent,
    /// The run's budget is spent.
    AllSpent,
}

impl Budgets {
    /// With a common budget of all agents, if there is one.
    #[must_use]
    pub(crate) fn new(common: Option<Wei>) -> Self {
        Self(Mutex::new(Balances {
            common: common.map(Balance::new),
            agents: Vec::new(),
        }))
    }

    /// Gives an agent a budget of its own. An agent that comes back keeps what is left of its first one.
    pub(crate) fn open(&self, AgentIndex(agent): AgentIndex, budget: Option<Wei>) {
        let mut balances = self.0.lock();
        if balances.agents.len() <= agent {
            balances.agents.resize_with(agent + 1, || None);
        }
        let balance = &mut balances.agents[agent];
        if balance.is_none() {
            *balance = budget.map(Balance::new);
        }
    }

    /// Reserves what a job of `wanted` units costs at most, or of fewer units if less money is left.
    pub(crate) fn reserve(&self, agent: AgentIndex, price: &Price, wanted: u64) -> Grant {
        let mut balances = self.0.lock();
        let units =
            |balance: &Balance| balance.free.whole_times(price.unit.get()).unwrap_or(wanted);
        let granted = balances.of(agent).map(|balance| units(balance)).min();
        let granted = granted.map_or(wanted, |units| units.min(wanted));
        if granted > 0 {
            for balance in balances.of(agent) {
                balance.free -= &price.unit.for_units(granted);
                balance.under_way += 1;
            }
            return Grant::Units(granted);
        }
        let spent = |balance: &Balance| units(balance) == 0 && balance.under_way == 0;
        if balances.common.as_ref().is_some_and(spent) {
            Grant::AllSpent
        } else if balances.own(agent).is_some_and(spent) {
            Grant::AgentSpent
        } else {
            Grant::NotNow
        }
    }

    /// Ends a reservation of `granted` units, of which `charged` were spent.
    pub(crate) fn settle(&self, agent: AgentIndex, price: &Price, granted: u64, charged: u64) {
        for balance in self.0.lock().of(agent) {
            balance.free += &price.unit.for_units(granted);
            balance.free -= &price.unit.for_units(charged);
            balance.under_way -= 1;
        }
    }
}

impl Balances {
    fn own(&self, AgentIndex(agent): AgentIndex) -> Option<&Balance> {
        self.agents.get(agent)?.as_ref()
    }

    /// Those that pay for an agent's jobs.
    fn of(&mut self, AgentIndex(agent): AgentIndex) -> impl Iterator<Item = &mut Balance> {
        let own = self.agents.get_mut(agent).and_then(Option::as_mut);
        self.common.as_mut().into_iter().chain(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: AgentIndex = AgentIndex(0);
    const B: AgentIndex = AgentIndex(1);

    fn wei(amount: u64) -> Wei {
        amount.to_string().parse().unwrap()
    }

    fn price(amount: u64) -> Price {
        Price::per_second(amount)
    }

    #[test]
    fn what_is_set_aside_comes_back_but_for_what_was_charged() {
        let budgets = Budgets::new(Some(wei(5500)));
        assert_eq!(budgets.reserve(A, &price(1000), 3), Grant::Units(3));
        assert_eq!(budgets.reserve(B, &price(1000), 3), Grant::Units(2));
        assert_eq!(budgets.reserve(A, &price(1000), 3), Grant::NotNow);
        budgets.settle(A, &price(1000), 3, 1);
        assert_eq!(budgets.reserve(A, &price(1000), 3), Grant::Units(2));
        budgets.settle(B, &price(1000), 2, 2);
        budgets.settle(A, &price(1000), 2, 2);
        assert_eq!(budgets.reserve(A, &price(1000), 3), Grant::AllSpent);
        // What costs nothing is always granted.
        assert_eq!(budgets.reserve(A, &price(0), 3), Grant::Units(3));
    }

    #[test]
    fn an_agents_budget_is_its_own() {
        let budgets = Budgets::new(Some(wei(100)));
        budgets.open(B, Some(wei(10)));
        assert_eq!(budgets.reserve(B, &price(10), 9), Grant::Units(1));
        budgets.settle(B, &price(10), 1, 1);
        // Followed again, it has not got it back.
        budgets.open(B, Some(wei(10)));
        assert_eq!(budgets.reserve(B, &price(10), 9), Grant::AgentSpent);
        assert_eq!(budgets.reserve(A, &price(10), 99), Grant::Units(9));
        assert_eq!(
            Budgets::new(None).reserve(A, &price(10), 99),
            Grant::Units(99)
        );
    }

    proptest! {
        #[test]
        fn never_more_is_spent_than_there_is(
            budget in 0_u64..10_000, own in 0_u64..10_000, price_wei in 1_u64..100,
            jobs in prop::collection::vec((1_u64..50, 0.0..=1.0_f64, any::<bool>()), 1..100),
        ) {
            let budgets = Budgets::new(Some(wei(budget)));
            budgets.open(A, Some(wei(own)));
            let price = price(price_wei);
            let mut spent = 0;
            let mut under_way: Vec<(u64, u64)> = Vec::new();
            for (wanted, used, ends) in jobs {
                if let Grant::Units(granted) = budgets.reserve(A, &price, wanted) {
                    prop_assert!((1..=wanted).contains(&granted));
                    under_way.push((granted, (granted as f64 * used) as u64));
                }
                if ends && let Some((granted, charged)) = under_way.pop() {
                    spent += charged * price_wei;
                    budgets.settle(A, &price, granted, charged);
                }
                let worst: u64 = under_way.iter().map(|(granted, _)| granted * price_wei).sum();
                prop_assert!(spent + worst <= budget.min(own));
            }
        }
    }
}
