"""Errors as OpenAI's clients read them, and as Anthropic's do at its own paths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from errors import did_you_mean

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}

ANTHROPIC = "/v1/messages"
"""Where Anthropic's protocol is spoken, with what is below."""

ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

M = TypeVar("M", bound=BaseModel)


class Json(JSONResponse):
    """JSON in ASCII, so that halves of characters, which JSON may hold and UTF-8 may not, can be sent."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(Exception):
    """A refusal: one sentence, the status it goes with, and which parameter it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The body of the response to one of Anthropic's clients; it has no place for the parameter but the words."""
        kind = ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        named = self.param is None or self.param in self.message
        message = self.message if named else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": kind, "message": message}}

    def response(self, path: str) -> JSONResponse:
        """The response to a request for this path."""
        body = self.anthropic_body if path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/") else self.body
        return Json(body, self.status, headers=self.headers)


def read(kind: type[M], value: Any, where: str) -> M:
    """A part of a body; ApiError that names what is wrong with it, below `where`."""
    if isinstance(value, Mapping):  # clients send what they have got, with the fields that had nothing in them
        value = {name: one for name, one in value.items() if one is not None}
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error.errors(), kind.model_fields, where) from error


def from_validation(errors: Sequence[Mapping[str, Any]], known: Mapping[str, Any], at: str = "") -> ApiError:
    """The first thing that is wrong with a body, in a sentence.

    Args:
        errors: as pydantic lists them. known: the fields that there are; where there are several kinds of a body, the
            fields of each kind. at: which part of the request it is.
    """

    def place(error: Mapping[str, Any]) -> list[str]:
        return [str(part) for part in error.get("loc", ()) if part != "body"]

    # Of what may be a text or a list the list is meant where something within it is wrong.
    alike = [error for error in errors if place(error)[:1] == place(errors[0])[:1]]
    first = max(alike, key=lambda error: len(place(error)))
    where = place(first)
    if where and isinstance(known.get(where[0]), Mapping):
        first, where, known = errors[0], place(errors[0])[1:], known[where[0]]
    path = [part for part in where if not part.startswith(("function-", "list[", "str", "tuple["))]
    name = ".".join([at, *path] if at else path)
    if first.get("type") == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first.get('msg', ''))}")
    if first.get("type") in ("union_tag_invalid", "union_tag_not_found"):
        which = str(first["ctx"]["discriminator"]).strip("'")
        return ApiError(400, f"{which} must be one of {', '.join(known)}", param=which, code="invalid_value")
    if first.get("type") == "extra_forbidden":
        hint = did_you_mean(where[0], known) if len(where) == 1 else ""
        return ApiError(
            400, f"{name} is not a parameter that this server knows{hint}", param=name, code="unknown_parameter"
        )
    if first.get("type") == "missing":
        return ApiError(400, f"{name or 'the body'} is missing", param=name or None, code="missing_required_parameter")
    said = str(first.get("msg", "is not valid")).removeprefix("Value error, ")
    said = said[:1].lower() + said[1:] if said.startswith("Input ") else said
    return ApiError(400, f"{name}: {said}" if name else said, param=name or None, code="invalid_value")
