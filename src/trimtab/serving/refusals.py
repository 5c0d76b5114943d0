"""What a client is told when something is wrong: OpenAI's shape of an error, and a status."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, final

from starlette.exceptions import HTTPException
from starlette.responses import Response

from trimtab.errors import TrimtabError
from trimtab.serving.work import Busy, Closing, TimeUp, UnknownModel

# Clients that repeat what took too long make it worse.
_DO_NOT_RETRY = {"x-should-retry": "false"}

_UNREADABLE = "There was an error parsing the body"
"""What FastAPI says of a body that is no text, or that Python cannot hold."""

_FORMS = {
    "prompt": "a text, a list of token ids, or a list of several texts or lists of token ids",
    "stop": "a text of 1 to 1,024 characters, or a list of such texts",
    "content": "a text, or a list of parts of type 'text'",
}
"""Fields of more than one form; pydantic says of each form in turn why it is not that one."""


@final
class ApiError(HTTPException):
    """A request that is refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            status: HTTP status, at least 400.
            message: What was found and what to do.
            code: A word for programs.
            param: The field of the request.
            headers: Of the response.
        """
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param

    @property
    def content(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {
            "message": str(self.detail),
            "type": kinds.get(self.status_code, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """The error over HTTP."""
        return json_response(self.content, self.status_code, self.headers)


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII: a text may hold half a character, which UTF-8 has no bytes for."""
    return Response(as_json(content), status, dict(headers or {}), "application/json")


def as_json(content: object) -> str:
    """One line of strict JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def refusal(error: Exception) -> ApiError:
    """What a client is told about an exception; what is not its fault is not explained."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TrimtabError):
        return ApiError(400, f"{error.message} ({error.hint})")
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, Busy):
        headers = {"retry-after": str(error.retry_after_sec)}
        return ApiError(
            429,
            "the queue has no room for this request; try again later",
            code="queue_full",
            headers=headers,
        )
    if isinstance(error, Closing):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, TimeUp):
        message = "the request took longer than this server allows"
        return ApiError(504, message, code="timeout", headers=_DO_NOT_RETRY)
    if isinstance(error, HTTPException) and error.status_code == 404:
        return ApiError(404, "there is no such path; GET /openapi.json says what there is")
    if isinstance(error, HTTPException) and error.detail == _UNREADABLE:
        message = (
            "the body cannot be read: send JSON in UTF-8, not nested deeply, without huge numbers"
        )
        return ApiError(400, message, code="invalid_json")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "something went wrong in the server; its log says what")


def invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """What is wrong with a request's body, of which the first problem is told."""
    first = problems[0]
    if first["type"] == "json_invalid":
        where, why = first["loc"][-1], first.get("ctx", {}).get("error", "it ends too early")
        message = f"the body is not valid JSON: at character {where}, {why}"
        return ApiError(400, message[:500], code="invalid_json")
    places = [str(part) for part in first["loc"] if part != "body"]
    several = next((n for n, place in enumerate(places[:-1]) if place in _FORMS), None)
    if several is not None:
        places = places[: several + 1]
        message = f"{'.'.join(places)}: expected {_FORMS[places[-1]]}"
    else:
        message = _wrong(first, ".".join(places))
    param = ".".join(places)[:200]
    return ApiError(400, message[:500], param=param or None, code="invalid_value")


def _wrong(problem: Mapping[str, Any], param: str) -> str:
    kind = problem["type"]
    # Some fields may be there only as long as they say nothing.
    says_nothing = kind == "none_required" or problem.get("ctx", {}).get("max_length") == 0
    if kind == "extra_forbidden" or says_nothing:
        return f"{param} is not supported"
    if kind == "missing":
        return f"{param or 'a JSON body'} is needed"
    if kind == "model_attributes_type" and not param:
        return "the body is no JSON object, or came without Content-Type: application/json"
    said = f"{param or 'the body'}: {problem['msg'].removeprefix('Value error, ')}"
    found = problem.get("input")
    # A long one is the client's to know; what is not a single value would be the whole body.
    is_short = isinstance(found, bool | int | float | str | None) and len(repr(found)) <= 60
    return f"{said} (found {json.dumps(found)})" if param and is_short else said
