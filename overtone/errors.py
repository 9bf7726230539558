"""The exceptions of the project.

    OvertoneError
    ├── ConfigurationError        a setting, file or flag is wrong; the process must not start
    │   └── ManifestError         a Kubernetes manifest breaks a rule
    ├── InvalidInputError         the caller's data breaks a documented limit
    │   ├── MalformedError        the body cannot be parsed at all
    │   ├── TooLargeError         the body, batch or text is over its limit
    │   ├── TooSlowError          the body did not arrive in time
    │   └── UnsupportedMediaTypeError  the body is not of the type this call takes
    ├── UnauthorizedError         no credentials, or credentials that are not known
    │   └── ForbiddenError        known credentials without the scope
    ├── NotFoundError             nothing is stored under that id
    ├── NotReadyError             what was asked for is not there yet
    ├── OverloadedError           the queue is at its bound; try again after `retry_after_s`
    │   └── QuotaExceededError    the caller has used up a limit of its own
    ├── DeadlineExceededError     the answer would come too late to be of use
    ├── UnavailableError          a part this needs is not reachable now
    │   ├── ShuttingDownError     the replica is draining
    │   └── DatabaseUnavailableError
    ├── EngineError               the engine failed on a row that was valid
    ├── BundleError               a bundle is missing, damaged or not for this version
    ├── DataError                 a training set cannot be used as it is
    ├── StreamError               the X API ended or refused the stream
    │   ├── StreamFatalError      trying again cannot help (401, 403, spend cap)
    │   ├── StreamThrottledError  a 429; `retry_after_s` says how long
    │   └── FencedError           a later leader has taken over the stream; this one must stop
    ├── ClusterError              the Kubernetes API refused; the message says what it said
    │   ├── ClusterForbiddenError no credentials, or no right to do this
    │   ├── ClusterQuotaError     the namespace's quota is used up
    │   ├── MissingKindError      the cluster does not know a kind: an operator is not installed
    │   ├── ClusterConflictError  another writer owns what this would change
    │   ├── ClusterUnavailableError  the Kubernetes API does not answer
    │   ├── ClusterTimeoutError   what was waited for did not come in time
    │   └── RolloutError          the new version failed
    └── EnvironmentProblemError   this machine lacks something; the message says how to mend it

Every class has a stable `code`, says whether trying again can help (`retryable`) and survives pickling, because
Ray carries exceptions between processes. HTTP statuses and exit codes are assigned in one place each:
`serve.problems` and `overtone.cli`.
"""

from typing import Any, ClassVar


class OvertoneError(Exception):
    """Something in Overtone failed."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        self.details = details

    @property
    def message(self) -> str:
        """The sentence for people."""
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[OvertoneError], message: str, details: dict[str, Any]) -> OvertoneError:
    return cls(message, **details)


class ConfigurationError(OvertoneError):
    """A setting is wrong."""

    code = "configuration"


class ManifestError(ConfigurationError):
    """A manifest breaks a rule."""

    code = "manifest"


class InvalidInputError(OvertoneError):
    """The request breaks a documented limit."""

    code = "invalid_input"


class MalformedError(InvalidInputError):
    """The request body cannot be parsed."""

    code = "malformed"


class TooLargeError(InvalidInputError):
    """The request is over a size limit."""

    code = "too_large"


class TooSlowError(InvalidInputError):
    """The request body did not arrive in time."""

    code = "too_slow"
    retryable = True


class UnsupportedMediaTypeError(InvalidInputError):
    """The request body is not of a type this call takes."""

    code = "unsupported_media_type"


class UnauthorizedError(OvertoneError):
    """No valid API key was given."""

    code = "unauthorized"


class ForbiddenError(UnauthorizedError):
    """The API key does not have the scope this call needs."""

    code = "forbidden"


class NotFoundError(OvertoneError):
    """Nothing is stored under that id."""

    code = "not_found"


class NotReadyError(OvertoneError):
    """What was asked for is not there yet."""

    code = "not_ready"
    retryable = True


class OverloadedError(OvertoneError):
    """The queue is full."""

    code = "overloaded"
    retryable = True

    @property
    def retry_after_s(self) -> float:
        """Seconds after which room is likely."""
        return float(self.details.get("retry_after_s", 1.0))

    @property
    def is_for_all(self) -> bool:
        """Whether any request of its kind would be refused now, whoever sent it and however long it could wait."""
        return bool(self.details.get("is_for_all", False))


class QuotaExceededError(OverloadedError):
    """A limit of the API key is used up."""

    code = "quota_exceeded"


class DeadlineExceededError(OvertoneError):
    """The deadline passed before the request could be answered."""

    code = "deadline_exceeded"
    retryable = True


class UnavailableError(OvertoneError):
    """A part of the system is not reachable now."""

    code = "unavailable"
    retryable = True


class ShuttingDownError(UnavailableError):
    """The replica is shutting down."""

    code = "shutting_down"


class DatabaseUnavailableError(UnavailableError):
    """The database cannot be reached."""

    code = "database_unavailable"


class EngineError(OvertoneError):
    """The engine failed on this text."""

    code = "engine"


class BundleError(OvertoneError):
    """The bundle is missing, damaged or made for another version."""

    code = "bundle"


class DataError(OvertoneError):
    """The data set cannot be used as it is."""

    code = "data"


class StreamError(OvertoneError):
    """The stream ended."""

    code = "stream"
    retryable = True


class StreamFatalError(StreamError):
    """The X API refused the stream and trying again cannot help."""

    code = "stream_fatal"
    retryable = False


class StreamThrottledError(StreamError):
    """The X API asks to slow down."""

    code = "stream_throttled"

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait before the next attempt."""
        return float(self.details.get("retry_after_s", 60.0))


class FencedError(StreamError):
    """Another leader has taken over the stream."""

    code = "fenced"
    retryable = False


class ClusterError(OvertoneError):
    """The Kubernetes API refused the request."""

    code = "cluster"


class ClusterForbiddenError(ClusterError):
    """The Kubernetes API does not allow this to the account in use."""

    code = "cluster_forbidden"


class ClusterQuotaError(ClusterError):
    """The quota of the namespace is used up."""

    code = "cluster_quota"


class MissingKindError(ClusterError):
    """The cluster does not know this kind of object."""

    code = "cluster_missing_kind"


class ClusterConflictError(ClusterError):
    """Another writer owns what this would change."""

    code = "cluster_conflict"


class ClusterUnavailableError(ClusterError):
    """The Kubernetes API does not answer."""

    code = "cluster_unavailable"
    retryable = True


class ClusterTimeoutError(ClusterError):
    """What was waited for did not come in time."""

    code = "cluster_timeout"


class RolloutError(ClusterError):
    """The new version failed."""

    code = "rollout_failed"


class EnvironmentProblemError(OvertoneError):
    """This machine lacks something that is needed."""

    code = "environment"
