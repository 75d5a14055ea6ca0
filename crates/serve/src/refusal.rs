//! What a client is told whose request is not answered, in OpenAI's form.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::neutral::shown_name;

/// Seconds after which a client may try again: about what a text takes.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// A request that is not answered, and why.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    kind: &'static str,
    message: String,
    /// The parameter that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
}

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None }
    }

    /// A request that is not one.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter that is wrong; the message says how.
    pub(crate) fn param(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::invalid(message) }
    }

    /// More tokens than the context has.
    pub(crate) fn too_long(param: &str, message: String) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::param(param, message) }
    }

    pub(crate) fn too_large(most: usize) -> Self {
        let message = format!("The body has more than {most} bytes");
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, ..Self::invalid(message) }
    }

    pub(crate) fn too_slow() -> Self {
        let message = "The body did not arrive in time";
        Self { status: StatusCode::REQUEST_TIMEOUT, ..Self::invalid(message) }
    }

    pub(crate) fn no_key() -> Self {
        let message = "The key is missing or wrong: send it as `Authorization: Bearer KEY`";
        let refusal = Self::invalid(message);
        Self { status: StatusCode::UNAUTHORIZED, code: Some("invalid_api_key"), ..refusal }
    }

    pub(crate) fn no_model(asked: &str, name: &str) -> Self {
        let message = format!("The model `{asked}` is not served here; `{name}` is");
        let refusal = Self::param("model", message);
        Self { status: StatusCode::NOT_FOUND, code: Some("model_not_found"), ..refusal }
    }

    pub(crate) fn no_path(path: &str) -> Self {
        let message = format!("There is nothing at {path}");
        Self { status: StatusCode::NOT_FOUND, ..Self::invalid(message) }
    }

    pub(crate) fn no_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        Self { status: StatusCode::METHOD_NOT_ALLOWED, ..Self::invalid(message) }
    }

    /// As many requests wait as may.
    pub(crate) fn busy(waiting: usize) -> Self {
        let message = format!("{waiting} requests wait already; try again later");
        let refusal = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("rate_limit_exceeded"), ..refusal }
    }

    /// As many connections are open as may be.
    pub(crate) fn crowded(connections: usize) -> Self {
        let message = format!("{connections} connections are open already; try again later");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    /// A body that does not say that it is JSON: pages in a browser may send such a one anywhere.
    pub(crate) fn no_json() -> Self {
        let message = "The body has to be JSON, with the header `Content-Type: application/json`";
        Self { status: StatusCode::UNSUPPORTED_MEDIA_TYPE, ..Self::invalid(message) }
    }

    /// A page of another server asks, in the browser of somebody who may not know.
    pub(crate) fn foreign(origin: &str) -> Self {
        let message = format!("Pages of {} may not use this server", shown_name(origin));
        Self { status: StatusCode::FORBIDDEN, ..Self::invalid(message) }
    }

    /// A request by a name that is not this machine's own, perhaps a page's that was made to point here.
    pub(crate) fn elsewhere(host: &str) -> Self {
        let message = format!(
            "The header `Host` is `{}`; without a key this server answers as localhost or an address \
             of loopback only",
            shown_name(host)
        );
        Self { status: StatusCode::FORBIDDEN, ..Self::invalid(message) }
    }

    pub(crate) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "The server is being stopped")
    }

    /// The model or this program failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The body.
    pub(crate) fn json(&self) -> Value {
        let Self { kind, message, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = json_response(&self.json());
        *response.status_mut() = self.status;
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            StatusCode::UNAUTHORIZED => {
                let bearer = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
            }
            _ => {}
        }
        response
    }
}

/// JSON as an answer.
pub(crate) fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
