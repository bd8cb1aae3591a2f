//! Writes lines to standard output from a thread of its own, so that a slow terminal, pipe or disk
//! cannot hold up the pace; keeps a terminal's status line below them.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::runner::events::worker::Worker;
use crate::terminal;

/// The bound on bytes that wait to be written.
const CAPACITY_BYTES: usize = 4 << 20;
/// Lines of this span of time are written together.
const BATCH: Duration = Duration::from_millis(25);
/// A queue of lines and the thread that writes them.
#[derive(Debug)]
pub(crate) struct Writer {
    shared: Arc<WriterShared>,
    thread: Worker,
}

#[derive(Debug)]
struct WriterShared {
    queue: Mutex<LineQueue>,
    filled: Condvar,
    written: Notify,
    /// Cancelled when standard output fails.
    failed: CancellationToken,
}

#[derive(Debug, Default)]
struct LineQueue {
    lines: Vec<u8>,
    status: Option<String>,
    closed: bool,
    /// Whether the thread waits on `filled`.
    idle: bool,
    error: Option<io::Error>,
}

impl Writer {
    /// Starts the thread. `failed` is cancelled when `out` cannot be written to.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(
        out: impl Write + Send + 'static,
        failed: CancellationToken,
    ) -> io::Result<Self> {
        let shared = Arc::new(WriterShared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            written: Notify::new(),
            failed,
        });
        let thread = Worker::start("output", {
            let shared = Arc::clone(&shared);
            move || shared.write_all_to(out)
        })?;
        Ok(Self { shared, thread })
    }

    pub(crate) fn write(&self, lines: &[u8]) {
        let mut queue = self.shared.queue.lock();
        if queue.error.is_none() {
            queue.lines.extend_from_slice(lines);
            self.shared.wake(&queue);
        }
    }

    /// Shows a status line below the lines, in place of the last one.
    pub(crate) fn set_status(&self, status: String) {
        let mut queue = self.shared.queue.lock();
        queue.status = Some(status);
        self.shared.wake(&queue);
    }

    /// Whether more lines can wait.
    #[must_use]
    pub(crate) fn has_capacity(&self) -> bool {
        self.shared.queue.lock().lines.len() < CAPACITY_BYTES
    }

    /// Waits until more lines can wait.
    pub(crate) async fn ready(&self) {
        loop {
            // Registered before the queue is checked, so that a batch written in between is not missed.
            let written = self.shared.written.notified();
            if self.has_capacity() {
                return;
            }
            written.await;
        }
    }

    /// Waits until all lines are written; no more can be.
    ///
    /// # Errors
    /// The error of standard output.
    pub(crate) async fn close(&self) -> io::Result<()> {
        {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
            self.shared.wake(&queue);
        }
        self.thread.ended().await?;
        self.shared.queue.lock().error.take().map_or(Ok(()), Err)
    }
}

impl WriterShared {
    /// Wakes the thread if it waits. Between two batches it does not: to be woken for each line
    /// would cost more than the line.
    fn wake(&self, queue: &LineQueue) {
        if queue.idle {
            self.filled.notify_one();
        }
    }

    fn write_all_to(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        let mut status = String::new();
        loop {
            let mut queue = self.queue.lock();
            queue.idle = true;
            while queue.lines.is_empty() && queue.status.is_none() && !queue.closed {
                self.filled.wait(&mut queue);
            }
            queue.idle = false;
            let closed = queue.closed;
            batch.clear();
            std::mem::swap(&mut batch, &mut queue.lines);
            if let Some(new) = queue.status.take() {
                status = new;
            }
            if closed {
                status.clear();
            }
            drop(queue);
            if let Err(error) = write_batch(&mut out, &batch, &status) {
                let mut queue = self.queue.lock();
                queue.lines = Vec::new();
                queue.error = Some(error);
                self.failed.cancel();
                self.written.notify_waiters();
                return;
            }
            self.written.notify_waiters();
            if closed {
                return;
            }
            std::thread::sleep(BATCH);
        }
    }
}

fn write_batch(out: &mut impl Write, batch: &[u8], status: &str) -> io::Result<()> {
    out.write_all(terminal::clear_status())?;
    out.write_all(batch)?;
    if !status.is_empty() {
        out.write_all(status.as_bytes())?;
        terminal::status_shown();
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Blocks in every write until it is let go on.
    struct Gate {
        reached: mpsc::Sender<()>,
        go: mpsc::Receiver<()>,
        seen: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.reached.send(());
            let _ = self.go.recv();
            self.seen.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_stalled_output_leaves_no_room_but_loses_nothing() {
        let (reached, stalls) = mpsc::channel();
        let (go, gate) = mpsc::channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let out = Gate {
            reached,
            go: gate,
            seen: Arc::clone(&seen),
        };
        let writer = Writer::start(out, CancellationToken::new()).unwrap();
        let line = vec![b'x'; 1 << 20];
        writer.write(&line);
        // From here on the thread takes no more lines.
        stalls.recv().unwrap();
        while writer.has_capacity() {
            writer.write(&line);
        }
        let mut ready = std::pin::pin!(writer.ready());
        let stalled =
            std::future::poll_fn(|cx| std::task::Poll::Ready(ready.as_mut().poll(cx).is_pending()));
        assert!(stalled.await);
        drop(go);
        ready.await;
        writer.write(b"end\n");
        writer.close().await.unwrap();
        let seen = seen.lock();
        assert!(seen.len() > CAPACITY_BYTES && seen.ends_with(b"xend\n"));
    }

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from(io::ErrorKind::StorageFull))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn an_output_that_takes_no_more_is_told() {
        let failed = CancellationToken::new();
        let writer = Writer::start(Full, failed.clone()).unwrap();
        writer.write(b"line\n");
        failed.cancelled().await;
        writer.ready().await;
        let error = writer.close().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
