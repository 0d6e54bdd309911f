"""The one place that turns errors into HTTP answers, in OpenAI's format."""

import itertools
import re
from typing import Any

import fastapi
import fastapi.exceptions
import fastapi.responses
import starlette.exceptions

from internvl_runtime import errors

_UNAVAILABLE = 503
_SERVER_ERROR = 500
_UNION_MEMBERS = frozenset({"str", "int", "bool"})
"""What pydantic puts into a location for the type that it tried."""


def describe(error: errors.RuntimeBaseError) -> tuple[int, dict[str, object]]:
    """Return status and body of an error."""
    if isinstance(error, errors.RequestError):
        return error.status, _body(
            error.message, "invalid_request_error", error.parameter, error.code
        )
    if isinstance(error, errors.EngineUnavailableError):
        text = f"{error}; send the request again"
        return _UNAVAILABLE, _body(text, "service_unavailable", None, "engine_unavailable")
    return _SERVER_ERROR, _body("internal error", "server_error", None, None)


def install(app: fastapi.FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(errors.RuntimeBaseError, _handle_failure)
    app.add_exception_handler(fastapi.exceptions.RequestValidationError, _handle_validation)
    app.add_exception_handler(starlette.exceptions.HTTPException, _handle_http)
    app.add_exception_handler(Exception, _handle_unexpected)


def _body(message: str, kind: str, parameter: str | None, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


async def _handle_failure(
    request: fastapi.Request, error: Exception
) -> fastapi.responses.JSONResponse:
    del request
    assert isinstance(error, errors.RuntimeBaseError)
    status, body = describe(error)
    retry = {"Retry-After": "1"} if status in {429, _UNAVAILABLE} else None
    return fastapi.responses.JSONResponse(body, status, headers=retry)


async def _handle_validation(
    request: fastapi.Request, error: Exception
) -> fastapi.responses.JSONResponse:
    del request
    assert isinstance(error, fastapi.exceptions.RequestValidationError)
    first = error.errors()[0]
    parameter = _parameter_of(first)
    message = f"{parameter}: {first['msg']}" if parameter else str(first["msg"])
    return fastapi.responses.JSONResponse(
        _body(message, "invalid_request_error", parameter, None), 400
    )


def _parameter_of(error: dict[str, Any]) -> str | None:
    """Return the field that an error is about, without the names of pydantic's validators."""
    named = (error.get("ctx") or {}).get("parameter")
    if named:
        return str(named)
    if error["type"] == "json_invalid":
        return None
    parts = [str(part) for part in error["loc"][1:]]
    fields = [part for part in parts if re.fullmatch(r"\w+", part) and part not in _UNION_MEMBERS]
    # The tag of a content part is followed by the field of the same name.
    return ".".join(name for name, _ in itertools.groupby(fields)) or None


async def _handle_http(
    request: fastapi.Request, error: Exception
) -> fastapi.responses.JSONResponse:
    assert isinstance(error, starlette.exceptions.HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return fastapi.responses.JSONResponse(
        _body(message, "invalid_request_error", None, None), error.status_code
    )


async def _handle_unexpected(
    request: fastapi.Request, error: Exception
) -> fastapi.responses.JSONResponse:
    del request, error
    return fastapi.responses.JSONResponse(
        _body("internal error; the server's log has the details", "server_error", None, None),
        _SERVER_ERROR,
    )
