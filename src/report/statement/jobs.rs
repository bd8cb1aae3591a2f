//! The jobs behind a statement, as CSV (RFC 4180).

use std::io::{self, Write};

use csv::{Terminator, Writer, WriterBuilder};
use sha2::{Digest, Sha256};

/// The columns.
pub(crate) const COLUMNS: [&str; 9] = [
    "job_id",
    "agent_id",
    "capability",
    "orchestrator",
    "sent_at",
    "outcome",
    "seconds",
    "price_wei",
    "amount_wei",
];

/// Writes the jobs, and hashes what it writes.
pub(crate) struct JobsFile<W: Write>(Writer<Hashing<W>>);

struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<W: Write> JobsFile<W> {
    /// Begins with the header.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn new(inner: W) -> csv::Result<Self> {
        let hash = Sha256::new();
        let mut out = WriterBuilder::new()
            .terminator(Terminator::CRLF)
            .from_writer(Hashing { inner, hash });
        out.write_record(COLUMNS)?;
        Ok(Self(out))
    }

    /// Adds a job, in the order of [`COLUMNS`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&mut self, fields: [&str; COLUMNS.len()]) -> csv::Result<()> {
        self.0
            .write_record(fields.map(cell).iter().map(AsRef::as_ref))
    }

    /// Returns the hash of the whole file in hexadecimal.
    ///
    /// # Errors
    /// When the rest cannot be written.
    pub(crate) fn finish(self) -> io::Result<String> {
        let mut out = self
            .0
            .into_inner()
            .map_err(csv::IntoInnerError::into_error)?;
        out.flush()?;
        Ok(hex(&out.hash.finalize()))
    }
}

/// The hash of a file in hexadecimal.
#[must_use]
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// What a spreadsheet would take for a formula.
const FORMULAS: [char; 6] = ['=', '+', '-', '@', '\t', '\r'];

/// A cell that no spreadsheet takes for a formula.
#[must_use]
pub(crate) fn cell(text: &str) -> std::borrow::Cow<'_, str> {
    if text.starts_with(FORMULAS) {
        format!("'{text}").into()
    } else {
        text.into()
    }
}

/// The text of a cell.
#[must_use]
pub(crate) fn text_of(cell: &str) -> &str {
    cell.strip_prefix('\'')
        .filter(|text| text.starts_with(FORMULAS))
        .unwrap_or(cell)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cell_is_a_formula() {
        for text in ["=1+1", "+a", "-5", "@x", "\tx", "\rx"] {
            assert_eq!(cell(text), format!("'{text}"));
            assert_eq!(text_of(&cell(text)), text);
        }
        for text in ["", "agent-001", "'a", "5"] {
            assert_eq!(cell(text), text);
            assert_eq!(text_of(text), text);
        }
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
