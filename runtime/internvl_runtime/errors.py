"""The runtime's errors: what went wrong, in which words, and what to do next."""

import enum


class Reason(enum.StrEnum):
    """Why a build stage or a server ended, in the words of the resource's conditions."""

    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_GATED = "ModelGated"
    AUTHENTICATION_FAILED = "AuthenticationFailed"
    REVISION_NOT_FOUND = "RevisionNotFound"
    SOURCE_UNREACHABLE = "SourceUnreachable"
    DIGEST_MISMATCH = "DigestMismatch"
    UNSUPPORTED_MODEL = "UnsupportedModel"
    UNSUPPORTED_GPU = "UnsupportedGPU"
    INVALID_SPEC = "InvalidSpec"
    INCOMPATIBLE_VERSIONS = "IncompatibleVersions"
    ENGINE_INCOMPATIBLE = "EngineIncompatible"
    DISK_FULL = "DiskFull"
    OUT_OF_MEMORY = "OutOfMemory"
    OUT_OF_GPU_MEMORY = "OutOfGPUMemory"
    BUILD_TIMEOUT = "BuildTimeout"
    BUILD_FAILED = "BuildFailed"
    CRASH_LOOP = "CrashLoop"
    RANK_FAILED = "RankFailed"
    VERIFICATION_FAILED = "VerificationFailed"


class RuntimeBaseError(Exception):
    """The base of every error that the runtime raises on purpose."""


class StageError(RuntimeBaseError):
    """Raised when a build stage can not go on; it becomes the termination message."""

    def __init__(self, reason: Reason, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.remedy = remedy


class EngineIncompatibleError(StageError):
    """Raised when an engine can not be served by this image on this device."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(Reason.ENGINE_INCOMPATIBLE, message, remedy=remedy)


class RequestError(RuntimeBaseError):
    """Raised when a request can not be served as it is; it becomes a 4xx answer."""

    def __init__(
        self,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.code = code
        self.status = status


class MeasurementError(RuntimeBaseError):
    """Raised when the figures of a load run are worth nothing."""


class EngineUnavailableError(RuntimeBaseError):
    """Raised when the engine worker is gone; the request may be sent again elsewhere."""


class RankError(RuntimeBaseError):
    """Raised in a rank that can not go on."""


class RankLostError(RankError):
    """Raised when another rank does not answer any more."""


class RankFailedError(RankError):
    """Raised when this rank has failed where the others go on, and wait for it."""
