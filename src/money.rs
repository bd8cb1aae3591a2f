//! Amounts of wei, always exact, and the price of compute.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::str::FromStr;

use num_bigint::BigInt;
use serde::{Serialize, Serializer};

/// The decimals of an ETH.
const DECIMALS: usize = 18;
/// The digits of 2^256, the most that the network can express.
const MAX_DIGITS: usize = 78;

/// A whole number of wei, which may be negative. Sums of any size are exact.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wei(BigInt);

/// Text that is no amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a whole number of wei of at most 256 bits")]
pub struct NotWei;

impl Wei {
    /// This many times the amount.
    #[must_use]
    pub fn times(&self, times: u64) -> Self {
        Self(&self.0 * times)
    }

    /// The amount times a fraction, rounded down to whole wei.
    #[must_use]
    pub fn part(&self, numerator: i128, denominator: u128) -> Self {
        Self(&self.0 * numerator / denominator.max(1))
    }

    /// An amount of at least 0 divided by `parts`, rounded up; `None` for 0 parts.
    #[must_use]
    pub fn for_each_of(&self, parts: u64) -> Option<Self> {
        let up = || (&self.0 + (parts - 1)) / parts;
        (parts > 0).then(|| Self(up()))
    }

    /// The amount divided by `part`, rounded down; `None` if `part` is 0.
    #[must_use]
    pub fn whole_times(&self, part: &Self) -> Option<u64> {
        let times = (part.0 != BigInt::ZERO).then(|| &self.0 / &part.0)?;
        Some(times.max(BigInt::ZERO).try_into().unwrap_or(u64::MAX))
    }

    /// Whether it is less than 0.
    #[must_use]
    pub fn is_negative(&self) -> bool {
        self.0 < BigInt::ZERO
    }

    /// Whether it is 0.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0 == BigInt::ZERO
    }

    /// As a number of ETH, for ratios and pictures, never for sums.
    #[must_use]
    pub fn approximate_eth(&self) -> f64 {
        self.in_eth().parse().unwrap_or(f64::NAN)
    }

    /// As an exact decimal number of ETH.
    #[must_use]
    pub fn in_eth(&self) -> String {
        let digits = self.0.magnitude().to_string();
        let digits = format!("{digits:0>width$}", width = DECIMALS + 1);
        let (whole, part) = digits.split_at(digits.len() - DECIMALS);
        let part = part.trim_end_matches('0');
        let sign = if self.is_negative() { "-" } else { "" };
        let point = if part.is_empty() { "" } else { "." };
        format!("{sign}{whole}{point}{part}")
    }
}

impl FromStr for Wei {
    type Err = NotWei;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let digits = text.strip_prefix('-').unwrap_or(text);
        let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let significant = digits.trim_start_matches('0').len();
        if !is_number || significant > MAX_DIGITS {
            return Err(NotWei);
        }
        let amount: BigInt = text.parse().map_err(|_| NotWei)?;
        if amount.bits() > 256 {
            return Err(NotWei);
        }
        Ok(Self(amount))
    }
}

impl fmt::Display for Wei {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// As text: JSON's numbers are not exact for all readers.
impl Serialize for Wei {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Add for Wei {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Sub<&Wei> for Wei {
    type Output = Self;

    fn sub(self, other: &Self) -> Self {
        Self(self.0 - &other.0)
    }
}

impl AddAssign<&Wei> for Wei {
    fn add_assign(&mut self, other: &Self) {
        self.0 += &other.0;
    }
}

impl SubAssign<&Wei> for Wei {
    fn sub_assign(&mut self, other: &Self) {
        self.0 -= &other.0;
    }
}

impl Sum for Wei {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::default(), Add::add)
    }
}

/// The price of a second of compute, or of a job, at least 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitPrice(Wei);

impl UnitPrice {
    /// The cost of this many units.
    #[must_use]
    pub fn for_units(&self, units: u64) -> Wei {
        self.0.times(units)
    }

    /// The cost of one unit.
    #[must_use]
    pub fn get(&self) -> &Wei {
        &self.0
    }
}

impl FromStr for UnitPrice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let price = text.parse().ok().filter(|price: &Wei| !price.is_negative());
        price
            .map(Self)
            .ok_or("expected whole wei per second of compute (per job of a live runner), from 0, of at most 256 bits")
    }
}

impl fmt::Display for UnitPrice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wei(text: &str) -> Wei {
        text.parse().unwrap()
    }

    /// 2^256 - 1.
    const MOST: &str =
        "115792089237316195423570985008687907853269984665640564039457584007913129639935";

    #[test]
    fn amounts_are_read_and_shown() {
        for text in ["0", "1", "-5", "18446744073709551616", MOST] {
            assert_eq!(wei(text).to_string(), text);
        }
        assert_eq!(wei(" 007 ").to_string(), "7");
        for bad in [
            "",
            "-",
            "1.5",
            "1e18",
            "+1",
            "0x10",
            "1 000",
            &format!("{MOST}0"),
            "--1",
        ] {
            assert_eq!(bad.parse::<Wei>(), Err(NotWei), "{bad}");
        }
        // 2^256.
        let over = MOST.replace("9935", "9936");
        assert_eq!(over.parse::<Wei>(), Err(NotWei));
        assert_eq!("-1".parse::<UnitPrice>().ok(), None);
    }

    #[test]
    fn eth_are_exact() {
        for (amount, eth) in [
            ("0", "0"),
            ("1", "0.000000000000000001"),
            ("-1500000000000000000", "-1.5"),
            ("2000000000000000000", "2"),
            ("123456789012345678901", "123.456789012345678901"),
        ] {
            assert_eq!(wei(amount).in_eth(), eth);
        }
    }

    #[test]
    fn costs_are_exact() {
        let price: UnitPrice = MOST.parse().unwrap();
        // Twice 2^256 - 1 is no 256 bit number, but still exact.
        assert_eq!(price.for_units(2).to_string().len(), 78);
    }

    proptest! {
        #[test]
        fn sums_and_parts_are_those_of_whole_numbers(a in any::<i64>(), b in any::<i64>(), parts in 1_u32..1000) {
            let [x, y] = [a, b].map(|n| wei(&n.to_string()));
            let (a, b) = (i128::from(a), i128::from(b));
            prop_assert_eq!((x.clone() + y.clone()).to_string(), (a + b).to_string());
            prop_assert_eq!((x.clone() - &y).to_string(), (a - b).to_string());
            prop_assert_eq!(x.times(parts.into()).to_string(), (a * i128::from(parts)).to_string());
            if a >= 0 {
                let each = x.for_each_of(parts.into()).unwrap().to_string();
                prop_assert_eq!(each, ((a + i128::from(parts) - 1) / i128::from(parts)).to_string());
            }
            let denominator = u128::from(parts);
            prop_assert_eq!(x.part(b, denominator).to_string(), (a * b / i128::from(parts)).to_string());
            if a >= 0 && b > 0 {
                prop_assert_eq!(x.whole_times(&y).map(i128::from), Some(a / b));
            }
        }
    }
}
