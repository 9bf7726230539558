"""Ray's job server, for runs that are to be submitted once."""

from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from overtone.errors import ConfigurationError, UnauthorizedError, UnavailableError
from train.retrain import JobNeeds, JobState

_TIMEOUT_S = 60.0

_STATES: dict[JobStatus, JobState] = {
    JobStatus.PENDING: "running",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "failed",
}


class _Client(JobSubmissionClient):
    """Ray's client waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_TIMEOUT_S, **options)


class RayJobs:
    """The job server of one cluster. Blocks; every call may raise `UnavailableError`."""

    def __init__(self, address: str, needs: JobNeeds) -> None:
        """Reach the job server at `address`, such as http://127.0.0.1:8265.

        Raises:
            ConfigurationError: RAY_ADDRESS names another cluster, which Ray would rather ask.
            UnauthorizedError: it wants another token.
            UnavailableError: it does not answer.
        """
        self._needs = needs
        try:
            self._client = _Client(address)
        except AuthenticationError as error:
            raise UnauthorizedError(f"The job server at {address} refuses the token of RAY_AUTH_TOKEN.") from error
        except (OSError, RuntimeError) as error:
            raise UnavailableError(f"The job server at {address} does not answer.") from error
        reached = str(self._client.get_address())
        if address.startswith("http") and reached != address.rstrip("/"):
            raise ConfigurationError(f"RAY_ADDRESS names {reached}, not {address}: unset it, or leave out --address.")

    def state(self, name: str) -> JobState | None:
        """How the job `name` is; None if the server knows no such job."""
        try:
            return _STATES[self._client.get_job_info(name).status]
        except OSError as error:
            raise UnavailableError("The job server does not answer.") from error
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise UnavailableError(f"The job server could not tell of {name}.") from error

    def submit(self, name: str, entrypoint: str) -> None:
        """Have the command `entrypoint` run as the job `name`; nothing if there is such a job already."""
        needs = self._needs
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(needs.working_dir)} if needs.working_dir else None,
                entrypoint_num_cpus=needs.cpus,
                entrypoint_label_selector=needs.labels or None,
            )
        except OSError as error:
            raise UnavailableError("The job server does not answer.") from error
        except ValueError as error:
            raise ConfigurationError(f"The job cannot be submitted: {error}") from error
        except RuntimeError as error:
            # It refuses an id that it knows, which is what two submitters of one run rely on.
            if self.state(name) is None:
                raise UnavailableError(f"The job server did not take the job: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
