"""Errors with a message for the user; each class has an exit code and an HTTP status."""

from __future__ import annotations

from typing import Self


class LlamaclustError(Exception):
    """Base of all errors whose message is for the user: one line that says what is wrong, where, and what to do."""

    exit_code = 1
    http_status = 500
    code = "internal_error"

    def __init__(self, *message: str, worker: str | None = None) -> None:
        """`worker` names the worker that is the root cause, if known."""
        super().__init__(*message)
        self.worker = worker

    def __copy__(self) -> Self:
        """Returns an equal error without a traceback, for an error that is stored and raised for each reader."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class UsageError(LlamaclustError):
    """A bad argument on the command line or in a cluster file."""

    exit_code = 2
    http_status = 400
    code = "invalid_request_error"


class RefusedError(UsageError):
    """The coordinator refused a worker and would refuse it again."""


class ModelFileError(UsageError):
    """A model file that is damaged, hostile, incomplete or not supported; the message names the file and the place."""

    code = "model_file_error"


class InsufficientMemoryError(LlamaclustError):
    """A plan or a load that needs more memory than there is; the message names the missing MiB."""

    exit_code = 3
    http_status = 507
    code = "insufficient_memory"
    missing_bytes: float | None = None
    problem: str | None = None
    """The message of a planning error without its advice; None for other errors."""
    fitting_context: int | None = None
    """The longest context in tokens for which a plan would fit; None if there is none."""


class RequestError(LlamaclustError):
    """The API refuses a request before it runs."""

    exit_code = 2
    http_status = 400
    code = "invalid_request_error"


class ParameterError(RequestError):
    def __init__(self, param: str, reason: str, code: str = RequestError.code) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param
        self.code = code


class ContextLengthError(ParameterError):
    """A prompt that does not fit into the context. The message has OpenAI's wording, which clients recognize."""

    def __init__(self, has: str, prompt_tokens: int, context_length: int, param: str = "prompt") -> None:
        """`prompt_tokens` is a lower bound if the prompt was not tokenized."""
        reason = f"{has}, but this model's maximum context length is {context_length} tokens; shorten it"
        super().__init__(param, reason, "context_length_exceeded")
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class RequestFailedError(LlamaclustError):
    """A request whose computation failed repeatedly, finally alone in its microbatch. It should not be sent again."""

    http_status = 422
    code = "request_failed"


class RequestCancelledError(LlamaclustError):
    """A request that its client cancelled, or whose client did not come back in time."""

    http_status = 410
    code = "request_cancelled"

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class QueueFullError(LlamaclustError):
    """More requests wait than the queue's bound allows; try again after `retry_after_s`."""

    http_status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProtocolError(LlamaclustError):
    """A frame or message from a peer that breaks the protocol: too large, out of bounds, of another version."""

    http_status = 502
    code = "protocol_error"


class WorkerError(LlamaclustError):
    """A worker that failed, was lost or cannot be reached; the message names it, its layers and its last error."""

    http_status = 503
    code = "worker_failed"


class ClusterStartingError(LlamaclustError):
    """The cluster does not serve yet. `awaited` is the thing that its start waits for, if known."""

    http_status = 503
    code = "cluster_starting"

    def __init__(self, message: str, awaited: str | None = None) -> None:
        super().__init__(message)
        self.awaited = awaited


class ClusterStoppingError(WorkerError):
    """This coordinator is stopping. The next coordinator continues accepted requests if it starts in time."""

    code = "cluster_stopping"


class SupersededError(ClusterStoppingError):
    """Another coordinator has taken over from this one; clients continue with the new one."""


class DeviceLostError(WorkerError):
    """A device stopped working, such as a GPU that fell off its bus. Its worker ends."""


class NetworkPartitionError(WorkerError):
    """Workers cannot reach each other, and every plan needs a link between them."""


class DeadlineError(LlamaclustError):
    """An operation did not finish within its deadline; the message names the operation."""

    http_status = 504
    code = "deadline_exceeded"


class LoadCancelledError(WorkerError):
    """A load was cancelled because it is not needed any more."""


class StalledError(DeadlineError):
    """A worker that lives but makes no progress with its task."""


class DownloadError(LlamaclustError):
    """A failed download; the message says what was fetched from where, and what to do."""
