//! Wrong tokens cost a delay, for each address that sends them: guessing is slow, and nobody else waits.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What each wrong token costs its address.
const DELAY: Duration = Duration::from_millis(250);
/// The longest delay of one answer.
const MAX_DELAY: Duration = Duration::from_secs(5);
/// The most addresses that are remembered.
const MAX_ADDRESSES: usize = 10_000;

/// When the next wrong token of each address is answered.
#[derive(Debug, Default)]
pub(crate) struct WrongTokens(Mutex<HashMap<IpAddr, Instant>>);

impl WrongTokens {
    /// Takes in a wrong token of an address, and returns how long its answer is to wait.
    fn delay(&self, address: IpAddr, now: Instant) -> Duration {
        let mut next = self.0.lock();
        if next.len() >= MAX_ADDRESSES {
            next.retain(|_, at| *at > now);
            if next.len() >= MAX_ADDRESSES {
                next.clear();
            }
        }
        let at = next.get(&address).copied().unwrap_or(now).max(now);
        let at = (at + DELAY).min(now + MAX_DELAY);
        next.insert(address, at);
        at - now
    }

    /// Waits as long as the answer to a wrong token takes.
    pub(crate) async fn wait(&self, address: Option<IpAddr>) {
        let delay = address.map_or(DELAY, |address| self.delay(address, Instant::now()));
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_wrong_tokens_of_an_address_wait_for_each_other() {
        let wrong = WrongTokens::default();
        let [a, b] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().unwrap());
        let now = Instant::now();
        assert_eq!(wrong.delay(a, now), DELAY);
        assert_eq!(wrong.delay(a, now), 2 * DELAY);
        assert_eq!(wrong.delay(b, now), DELAY);
        for _ in 0..100 {
            wrong.delay(a, now);
        }
        assert_eq!(wrong.delay(a, now), MAX_DELAY);
        assert_eq!(wrong.delay(a, now + 2 * MAX_DELAY), DELAY);
    }

    #[test]
    fn addresses_do_not_fill_the_memory() {
        let wrong = WrongTokens::default();
        let now = Instant::now();
        for n in 0..3 * MAX_ADDRESSES {
            let address = std::net::Ipv4Addr::from(u32::try_from(n).unwrap());
            wrong.delay(address.into(), now);
        }
        assert!(wrong.0.lock().len() <= MAX_ADDRESSES);
    }
}
