"""What is held against every request before its body is understood: the key, the body's size, and its pace."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from gemma2_jax.inference.http.errors import ApiError

type _Message = MutableMapping[str, Any]
type _Receive = Callable[[], Awaitable[_Message]]
type _Send = Callable[[_Message], Awaitable[None]]
type _App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: _App, *, key: str | None, body_limit: int, body_seconds: float, refuse: Callable[[], None]):
        """`key` is asked for below /v1; `refuse` is called for each request that does not get through."""
        self._app, self._refuse = app, refuse
        self._digest = None if key is None else _digest(key.encode())
        self._limit, self._seconds = body_limit, body_seconds

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            self._check_key(scope["path"], headers)
            body = await self._read_body(headers, receive)
        except ApiError as error:
            self._refuse()
            response = JSONResponse(error.content, error.status, {"Connection": "close", **(error.headers or {})})
            return await response(scope, receive, send)
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._digest is None or not path.startswith("/v1"):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._digest):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, headers: dict[bytes, bytes], receive: _Receive) -> bytes | None:
        """The body; None if its client has gone. Raises ApiError if it is too large, or does not come."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:19]) > self._limit:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._limit:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {self._seconds:g} seconds") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is too large; it may have {self._limit:,} bytes", code="body_too_large")


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing tells nothing of theirs."""
    return hashlib.sha256(key).digest()


def _replay(body: bytes, receive: _Receive) -> _Receive:
    """Gives the body that was read, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> _Message:
        return messages.pop() if messages else await receive()

    return receive_again
