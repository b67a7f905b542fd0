"""Refusals: one line that says why, in OpenAI's form where the client is one of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

OPENAI = "/v1/"  # paths of OpenAI's protocol
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}


def refusal(
    path: str, status: int, detail: Any, headers: Mapping[str, str] | None = None, param: str | None = None
) -> Response:
    """A refusal of a request for `path`.

    detail: the reason; outside of OpenAI's paths anything that JSON can hold. param: the faulty field of the request.
    """
    content = {"error": openai_error(status, str(detail), param)} if path.startswith(OPENAI) else {"detail": detail}
    return json_response(content, status, headers)


def openai_error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": message, "type": kind, "param": param, "code": CODES.get(status)}


def json_response(content: Any, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, which can contain surrogates."""
    return Response(json.dumps(content), status, headers, "application/json")
