//! The errors of the routes, and the responses that they become.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::net::server::error;
use crate::ping_system::pinger::PingError;
use crate::ping_system::store::StoreError;

/// An error of a route, which determines the response's status.
pub(super) enum ApiError {
    BadRequest(String),
    Forbidden(String),
    NoAgent,
    NotJson,
    TooLarge,
    TooSlow,
    Conflict(String),
    TooManyStreams,
    Unavailable,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match self {
            Self::BadRequest(text) => error(StatusCode::BAD_REQUEST, &text),
            Self::Forbidden(text) => error(StatusCode::FORBIDDEN, &text),
            Self::NoAgent => error(StatusCode::NOT_FOUND, "no agent of that name"),
            Self::NotJson => error(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "expected Content-Type: application/json",
            ),
            Self::TooLarge => error(
                StatusCode::PAYLOAD_TOO_LARGE,
                "expected a body of up to 64 KiB",
            ),
            Self::TooSlow => error(StatusCode::REQUEST_TIMEOUT, "expected a body within 10s"),
            Self::Conflict(text) => error(StatusCode::CONFLICT, &text),
            Self::TooManyStreams => error(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many event streams: ask from time to time instead",
            ),
            Self::Unavailable => error(
                StatusCode::SERVICE_UNAVAILABLE,
                "the database does not work at this moment, the log tells why",
            ),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        // The pinger, which asks every second, warns.
        tracing::debug!("a request cannot be answered: {error}");
        Self::Unavailable
    }
}

impl From<PingError> for ApiError {
    fn from(no_ping: PingError) -> Self {
        match no_ping {
            PingError::Unknown => Self::NoAgent,
            PingError::Taken | PingError::Lost => Self::Conflict(no_ping.to_string()),
            PingError::NotStored(_) => Self::Unavailable,
            PingError::Store(error) => error.into(),
        }
    }
}

/// The result of a route.
pub(super) type ApiResult<T> = Result<T, ApiError>;
