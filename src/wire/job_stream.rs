//! The event stream that answers a job (`.github/docs/protocol.md` section 3.2).

use memchr::memmem;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::outcome::Outcome;

/// The longest line that is looked at; of a longer one only the beginning is kept.
const MAX_LINE_BYTES: usize = 64 << 10;
/// So many empty lines in a row are a stream that was cut: the gateway sends them without end.
const MAX_EMPTY_LINES: u32 = 100;
const DONE: &[u8] = b"data: [DONE]";
/// The events of the gateway and the worker that are no results.
const OUT_OF_FUNDS: &str = "insufficient balance";
const ERROR: &str = "error";

/// Whether a stream goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamState {
    GoesOn,
    /// Its end mark: nothing that follows belongs to this job.
    Done,
    /// Nothing more will come, though the connection stays open.
    Cut,
}

/// Who sends a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StreamSource {
    /// A gateway, which tells between the worker's events what is left of its money.
    #[default]
    Gateway,
    /// A worker alone, whose word on that is worth nothing.
    Worker,
}

/// What a stream has said so far.
#[derive(Debug, Default)]
pub struct JobStream {
    source: StreamSource,
    line: Vec<u8>,
    /// The kind of the event that is being read.
    kind: String,
    empty_lines: u32,
    failure: Option<(Outcome, String)>,
    /// The wei left, as the stream tells it before its end.
    balance_wei: Option<String>,
}

impl JobStream {
    /// Nothing yet.
    #[must_use]
    pub fn new(source: StreamSource) -> Self {
        Self {
            source,
            ..Self::default()
        }
    }

    /// Reads a piece, which may be split anywhere.
    pub fn push(&mut self, mut piece: &[u8]) -> StreamState {
        while let Some(end) = memchr::memchr(b'\n', piece) {
            let state = if self.line.is_empty() {
                self.end_of_line(&piece[..end.min(MAX_LINE_BYTES)])
            } else {
                self.keep(&piece[..end]);
                let mut line = std::mem::take(&mut self.line);
                let state = self.end_of_line(&line);
                line.clear();
                self.line = line;
                state
            };
            if state != StreamState::GoesOn {
                return state;
            }
            piece = &piece[end + 1..];
        }
        self.keep(piece);
        StreamState::GoesOn
    }

    /// Keeps the next part of a line that has not ended.
    fn keep(&mut self, part: &[u8]) {
        let room = MAX_LINE_BYTES - self.line.len();
        self.line.extend_from_slice(&part[..part.len().min(room)]);
    }

    fn end_of_line(&mut self, line: &[u8]) -> StreamState {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            self.kind.clear();
            self.empty_lines += 1;
            return if self.empty_lines >= MAX_EMPTY_LINES {
                StreamState::Cut
            } else {
                StreamState::GoesOn
            };
        }
        self.empty_lines = 0;
        if line == DONE {
            return StreamState::Done;
        }
        if let Some(kind) = field(line, b"event:") {
            self.kind = String::from_utf8_lossy(kind).into_owned();
            if self.kind == OUT_OF_FUNDS && self.source == StreamSource::Gateway {
                self.decide(Outcome::Unpaid, "the gateway's balance is used up");
            } else if self.kind == ERROR {
                self.decide(Outcome::WorkerError, "an error event");
            }
        } else if let Some(data) = field(line, b"data:") {
            self.read_data(data);
        }
        StreamState::GoesOn
    }

    fn read_data(&mut self, data: &[u8]) {
        /// The fields that mean something in any object.
        #[derive(Deserialize)]
        struct Data<'a> {
            #[serde(default)]
            error: Value,
            /// As it is written: it may exceed what a float can hold.
            #[serde(borrow)]
            balance: Option<&'a RawValue>,
        }
        // Most events are results. Only a name with an escape is neither of these and may mean one of them.
        let may_matter = |data| {
            ["error", "balance", "\\"]
                .iter()
                .any(|name| memmem::find(data, name.as_bytes()).is_some())
        };
        if !may_matter(data) {
            return;
        }
        let Ok(Data { error, balance }) = serde_json::from_slice(data) else {
            return;
        };
        match error {
            Value::Null => {}
            Value::String(text) => self.decide(Outcome::WorkerError, &text),
            other => self.decide(Outcome::WorkerError, &other.to_string()),
        }
        if let Some(balance) = balance
            && self.source == StreamSource::Gateway
        {
            self.balance_wei = whole_wei(balance.get());
        }
    }

    /// The first thing that goes wrong decides. What an error event says is told by its data, which follows.
    fn decide(&mut self, outcome: Outcome, reason: &str) {
        match &mut self.failure {
            None => self.failure = Some((outcome, reason.to_owned())),
            Some((Outcome::WorkerError, known)) if known == "an error event" => {
                reason.clone_into(known);
            }
            Some(_) => {}
        }
    }

    /// What went wrong so far, with the reason.
    #[must_use]
    pub fn failure(&self) -> Option<(Outcome, String)> {
        self.failure.clone()
    }

    /// Whether the gateway's money ran out before anything else went wrong.
    #[must_use]
    pub fn is_unpaid(&self) -> bool {
        matches!(self.failure, Some((Outcome::Unpaid, _)))
    }

    #[must_use]
    pub fn balance_wei(&self) -> Option<&str> {
        self.balance_wei.as_deref()
    }
}

fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let value = line.strip_prefix(name)?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

