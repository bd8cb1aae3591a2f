//! The HTTP client of the job path: many requests to one server, each sent once, with as little work for each as possible.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::{Request, Uri};
use futures_util::future::BoxFuture;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::{Response, rt};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tower_service::Service;

use super::client::IDLE_TIMEOUT;
use super::dial::{Dialer, Stream};

type Pool = Client<Connector, Full<Bytes>>;

/// A pool of connections to one server.
#[derive(Debug)]
pub(crate) struct JobClient {
    dialer: Arc<Dialer>,
    pool: Mutex<Pool>,
}

/// A connection that was made for a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dialled {
    pub began: Instant,
    pub took: Duration,
}

impl JobClient {
    #[must_use]
    pub(crate) fn new(dialer: Dialer) -> Self {
        let dialer = Arc::new(dialer);
        let pool = Mutex::new(pool(&dialer));
        Self { dialer, pool }
    }

    /// Sends a request once. `Dialled` is among the extensions of its answer.
    ///
    /// # Errors
    /// No connection, or one that was lost.
    pub(crate) async fn request(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Error> {
        let answer = self.pool.lock().request(request);
        answer.await
    }

    #[must_use]
    pub(crate) fn dialer(&self) -> Arc<Dialer> {
        Arc::clone(&self.dialer)
    }

    /// Leaves all connections: those in use end with their answers.
    pub(crate) fn leave_connections(&self) {
        *self.pool.lock() = pool(&self.dialer);
    }
}

fn pool(dialer: &Arc<Dialer>) -> Pool {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        // A job that is sent twice is paid twice.
        .retry_canceled_requests(false)
        // Header names as gateways and the tools before them spell them.
        .http1_title_case_headers(true)
        .build(Connector(Arc::clone(dialer)))
}

/// Connects by a dialer, whatever address it is asked for.
#[derive(Debug, Clone)]
struct Connector(Arc<Dialer>);

impl Service<Uri> for Connector {
    type Response = JobConnection;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<JobConnection>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dialer = Arc::clone(&self.0);
        Box::pin(async move {
            let began = Instant::now();
            let (stream, took) = dialer.connect().await?;
            Ok(JobConnection {
                io: TokioIo::new(stream),
                dialled: Dialled { began, took },
            })
        })
    }
}

struct JobConnection {
    io: TokioIo<Box<dyn Stream>>,
    dialled: Dialled,
}

impl Connection for JobConnection {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.dialled)
    }
}

impl Read for JobConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        rt::Read::poll_read(Pin::new(&mut self.io), context, buffer)
    }
}

impl Write for JobConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }
}
