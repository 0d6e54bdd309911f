"""The operator's errors: each says what its catcher does with it."""

import enum

_CONFLICT = 409
_REFUSALS = frozenset({400, 403, _CONFLICT, 413, 422})
"""Statuses that are about the object; 401, 404 and 429 are about the moment."""


class Reason(enum.StrEnum):
    """Reasons of conditions; users' automation reads them, so they are never renamed."""

    INVALID_SPEC = "InvalidSpec"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_GATED = "ModelGated"
    AUTHENTICATION_FAILED = "AuthenticationFailed"
    REVISION_NOT_FOUND = "RevisionNotFound"
    SOURCE_UNREACHABLE = "SourceUnreachable"
    DIGEST_MISMATCH = "DigestMismatch"
    UNSUPPORTED_MODEL = "UnsupportedModel"
    UNSUPPORTED_GPU = "UnsupportedGPU"
    INCOMPATIBLE_VERSIONS = "IncompatibleVersions"
    ENGINE_INCOMPATIBLE = "EngineIncompatible"
    DISK_FULL = "DiskFull"
    OUT_OF_MEMORY = "OutOfMemory"
    OUT_OF_GPU_MEMORY = "OutOfGPUMemory"
    BUILD_TIMEOUT = "BuildTimeout"
    BUILD_FAILED = "BuildFailed"
    VERIFICATION_FAILED = "VerificationFailed"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    VOLUME_NOT_BOUND = "VolumeNotBound"
    CRASH_LOOP = "CrashLoop"
    RANK_FAILED = "RankFailed"
    NAME_TAKEN = "NameTaken"
    QUOTA_EXCEEDED = "QuotaExceeded"


class OperatorError(Exception):
    """The base of every error that the operator raises on purpose."""


class SpecError(OperatorError):
    """Raised when a spec can not be served; not retried until the spec changes."""

    def __init__(self, message: str, *, reason: Reason = Reason.INVALID_SPEC) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


class KubeError(OperatorError):
    """Raised when the API server does not do what was asked; the key is retried later."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message

    @property
    def is_refusal(self) -> bool:
        """Whether the server has understood and will not do it: trying again will not help."""
        return self.status in _REFUSALS


class NameTakenError(KubeError):
    """Raised when a child's name belongs to someone else; told to the user."""

    def __init__(self, message: str) -> None:
        super().__init__(_CONFLICT, message)


class KubeNotFoundError(KubeError):
    """Raised when the object is gone; whoever wanted it gone has nothing left to do."""


class KubeConflictError(KubeError):
    """Raised when someone else wrote first; the key is observed again."""
