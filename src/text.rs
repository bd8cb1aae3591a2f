//! Text that is put together by [`std::fmt::Write`], and text of other programs.

use std::fmt::{self, Write};

use icu_properties::CodePointMapData;
use icu_properties::props::GeneralCategory;

/// The text that `write` writes. For functions that write with `write!` and `?`: a string takes
/// whatever is written, so their errors end here.
pub(crate) fn build(write: impl FnOnce(&mut String) -> fmt::Result) -> String {
    let mut text = String::new();
    write(&mut text).expect("a string takes whatever is written");
    text
}

/// A text of another program for one line of a terminal, a log, JSON or a record: white space is a single space, and
/// what is not printed (control characters, escape sequences, marks of direction, zero width or the end of a line) is
/// written as an escape. At most `max_chars` characters, the last of which is `…` if something is left out.
#[must_use]
pub(crate) fn foreign(text: &str, max_chars: usize) -> String {
    let mut shown = String::new();
    let mut chars = 0;
    for word in text.split_whitespace() {
        let space = (!shown.is_empty()).then_some(' ');
        for c in space.into_iter().chain(word.chars()) {
            let before = shown.len();
            if c == ' ' || is_printable(c) {
                shown.push(c);
            } else {
                let _ = write!(shown, "{}", c.escape_unicode());
            }
            chars += shown[before..].chars().count();
            if chars > max_chars {
                let kept = shown.char_indices().nth(max_chars.saturating_sub(1));
                shown.truncate(kept.map_or(0, |(at, _)| at));
                shown.push('…');
                return shown;
            }
        }
    }
    shown
}

/// How much of a name is shown: ids and capabilities of up to 256 bytes are shown whole.
const MAX_NAME_CHARS: usize = 256;

/// A name that was recorded or stated by another program, for a line of text.
#[must_use]
pub(crate) fn foreign_name(name: &str) -> String {
    foreign(name, MAX_NAME_CHARS)
}

/// Whether a character is seen as itself, wherever it stands. Spaces are not.
#[must_use]
pub(crate) fn is_printable(c: char) -> bool {
    use GeneralCategory as Category;
    !matches!(
        CodePointMapData::<Category>::new().get(c),
        Category::Control
            | Category::Format
            | Category::Surrogate
            | Category::PrivateUse
            | Category::Unassigned
            | Category::SpaceSeparator
            | Category::LineSeparator
            | Category::ParagraphSeparator
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_printed_is_shown_as_an_escape() {
        for (text, shown) in [
            ("two\r\n\tlines \n", "two lines"),
            ("\u{1b}[2Jgone\0", "\\u{1b}[2Jgone\\u{0}"),
            ("a\u{202e}b\u{2066}c", "a\\u{202e}b\\u{2066}c"),
            ("zero\u{200b}width\u{feff}", "zero\\u{200b}width\\u{feff}"),
            ("c1 \u{9b}31m", "c1 \\u{9b}31m"),
            ("a\u{2028}b\u{a0}c", "a b c"),
            ("ä ö 日本", "ä ö 日本"),
            ("", ""),
        ] {
            assert_eq!(foreign(text, 100), shown);
        }
        assert_eq!(foreign("abcdef", 6), "abcdef");
        assert_eq!(foreign("abcdefg", 6), "abcde…");
    }

    proptest! {
        #[test]
        fn any_text_fits_on_a_line_and_within_its_bound(text in any::<String>(), max in 1_usize..50) {
            let shown = foreign(&text, max);
            prop_assert!(shown.chars().count() <= max);
            prop_assert!(shown.chars().all(|c| c == ' ' || is_printable(c)));
        }
    }
}
