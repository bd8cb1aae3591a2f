//! Parses server-sent events incrementally (the `EventSource` part of the HTML
//! standard).

use std::mem;

/// The longest line, and the longest data of one event, that is read.
const MAX_BYTES: usize = 64 << 10;

/// One event: its kind, and its data with a newline between its lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ServerSentEvent {
    /// The value of `event:`; `message` if there was none.
    pub kind: String,
    /// The value of `data:`.
    pub data: String,
}

/// The stream is not an event stream, or has an event that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event over {} KiB", MAX_BYTES >> 10)]
pub(crate) struct TooLong;

/// Parses events from pieces of text that may be split anywhere.
#[derive(Debug, Default)]
pub(crate) struct EventReader {
    line: Vec<u8>,
    /// A line that ended with a carriage return may go on with a newline that belongs to it.
    after_return: bool,
    event: ServerSentEvent,
}

impl EventReader {
    /// Returns the events that this piece completes.
    ///
    /// # Errors
    /// An event that grows too long; the stream cannot be read further.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Result<Vec<ServerSentEvent>, TooLong> {
        let mut events = Vec::new();
        for &byte in piece {
            let after_return = mem::replace(&mut self.after_return, byte == b'\r');
            match byte {
                b'\n' if after_return => {}
                b'\n' | b'\r' => events.extend(self.end_of_line()),
                _ if self.line.len() + self.event.data.len() >= MAX_BYTES => return Err(TooLong),
                _ => self.line.push(byte),
            }
        }
        Ok(events)
    }

    fn end_of_line(&mut self) -> Option<ServerSentEvent> {
        let line = mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        if line.is_empty() {
            let mut event = mem::take(&mut self.event);
            let has_data = event.data.pop().is_some();
            // The standard discards an event without data, but one with a kind says something: `resync`.
            if !has_data && event.kind.is_empty() {
                return None;
            }
            if event.kind.is_empty() {
                "message".clone_into(&mut event.kind);
            }
            return Some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.kind),
            "data" => {
                self.event.data.push_str(value);
                self.event.data.push('\n');
            }
            // Comments, which are keep-alives, and fields that are not needed here.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn event(kind: &str, data: &str) -> ServerSentEvent {
        ServerSentEvent {
            kind: kind.to_owned(),
            data: data.to_owned(),
        }
    }

    const STREAM: &[u8] = b": hello\n\nevent: ping\ndata: {\"a\":\ndata:1}\nid: 7\n\ndata\n\r\n\
        event: nothing\r\n\r\ndata: last\r\r: \n\ndata: not ended\n";

    #[test]
    fn events_are_read_however_the_stream_is_cut() {
        let whole = [
            event("ping", "{\"a\":\n1}"),
            event("message", ""),
            event("nothing", ""),
            event("message", "last"),
        ];
        for size in 1..STREAM.len() {
            let mut reader = EventReader::default();
            let mut events = Vec::new();
            for piece in STREAM.chunks(size) {
                events.extend(reader.push(piece).unwrap());
            }
            assert_eq!(events, whole, "{size}");
        }
    }

    #[test]
    fn no_event_grows_without_end() {
        for endless in ["x", "data: x\n", "event: x\ndata: yyyyyyyyy\n"] {
            let mut reader = EventReader::default();
            let pieces = endless.repeat(1000);
            let all = (0..1000).try_for_each(|_| reader.push(pieces.as_bytes()).map(drop));
            assert_eq!(all, Err(TooLong), "{endless}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
            let mut reader = EventReader::default();
            for piece in pieces {
                let _ = reader.push(&piece);
            }
        }

        #[test]
        fn nearly_right_streams_are_read_or_refused(bytes in mutated(&[
            ": \n\nevent: ping\ndata: {\"a\":1}\n\nevent: resync\ndata\r\n\r\ndata: last\n\n",
        ])) {
            let events = EventReader::default().push(&bytes).unwrap_or_default();
            let told: usize = events.iter().map(|event| event.data.len()).sum();
            // Bytes that are no UTF-8 are shown by three.
            prop_assert!(told <= 3 * bytes.len());
        }
    }
}
