//! Errors by what is to be done about them.

use std::fmt;

use kube::core::Status;

/// Why a reconcile could not finish, by what is to be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The spec can never work: wait until it is changed.
    #[error("{0}")]
    Invalid(Problem),
    /// Something that the spec refers to is not there: look again soon.
    #[error("{0}")]
    Waiting(Problem),
    /// The cluster did not answer as it should: back off and try again.
    #[error("{0}")]
    Transient(Problem),
}

/// What is wrong, for a condition, an event and a metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The type of the condition that the problem belongs to.
    pub condition: &'static str,
    /// One word.
    pub reason: Reason,
    /// One sentence that says the cause and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

/// The words for what went wrong in the operator itself; the runtime has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A Secret that the spec names does not exist.
    SecretNotFound,
    /// The Secret exists and lacks a key, or the key is empty.
    SecretKeyNotFound,
    /// Another pipeline has the replication slot.
    SlotConflict,
    /// The ReplayJob's pipeline does not exist.
    PipelineNotFound,
    /// The ReplayJob's pipeline is being deleted.
    PipelineTerminating,
    /// The pipeline's format does not hold every value, and the target needs that.
    FormatNotExact,
    /// A value passed the schema and means nothing.
    InvalidValue,
    /// An object of the name that is needed belongs to somebody else.
    NameTaken,
    /// The namespace is being deleted, and takes nothing new.
    NamespaceTerminating,
    /// The operator's role lacks a permission.
    Forbidden,
    /// The API server refused an object.
    Rejected,
    /// Somebody else wrote at the same moment.
    Conflict,
    /// The API server did not answer.
    ApiServerUnavailable,
    /// The reconcile took longer than it may.
    DeadlineExceeded,
    /// Another operator holds the lease.
    LeaseLost,
}

impl Reason {
    const ALL: [Self; 15] = [
        Self::SecretNotFound,
        Self::SecretKeyNotFound,
        Self::SlotConflict,
        Self::PipelineNotFound,
        Self::PipelineTerminating,
        Self::FormatNotExact,
        Self::InvalidValue,
        Self::NameTaken,
        Self::NamespaceTerminating,
        Self::Forbidden,
        Self::Rejected,
        Self::Conflict,
        Self::ApiServerUnavailable,
        Self::DeadlineExceeded,
        Self::LeaseLost,
    ];

    /// Whether a condition's reason is one of these, and not one of the runtime's.
    pub fn is_one(word: &str) -> bool {
        Self::ALL.iter().any(|reason| reason.to_string() == word)
    }

    /// Whether it says nothing about the resource: what was known of it before still holds.
    pub fn is_passing(self) -> bool {
        matches!(
            self,
            Self::Conflict | Self::ApiServerUnavailable | Self::DeadlineExceeded | Self::LeaseLost
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Error {
    /// A spec that can never work.
    pub fn invalid(condition: &'static str, reason: Reason, message: impl Into<String>) -> Self {
        Self::Invalid(Problem {
            condition,
            reason,
            message: message.into(),
        })
    }

    /// Something that is not there yet.
    pub fn waiting(condition: &'static str, reason: Reason, message: impl Into<String>) -> Self {
        Self::Waiting(Problem {
            condition,
            reason,
            message: message.into(),
        })
    }

    /// Something that passes.
    pub fn transient(condition: &'static str, reason: Reason, message: impl Into<String>) -> Self {
        Self::Transient(Problem {
            condition,
            reason,
            message: message.into(),
        })
    }

    /// What the API server's answer means. It is a problem of `condition`, met while doing `what`.
    pub fn from_api(condition: &'static str, what: &str, error: &kube::Error) -> Self {
        if let kube::Error::Api(status) = error
            && is_terminating(status)
        {
            let message = format!("{what} failed: the namespace is being deleted, and takes nothing new");
            return Self::waiting(condition, Reason::NamespaceTerminating, message);
        }
        let (reason, remedy) = match error {
            kube::Error::Api(status) => match status.code {
                401 | 403 => (
                    Reason::Forbidden,
                    "; check the operator's ClusterRole and the namespace's quotas",
                ),
                409 => (Reason::Conflict, ""),
                400 | 422 => (Reason::Rejected, ""),
                _ => (Reason::ApiServerUnavailable, ""),
            },
            _ => (Reason::ApiServerUnavailable, ""),
        };
        let cause = match error {
            kube::Error::Api(status) => status.message.clone(),
            other => other.to_string(),
        };
        Self::transient(condition, reason, format!("{what} failed: {cause}{remedy}"))
    }

    /// What is wrong.
    pub fn problem(&self) -> &Problem {
        match self {
            Self::Invalid(problem) | Self::Waiting(problem) | Self::Transient(problem) => problem,
        }
    }
}

/// Whether the API server refused to make something because the namespace is being deleted.
fn is_terminating(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}
