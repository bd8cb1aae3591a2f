//! Nearly right input, for tests of what reads foreign bytes: random bytes hardly ever get far.

use proptest::prelude::*;
use proptest::sample::{Index, select};

/// One of these texts with a few bytes changed, left out, doubled or put in.
pub(crate) fn mutated(texts: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let tokens = select(vec![
        "\"", "{", "}", "[", "]", ",", ":", "-", "0", "9e999", "null", "\\u0000", "\u{fffd}", "\n",
        "=", "NaN", " ",
    ]);
    let edit = (any::<Index>(), 0_u8..4, any::<u8>(), tokens);
    (select(texts), prop::collection::vec(edit, 0..6)).prop_map(|(text, edits)| {
        let mut bytes = text.as_bytes().to_vec();
        for (place, kind, byte, token) in edits {
            if bytes.is_empty() {
                break;
            }
            let place = place.index(bytes.len());
            match kind {
                0 => bytes[place] = byte,
                1 => drop(bytes.drain(place..(place + usize::from(byte % 8)).min(bytes.len()))),
                2 => bytes.extend_from_within(place..),
                _ => drop(bytes.splice(place..place, token.bytes())),
            }
        }
        bytes
    })
}
