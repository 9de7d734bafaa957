"""GET requests over HTTP and HTTPS with timeouts."""

import functools
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from refer.prepare.files import RejectedError

CHUNK = 1 << 18  # bytes
MIN_BYTES = 1024  # a connection that delivers fewer bytes within ``stall`` seconds is closed


class ConnectionLostError(Exception):
    """An attempt failed, and another one may succeed. ``wait``: seconds that the server asks the client to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class VersionChangedError(ConnectionLostError):
    """The file on the server has changed since a part of it was downloaded. The download has to start again."""


@contextmanager
def open_url(url: str, headers: Mapping[str, str], stall: float) -> Iterator[http.client.HTTPResponse]:
    """Yield the response to a GET request after following redirects.

    Args:
        url: an http or https address.
        headers: added to the request.
        stall: seconds without data after which the connection counts as lost.

    Raises:
        ConnectionLostError: no data for ``stall`` seconds, a lost connection, or a temporary error of the server.
        RejectedError: any other error.
    """
    if not url.startswith(("http://", "https://")):
        raise RejectedError("not an http or https address")
    request = urllib.request.Request(url, headers={"User-Agent": "crossvlt-prepare/1", "Accept": "*/*", **headers})
    try:
        response = _opener().open(request, timeout=stall)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"{error.code} {error.reason}".strip()
        if error.code == 416:  # range not satisfiable
            raise VersionChangedError(message) from error
        if error.code in (408, 425, 429) or error.code >= 500:
            raise ConnectionLostError(message, parse_number(error.headers.get("Retry-After")) or 0) from error
        raise RejectedError(message) from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # URLError wraps the real error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RejectedError(f"invalid certificate ({cause.verify_message})") from error
        raise ConnectionLostError(_describe(cause, stall)) from error
    except ValueError as error:
        raise RejectedError(f"invalid address ({error})") from error
    with response:
        yield response


def read_chunks(response: http.client.HTTPResponse, stall: float) -> Iterator[bytes]:
    """Yield the response body as it arrives. Raise a ConnectionLostError if the connection is lost or stalls."""
    start, received = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLostError(_describe(error, stall)) from error
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        if (now := time.monotonic()) - start > stall:
            if received < MIN_BYTES:
                raise ConnectionLostError(f"only {received} bytes within {stall:g} s")
            start, received = now, 0


def parse_number(text: str | None) -> int | None:
    """Return a header's value as an integer, or None if the header is missing or contains anything but digits."""
    return int(text) if text and len(text) < 20 and text.isascii() and text.isdigit() else None


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follow redirects to HTTPS, and redirects from HTTP to HTTP. Reject all others."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # missing in Python 3.10

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: ANN001, ANN201  (urllib's signature)
        old_scheme, new_scheme = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new_scheme != "https" and not old_scheme == new_scheme == "http":
            raise RejectedError(f"redirects to {newurl}, which is not allowed")
        return super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(RedirectHandler)


def _describe(error: Exception | str, stall: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no data for {stall:g} s"
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(message).split())[:200]
