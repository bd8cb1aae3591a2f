//! Threads that run the database's blocking calls, off the runtime.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::super::StoreError;
use super::connection::Connection;

/// Jobs that wait for a thread; more make their callers wait.
const QUEUE: usize = 256;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A queue of jobs, served by one thread per connection. The threads end when the last clone is dropped.
#[derive(Debug, Clone)]
pub(super) struct Worker(mpsc::Sender<Job>);

impl Worker {
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(name: &str, connections: Vec<Connection>) -> std::io::Result<Self> {
        let (sender, jobs) = mpsc::channel::<Job>(QUEUE);
        let jobs = Arc::new(Mutex::new(jobs));
        for mut connection in connections {
            let jobs = Arc::clone(&jobs);
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    loop {
                        // Whoever holds the lock waits for the next job, the others for the lock.
                        let job = jobs.lock().blocking_recv();
                        let Some(job) = job else { return };
                        job(&mut connection);
                    }
                })?;
        }
        Ok(Self(sender))
    }

    /// Runs a job and returns its result.
    ///
    /// If this is cancelled, or `timeout` is over, a job that has not begun is skipped; one that has begun goes on.
    ///
    /// # Errors
    /// The job's own, or no result in time.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        timeout: Duration,
        job: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (result, receiver) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            if !result.is_closed() {
                // The caller may have gone meanwhile.
                let _ = result.send(job(connection));
            }
        });
        let answered = async {
            self.0.send(job).await.ok()?;
            receiver.await.ok()
        };
        match tokio::time::timeout(timeout, answered).await {
            Ok(Some(result)) => result,
            Ok(None) => Err(StoreError::Unavailable("its thread has ended".to_owned())),
            Err(_) => Err(StoreError::no_answer(timeout)),
        }
    }
}
