"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
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
    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def from_validation(error: RequestValidationError, known: Mapping[str, Any]) -> ApiError:
    """The first thing that is wrong with a body, in a sentence.

    Args:
        known: the fields of the request; where there are several kinds of it, the fields of each kind.
    """
    first = error.errors()[0]
    where = [str(part) for part in first.get("loc", ()) if part != "body"]
    if where and isinstance(known.get(where[0]), Mapping):
        known, where = known[where[0]], where[1:]
    name = ".".join(part for part in where if not part.startswith(("function-", "list[", "str", "tuple[")))
    if first.get("type") == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first.get('msg', ''))}")
    if first.get("type") in ("union_tag_invalid", "union_tag_not_found"):
        which = str(first["ctx"]["discriminator"]).strip("'")
        return ApiError(400, f"{which} must be one of {', '.join(known)}", param=which, code="invalid_value")
    if first.get("type") == "extra_forbidden":
        hint = did_you_mean(name, known) if len(where) == 1 else ""
        return ApiError(
            400, f"{name} is not a parameter that this server knows{hint}", param=name, code="unknown_parameter"
        )
    if first.get("type") == "missing":
        return ApiError(400, f"{name or 'the body'} is missing", param=name or None, code="missing_required_parameter")
    said = str(first.get("msg", "is not valid")).removeprefix("Value error, ")
    said = said[:1].lower() + said[1:] if said.startswith("Input ") else said
    return ApiError(400, f"{name}: {said}" if name else said, param=name or None, code="invalid_value")
