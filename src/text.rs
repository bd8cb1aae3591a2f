//! Text that is put together by [`std::fmt::Write`].

use std::fmt;

/// The text that `write` writes. For functions that write with `write!` and `?`: a string takes
/// whatever is written, so their errors end here.
pub(crate) fn build(write: impl FnOnce(&mut String) -> fmt::Result) -> String {
    let mut text = String::new();
    write(&mut text).expect("a string takes whatever is written");
    text
}
