"""Every error farrier raises on purpose: a stable code, one sentence that says what to do, retryable or not."""


class FarrierError(Exception):
    """Base of all deliberate errors.

    `code` is stable and machine-readable, `str(error)` is one sentence for a person,
    `retryable` says whether the same call may succeed later without a change.
    """

    code = "internal"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable


class UnsupportedModelError(FarrierError):
    """The model's architecture, or one of its settings, is not one farrier can run."""

    code = "unsupported_model"


class CheckpointError(FarrierError):
    """A checkpoint is missing something, is corrupt, or contradicts its own config."""

    code = "bad_checkpoint"


class BuildError(FarrierError):
    """An engine could not be built."""

    code = "build_failed"


class InsufficientResourcesError(BuildError):
    """Not enough memory or disk for what was asked."""

    code = "insufficient_resources"


class EngineError(FarrierError):
    """An engine directory is not whole, or the engine failed while running."""

    code = "bad_engine"


class FingerprintMismatchError(EngineError):
    """The engine was built for something else; `field` names the first field that does not match."""

    code = "fingerprint_mismatch"

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class TargetError(FarrierError):
    """The machine has no usable target of the kind asked for."""

    code = "unusable_target"


class RequestError(FarrierError):
    """A request asks for something that cannot be honoured; `param` names the field."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class OverloadedError(FarrierError):
    """The queue is full, or the server is draining; try again after `retry_after` seconds."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