/// A number of wei, which a stream tells with decimals that are 0.
fn whole_wei(number: &str) -> Option<String> {
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let is_whole = decimals.bytes().all(|digit| digit == b'0');
    (is_whole && super::gateway::balance_wei(whole).is_some()).then(|| whole.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn read(text: &str) -> (StreamState, Option<Outcome>, Option<String>) {
        let mut stream = JobStream::default();
        let state = stream.push(text.as_bytes());
        let outcome = stream.failure().map(|(outcome, _)| outcome);
        (state, outcome, stream.balance_wei().map(str::to_owned))
    }

    #[test]
    fn a_stream_ends_at_its_mark_and_tells_the_balance_before() {
        let text = "data: {\"n\": 1}\n\ndata: {\"balance\": 7629330000.000}\n\n\ndata: [DONE]\n";
        let balance = Some("7629330000".to_owned());
        assert_eq!(read(text), (StreamState::Done, None, balance));
        let balance = |text: &str| read(&format!("data: {{\"balance\": {text}}}\n")).2;
        let large =
            "-115792089237316195423570985008687907853269984665640564039457584007913129639935";
        assert_eq!(balance(&format!("{large}.000")).as_deref(), Some(large));
        for none in ["1.5", "1e18", "\"7\"", "null", "{}"] {
            assert_eq!(balance(none), None, "{none}");
        }
        let both = "data: {\"error\": \"lost\", \"balance\": \"?\"}\n";
        assert_eq!(read(both).1, Some(Outcome::WorkerError));
        // In prose, in a comment and in another line it means nothing.
        for text in [
            "data: she said [DONE]\n",
            ": data: [DONE]\n",
            "data: [DONE] \n",
            "data:[DONE]\n",
            "data: [DONE]",
        ] {
            assert_eq!(read(text), (StreamState::GoesOn, None, None), "{text:?}");
        }
    }

    #[test]
    fn the_first_thing_that_goes_wrong_decides() {
        let funds = "event: insufficient balance\ndata: {\"balance\": 0}\n\n";
        let error = "event: error\ndata: {\"error\": \"out of memory\"}\n\n";
        assert_eq!(read(funds).1, Some(Outcome::Unpaid));
        assert_eq!(read(error).1, Some(Outcome::WorkerError));
        assert_eq!(read(&format!("{funds}{error}")).1, Some(Outcome::Unpaid));
        assert_eq!(
            read(&format!("{error}{funds}data: [DONE]\n")).1,
            Some(Outcome::WorkerError)
        );
        let mut worker = JobStream::new(StreamSource::Worker);
        worker.push(funds.as_bytes());
        assert_eq!((worker.failure(), worker.balance_wei()), (None, None));
        assert_eq!(read("data: {\"error\": null}\n\n").1, None);
        assert_eq!(
            read("data: {\"error\": {\"code\": 5}}\n\n").1,
            Some(Outcome::WorkerError)
        );
        assert_eq!(read("data: error\n\n").1, None);
        let mut stream = JobStream::default();
        stream.push(error.as_bytes());
        assert_eq!(stream.failure().unwrap().1, "out of memory");
    }

    #[test]
    fn a_flood_of_empty_lines_is_a_stream_that_was_cut() {
        let lines = |count| "\n".repeat(count);
        assert_eq!(read(&lines(99)).0, StreamState::GoesOn);
        assert_eq!(read(&lines(100)).0, StreamState::Cut);
        let between = format!("{}data: 1\n{}", lines(99), lines(99));
        assert_eq!(read(&between).0, StreamState::GoesOn);
    }

    proptest! {
        #[test]
        fn it_reads_the_same_however_it_is_cut(
            text in "(data: \\[DONE\\]|data: 1|event: error|x|\n){0,12}",
            cuts in prop::collection::vec(0..200_usize, 0..6),
        ) {
            let whole = read(&text);
            let mut stream = JobStream::default();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| cut <= text.len()).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut state = StreamState::GoesOn;
            for pair in cuts.windows(2) {
                if state == StreamState::GoesOn {
                    state = stream.push(&text.as_bytes()[pair[0]..pair[1]]);
                }
            }
            prop_assert_eq!(state, whole.0);
            prop_assert_eq!(stream.failure().map(|(outcome, _)| outcome), whole.1);
        }

        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let _ = JobStream::default().push(&bytes);
        }

        /// However an answer goes on after its end: what it was stays what it was.
        #[test]
        fn nearly_right_streams_are_read(bytes in mutated(&[
            "data: {\"token\":\"a\"}\n\nevent: error\ndata: {\"error\":\"x\"}\n\ndata: {\"balance\": -7}\n\ndata: [DONE]\n\n",
            ": waiting\r\ndata: 1\r\n\r\nevent: insufficient balance\ndata: [DONE]\n",
        ])) {
            let mut stream = JobStream::default();
            let state = stream.push(&bytes);
            let failed = stream.failure().map(|(outcome, _)| outcome);
            prop_assert!(state != StreamState::Done || bytes.windows(12).any(|line| line == b"data: [DONE]"));
            if state == StreamState::GoesOn {
                stream.push(b"\nevent: error\ndata: {}\n\ndata: [DONE]\n");
                prop_assert!(failed.is_none() || stream.failure().map(|(outcome, _)| outcome) == failed);
            }
            prop_assert!(stream.balance_wei().is_none_or(|wei| wei.len() <= bytes.len()));
        }
    }
}
