//! A timer that is more precise than the runtime's, whose resolution of a millisecond would send jobs at over
//! 100 per second visibly off their slots.

use tokio::time::Instant;

/// The timer of one task.
#[derive(Debug)]
pub(crate) struct PreciseTimer(TimerKind);

#[derive(Debug)]
enum TimerKind {
    #[cfg(target_os = "linux")]
    Kernel(kernel::Timer),
    Runtime,
}

impl PreciseTimer {
    /// The kernel's timer, or the runtime's if there is none.
    #[must_use]
    pub(crate) fn precise() -> Self {
        #[cfg(target_os = "linux")]
        match kernel::Timer::new() {
            Ok(timer) => return Self(TimerKind::Kernel(timer)),
            Err(error) => tracing::warn!(
                %error,
                "the kernel has no timer for us: jobs may leave up to 2 ms after their slots"
            ),
        }
        Self::of_runtime()
    }

    /// The runtime's timer, which follows a paused clock.
    #[must_use]
    pub(crate) fn of_runtime() -> Self {
        Self(TimerKind::Runtime)
    }

    /// Returns at `deadline` or, if that has passed, after other tasks had their turn. Cancel-safe.
    pub(crate) async fn until(&mut self, deadline: Instant) {
        match &mut self.0 {
            #[cfg(target_os = "linux")]
            TimerKind::Kernel(timer) => {
                if let Err(error) = timer.until(deadline).await {
                    tracing::warn!(%error, "the kernel timer failed: jobs may leave up to 2 ms after their slots");
                    self.0 = TimerKind::Runtime;
                    tokio::time::sleep_until(deadline).await;
                }
            }
            TimerKind::Runtime => tokio::time::sleep_until(deadline).await,
        }
    }
}

#[cfg(target_os = "linux")]
mod kernel {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };
    use tokio::io::unix::AsyncFd;
    use tokio::time::Instant;

    #[derive(Debug)]
    pub(super) struct Timer(AsyncFd<OwnedFd>);

    impl Timer {
        pub(super) fn new() -> io::Result<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            #[expect(
                deprecated,
                reason = "its successor is unsafe, for types whose descriptor changes; an OwnedFd's does not"
            )]
            AsyncFd::new(timer).map(Self)
        }

        pub(super) async fn until(&mut self, deadline: Instant) -> io::Result<()> {
            // A timer of 0 would be one that never rings.
            let wait = deadline
                .saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1));
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec {
                    tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: wait.subsec_nanos().into(),
                },
            };
            timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
            loop {
                let mut ready = self.0.readable().await?;
                // Setting the timer forgot earlier rings, but not that the runtime saw them: only
                // a ring that can be read is one of this wait.
                match rustix::io::read(&self.0, &mut [0; 8]) {
                    Ok(_) => {
                        ready.clear_ready();
                        return Ok(());
                    }
                    Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn never_rings_early_even_after_a_cancelled_wait() {
        let mut timer = PreciseTimer::precise();
        for micros in [0, 50, 300, 1500, 20] {
            tokio::select! {
                biased;
                () = timer.until(Instant::now() + Duration::from_micros(100)) => {}
                () = tokio::task::yield_now() => {}
            }
            let deadline = Instant::now() + Duration::from_micros(micros);
            timer.until(deadline).await;
            assert!(Instant::now() >= deadline);
        }
    }

    #[tokio::test]
    async fn a_deadline_that_has_passed_rings() {
        let now = Instant::now();
        let passed = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
        PreciseTimer::precise().until(passed).await;
    }
}
