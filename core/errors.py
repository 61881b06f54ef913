"""Errors whose messages are for the user. Each class has an exit code, an HTTP status and an API error code."""

from __future__ import annotations

from typing import Self


class LlamaclustError(Exception):
    """Base class of errors for the user. The message is one line that states the fault, its place, and what to do."""

    exit_code = 1
    http_status = 500
    code = "internal_error"

    def __init__(self, *message: str, worker: str | None = None) -> None:
        super().__init__(*message)
        self.worker = worker

    def __copy__(self) -> Self:
        """Returns a copy without a traceback, because a stored error may be raised several times."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class UsageError(LlamaclustError):
    """An argument on the command line or a value in a cluster file is wrong."""

    exit_code = 2
    http_status = 400
    code = "invalid_request_error"


class RefusedError(UsageError):
    """The coordinator refused a worker. Another attempt would be refused too."""


class ModelFileError(UsageError):
    """A model file is damaged, incomplete or not supported. The message names the file and the place of the fault."""

    code = "model_file_error"


class InsufficientMemoryError(LlamaclustError):
    """A plan or a load needs more memory than is available. The message states the missing memory in MiB."""

    exit_code = 3
    http_status = 507
    code = "insufficient_memory"
    missing_bytes: float | None = None
    problem: str | None = None
    """The planner's reason, without its advice. None if the error is not from planning."""
    fitting_context: int | None = None
    """Maximum context in tokens for which a plan would fit, or None if there is none."""


class RequestError(LlamaclustError):
    """The API refused a request before running it."""

    exit_code = 2
    http_status = 400
    code = "invalid_request_error"


class ParameterError(RequestError):
    def __init__(self, param: str, reason: str, code: str = RequestError.code) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param
        self.code = code


class ContextLengthError(ParameterError):
    """A prompt does not fit into the context. The message has OpenAI's words, because clients look for these words."""

    def __init__(
        self, has: str, prompt_tokens: int, context_length: int, param: str = "prompt", advice: str = "shorten it"
    ) -> None:
        reason = f"{has}, but this model's maximum context length is {context_length} tokens; {advice}"
        super().__init__(param, reason, "context_length_exceeded")
        self.prompt_tokens = prompt_tokens  # A lower bound if the prompt was not tokenized.
        self.context_length = context_length


class RequestFailedError(LlamaclustError):
    """A request failed several times, even in microbatches without other requests. Clients should not send it again."""

    http_status = 422
    code = "request_failed"


class RequestCancelledError(LlamaclustError):
    """The client cancelled a request, or did not fetch its answer in time."""

    http_status = 410
    code = "request_cancelled"

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class QueueFullError(LlamaclustError):
    """The queue of waiting requests is full. The client should try again after `retry_after_s` seconds."""

    http_status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProtocolError(LlamaclustError):
    """A peer's frame or message is invalid: it is too large, has a value out of bounds, or has another version."""

    http_status = 502
    code = "protocol_error"


class WorkerError(LlamaclustError):
    """A worker failed, was lost or cannot be reached. The message names the worker, its layers and its last error."""

    http_status = 503
    code = "worker_failed"


class DisputeError(WorkerError):
    """A group broke, and its members' reports do not show which worker of `pair` is at fault."""

    def __init__(self, message: str, pair: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.pair = pair


class ClusterStartingError(LlamaclustError):
    """The cluster does not serve requests yet. `awaited` states what the cluster is waiting for, if that is known."""

    http_status = 503
    code = "cluster_starting"

    def __init__(self, message: str, awaited: str | None = None) -> None:
        super().__init__(message)
        self.awaited = awaited


class ClusterStoppingError(WorkerError):
    """This coordinator is stopping. The next coordinator continues accepted requests if it starts in time."""

    code = "cluster_stopping"


class SupersededError(ClusterStoppingError):
    """Another coordinator has replaced this coordinator. Clients continue with the new coordinator."""


class DeviceLostError(WorkerError):
    """A device, for example a GPU, stopped working. The device's worker process ends."""


class NetworkPartitionError(WorkerError):
    """Workers cannot reach each other, and every plan needs a link between them."""


class DeadlineError(LlamaclustError):
    """An operation did not finish before its deadline. The message names the operation."""

    http_status = 504
    code = "deadline_exceeded"


class LoadCancelledError(WorkerError):
    """A load was cancelled because it is no longer needed."""


class StalledError(DeadlineError):
    """A worker is alive but makes no progress with its task."""


class DownloadError(LlamaclustError):
    """A download failed. The message states what was downloaded, from where, and what to do."""
