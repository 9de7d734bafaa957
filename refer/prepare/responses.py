"""Asks servers for files, over http and https only. What goes wrong is one of two errors, by what may help."""

import functools
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

AGENT = "crossvlt-prepare/1"
CHUNK = 1 << 18  # bytes
LEAST = 1024  # bytes that have to come within `stall` seconds


class RefusedError(Exception):
    """A source that does not give the right file, and will not if asked again: the next one is to be tried."""


class OtherFileError(RefusedError):
    """A source that gives a file of the right kind, but not the one that was recorded. Which is right, who knows."""


class BrokenOffError(Exception):
    """An attempt that failed where the next one may go on."""

    def __init__(self, reason: str, *, wait: float = 0.0, is_stale: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds the server asks for
        self.is_stale = is_stale  # what is here is not the beginning of what is there


@contextmanager
def answer(address: str, headers: dict[str, str], stall: float):  # noqa: ANN201  (a context manager)
    """The response to a GET. Raises BrokenOffError, RefusedError."""
    try:
        response = _opener().open(urllib.request.Request(address, headers=headers), timeout=stall)
    except urllib.error.HTTPError as error:
        error.close()
        told = f"{error.code} {error.reason}".strip()
        if error.code not in (408, 416, 425, 429) and error.code < 500:
            raise RefusedError(told) from error
        wait = number(error.headers.get("Retry-After")) or 0
        raise BrokenOffError(told, wait=wait, is_stale=error.code == 416) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise RefusedError(f"its certificate is not right ({error.reason.verify_message})") from error
        cause = error.reason if isinstance(error.reason, OSError) else error
        raise BrokenOffError(_told(cause, stall)) from cause
    except (OSError, http.client.HTTPException) as error:
        raise BrokenOffError(_told(error, stall)) from error
    except ValueError as error:
        raise RefusedError(f"not an address ({error})") from error
    with response:
        yield response


def chunks(response: http.client.HTTPResponse, stall: float) -> Iterator[bytes]:
    """What comes, as it comes. BrokenOffError: it broke off, or hardly anything comes."""
    since, got = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise BrokenOffError(_told(error, stall)) from error
        if not chunk:
            return
        yield chunk
        got += len(chunk)
        if (now := time.monotonic()) - since > stall:
            if got < LEAST:
                raise BrokenOffError(f"only {got} bytes in {stall:g} s")
            since, got = now, 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # not in Python 3.10, nor below

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: ANN001, ANN202
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after != "https" and (before, after) != ("http", "http"):
            raise RefusedError(f"leads to {newurl}, which is not followed")
        return super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https only; urllib's own one would open files as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def validator(response: http.client.HTTPResponse) -> str | None:
    """What tells this version of the file from others, for If-Range: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def number(text: str | None) -> int | None:
    """What a header says, if it is a whole number."""
    return int(text) if text and len(text) < 20 and text.isascii() and text.isdigit() else None


def _told(error: Exception, stall: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {stall:g} s"
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(told).split())[:200]
