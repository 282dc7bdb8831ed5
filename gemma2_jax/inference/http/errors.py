"""Errors as OpenAI's API writes them."""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gemma2_jax.command_line import suggest
from gemma2_jax.inference.metrics import Outcome
from gemma2_jax.inference.service import DeadlineError, QueueFullError, UnavailableError

_MOST_NAMED = 5  # of what is wrong with one request
_RETRY = {"Retry-After": "1"}  # seconds


class ApiError(Exception):
    """An answer that says what is wrong. `param` is the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        outcome: Outcome = "refused",
    ):
        message = message.encode("utf-8", "backslashreplace").decode()  # a client's words may have half of a character
        super().__init__(message)
        self.status, self.headers = status, headers
        self.outcome: Outcome = outcome
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain_value(error: ValueError, fields: Collection[str]) -> ApiError:
    """The answer to a value that the engine or the tokenizer refuses; messages begin with the name of the field."""
    name = str(error).removeprefix("the ").partition(" ")[0]
    return ApiError(400, str(error), param=name if name in fields else None)


def explain_end(error: Exception) -> ApiError:
    """The answer where the service takes a job no further."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers=_RETRY, outcome="busy")
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), code="deadline_exceeded", outcome="late")
    assert isinstance(error, UnavailableError)
    return ApiError(503, str(error), code="unavailable", headers=_RETRY, outcome="closing")


def explain_invalid(errors: Sequence[Mapping[str, Any]], fields: Collection[str]) -> ApiError:
    """The answer to a body that is not what the API takes, from pydantic's errors."""
    sentences = [_explain(error, fields) for error in errors[:_MOST_NAMED]]
    if len(errors) > _MOST_NAMED:
        sentences.append(f"and {len(errors) - _MOST_NAMED} more")
    param = _name_field(errors[0])
    code = "unknown_parameter" if errors[0]["type"] == "extra_forbidden" else None
    return ApiError(400, "; ".join(sentences), param=param, code=code)


def _name_field(error: Mapping[str, Any]) -> str | None:
    """The field that an error is about, as in messages.0.content; None for the body."""
    path = error["loc"][1:] if error["type"] != "json_invalid" else ()
    return ".".join(map(str, path)) or None


def _explain(error: Mapping[str, Any], fields: Collection[str]) -> str:
    field, kind = _name_field(error), error["type"]
    if kind == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if field is None:
        return "the body is no JSON object; send one, with the header Content-Type: application/json"
    if kind == "extra_forbidden":
        return f"there is no field {field}{suggest(field, fields)}"
    if kind == "missing":
        return f"{field} must be given"
    if kind == "too_short":
        return f"{field} is {reprlib.repr(error['input'])}; give at least {error['ctx']['min_length']}"
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"{field} is {reprlib.repr(error['input'])}; {message}"
