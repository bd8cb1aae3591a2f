//! Sharding of agents over several runners.

use std::num::NonZeroU32;
use std::str::FromStr;

/// One of N shards, as `K/N` with K from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    this: u32,
    all: NonZeroU32,
}

impl Shard {
    /// Whether an agent falls to this runner: to exactly one of N, whatever machine asks. With one
    /// runner more, only those agents change that fall to the new one (rendezvous hashing).
    #[must_use]
    pub fn holds(self, agent_id: &str) -> bool {
        let weight = |shard: u32| mixed(fnv_1a(agent_id.as_bytes()) ^ u64::from(shard));
        (1..=self.all.get()).max_by_key(|&shard| (weight(shard), shard)) == Some(self.this)
    }
}

impl FromStr for Shard {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.trim().split_once('/').and_then(|(this, all)| {
            let (this, all): (u32, NonZeroU32) = (this.parse().ok()?, all.parse().ok()?);
            let valid = (1..=all.get()).contains(&this) && all.get() <= 10_000;
            valid.then_some(Self { this, all })
        });
        parsed.ok_or("expected K/N with K from 1 to N, and N up to 10000, such as 2/3")
    }
}

/// The 64 bit FNV-1a hash: the same on every machine and in every version, unlike the standard
/// library's.
fn fnv_1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Mixes the bits, so that similar ids spread (the finaliser of SplitMix64).
fn mixed(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holder(agent_id: &str, all: u32) -> Vec<u32> {
        let all = NonZeroU32::new(all).unwrap();
        let shards = 1..=all.get();
        shards
            .filter(|&this| Shard { this, all }.holds(agent_id))
            .collect()
    }

    #[test]
    fn shards_are_read() {
        assert!("1/1".parse::<Shard>().unwrap().holds("anybody"));
        assert_eq!(" 2/3 ".parse::<Shard>().unwrap().this, 2);
        for bad in [
            "", "0/3", "4/3", "1/0", "1", "a/b", "1/3/5", "-1/3", "1/10001",
        ] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    #[test]
    fn who_holds_whom_never_changes() {
        let of = |id| holder(id, 3)[0];
        assert_eq!(
            ["agent-001", "agent-002", "agent-003", "agent-004", "ä"].map(of),
            [2, 1, 1, 1, 3]
        );
    }

    #[test]
    fn agents_are_spread_evenly() {
        let mut counts = [0; 8];
        for n in 0..8000 {
            counts[holder(&format!("agent-{n:03}"), 8)[0] as usize - 1] += 1;
        }
        assert!(
            counts.iter().all(|count| (850..1150).contains(count)),
            "{counts:?}"
        );
    }

    proptest! {
        #[test]
        fn each_agent_falls_to_exactly_one(id in ".{0,40}", all in 1_u32..40) {
            prop_assert_eq!(holder(&id, all).len(), 1);
        }

        #[test]
        fn one_more_runner_takes_agents_only_for_itself(id in ".{0,40}", all in 1_u32..40) {
            let (before, after) = (holder(&id, all), holder(&id, all + 1));
            prop_assert!(after == before || after == [all + 1]);
        }
    }
}
