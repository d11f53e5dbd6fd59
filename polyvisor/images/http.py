"""HTTP as downloads need it, with the standard library alone: few redirects, none to less safe places, time limits.

Proxies come from the environment (http_proxy, https_proxy, no_proxy), certificates from the system (SSL_CERT_FILE).
Only http and https exist here: urllib's file and ftp handlers are left out, so that no redirect can lead to them.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from typing import IO
from urllib.parse import unquote, urlsplit, urlunsplit

from polyvisor import __version__
from polyvisor.errors import DownloadFailed

TIMEOUT_S = 30.0
_REDIRECTS = 8
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})


class Interrupted(Exception):
    """The transfer failed in a way that another attempt may mend; says how."""


class Redirected(Exception):
    """A redirect that is not followed; says why."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _REDIRECTS
    max_repeats = 2

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https"):  # urllib itself would let ftp pass
            fp.close()
            raise Redirected(f"it redirects to {new.scheme}:")
        if old.scheme == "https" and new.scheme == "http":
            fp.close()
            raise Redirected(f"it redirects from https to plain http ({new.hostname})")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and old.netloc != new.netloc:
            request.remove_header("Authorization")
        return request


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """The server's answer to a GET, of status 200, 206, 304 or 416.

    Raises Interrupted where trying again may help, DownloadFailed where it can't.
    """
    target, authorization = _without_credentials(url)
    request = urllib.request.Request(target, headers=dict(headers))  # noqa: S310 (the opener knows http and https alone)
    request.add_header("User-Agent", f"polyvisor/{__version__}")
    request.add_header("Accept-Encoding", "identity")
    if authorization:
        request.add_header("Authorization", authorization)
    shown = shown_url(url)
    try:
        response: http.client.HTTPResponse = _opener().open(request, timeout=TIMEOUT_S)
        return response
    except urllib.error.HTTPError as error:
        if error.code in (304, 416):
            return error  # type: ignore[return-value]  # an HTTPError is a response as well
        error.close()
        raise _status(error, shown) from error
    except Redirected as error:
        raise DownloadFailed(f"{shown}: {error}", hint="give the address that it leads to, if you trust it") from error
    except urllib.error.URLError as error:
        raise _reason(error.reason, shown) from error
    except (OSError, http.client.HTTPException) as error:
        raise _reason(error, shown) from error
    except ValueError as error:
        raise DownloadFailed(f"{shown}: this is not an address", hint="write https://host/path") from error


def shown_url(url: str) -> str:
    """`url` without user name, password and query, which may be secret: for messages and records."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _without_credentials(url: str) -> tuple[str, str | None]:
    """`url` without user name and password, and the header that carries them instead."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    return urlunsplit(parts._replace(netloc=host)), "Basic " + b64encode(unquote(user).encode()).decode()


def _status(error: urllib.error.HTTPError, shown: str) -> Exception:
    if error.code in _LATER:
        return Interrupted(f"the server says {error.code}")
    if 300 <= error.code < 400:
        scheme = urlsplit(error.headers.get("Location", "")).scheme
        if scheme not in ("", "http", "https"):
            return DownloadFailed(f"{shown}: it redirects to {scheme}:", hint="check the address")
        return DownloadFailed(f"{shown}: it redirects in a circle or too often")
    hints = {
        404: "the file is not there: check the address",
        410: "the file is not there any more: check the address",
        401: "it needs a user name and a password: https://USER:PASSWORD@host/path",
        403: "the server does not give it out",
    }
    return DownloadFailed(f"{shown}: the server says {error.code}", hint=hints.get(error.code))


def _reason(reason: object, shown: str) -> Exception:
    match reason:
        case ssl.SSLCertVerificationError():
            return DownloadFailed(
                f"{shown}: the server's certificate is not valid: {reason.verify_message}",
                hint="is the clock right, and the package ca-certificates installed?",
            )
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return Interrupted("the host's name can't be looked up now")
        case socket.gaierror():
            return DownloadFailed(f"{shown}: there is no such host", hint="check the address and the network")
        case ConnectionRefusedError():
            return DownloadFailed(f"{shown}: the connection is refused", hint="check the address and its port")
        case ssl.SSLError():
            return DownloadFailed(f"{shown}: TLS failed: {reason.reason or reason}", hint="is it an https server?")
        case TimeoutError():
            return Interrupted("the server does not answer")
        case _:
            return Interrupted(str(reason) or type(reason).__name__)
