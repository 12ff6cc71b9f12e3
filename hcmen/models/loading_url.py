"""A file by its URL and its sha256: over HTTPS, of bounded size and within a time limit, whole or not at all.

    $XDG_CACHE_HOME/hcmen/models/SHA256    else ~/.cache/hcmen/models/SHA256

The name in the cache is the hash of the content. Whoever reads the file holds it to that hash again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path

from hcmen.base.errors import CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import open_regular, refused, writing_file
from hcmen.base.trust import user_folder

__all__ = ["download", "sha256_of", "told"]

_QUIET_SECONDS = 30.0
"""How long a server may say nothing."""
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PART = 1 << 20


def download(url: str, sha256: str | None, *, most_bytes: int, time_limit: float) -> Path:
    """The file of `url` in the cache, fetched unless a file with its sha256 is there.

    Args:
        url: of HTTPS. sha256: of the file, in lower case; None is refused. most_bytes: of the file.
        time_limit: in seconds, of it all.

    Raises:
        InputError: no sha256; another scheme, here or where the server sends on to; the server cannot be reached, says
            no, or is too slow; the file is too large; the cache cannot be written.
        CorruptFileError: the file is cut off, or its sha256 is another.
    """
    _split(url)
    if sha256 is None:
        fix = "give sha256=, as told by who published the file: 64 digits, as sha256sum prints them"
        raise InputError("a URL without a sha256", "the sha256 of its file", fix, where=told(url))
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    elsewhere = "set XDG_CACHE_HOME to a folder of yours that can be written"
    if folder is None:
        raise InputError("this user has no home folder for a cache", fix=elsewhere)
    path = folder / "models" / sha256
    if _is_there(path, sha256):
        return path
    with refused(path.parent, fix=elsewhere):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with writing_file(path, mode=0o600) as file:
            with contextlib.closing(_parts(url, most_bytes, time_limit)) as parts:
                for part in parts:
                    digest.update(part)
                    file.write(part)
            if digest.hexdigest() != sha256:
                raise CorruptFileError(
                    f"the file has the sha256 {digest.hexdigest()}",
                    sha256,
                    "do not use it: it is another file than the one that was meant",
                    where=told(url),
                )
    return path


def sha256_of(path: Path) -> str:
    """The sha256 of a regular file; raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def told(url: str) -> str:
    """A URL for a message: without user names and queries, which may be secrets."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return shown(f"{parts.scheme}://{parts.hostname or ''}{parts.path}")[1:-1]
    return "a URL"


def _is_there(path: Path, sha256: str) -> bool:
    with contextlib.suppress(OSError):
        return sha256_of(path) == sha256
    return False


def _split(url: str, sent_on_by: str | None = None) -> urllib.parse.SplitResult:
    """The parts of an HTTPS URL; raises InputError for any other."""
    where = told(sent_on_by or url)
    sends = "sends on to " if sent_on_by else ""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"{sends}no URL ({reason_of(error, 100)})", "one of https", where=where) from error
    if parts.scheme != "https" or not parts.hostname:
        what = f"{sends}a URL of {shown(parts.scheme)}"
        raise InputError(what, "https", "nothing but https is fetched", where=where)
    if parts.username is not None or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"{sends}a URL with a user's name or unquoted characters", "a plain one", where=where)
    return parts


class _Connection(http.client.HTTPSConnection):
    """One that `give_up` ends at any moment: in the handshake, in headers that come byte by byte, or in the body."""

    def __init__(self, parts: urllib.parse.SplitResult, seconds: float) -> None:
        self._server, self._tls = parts.hostname or "", ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        self.gave_up = False
        self._open: socket.socket | None = None
        port = parts.port or 443
        proxy = urllib.request.getproxies().get("https")
        through = None if not proxy or urllib.request.proxy_bypass(f"{self._server}:{port}") else _proxy(proxy)
        host, at = through[:2] if through else (self._server, port)
        super().__init__(host, at, timeout=seconds, context=self._tls)
        if through:
            self.set_tunnel(self._server, port, through[2])

    def connect(self) -> None:
        """As HTTPSConnection's, with the socket at hand before the handshake."""
        http.client.HTTPConnection.connect(self)
        assert self.sock is not None
        self._open = self.sock = self._tls.wrap_socket(
            self.sock, server_hostname=self._server, do_handshake_on_connect=False
        )
        if self.gave_up:
            raise TimeoutError
        self._open.do_handshake()

    def give_up(self) -> None:
        """From another thread: whatever waits for the server goes on with an error, or with the end of its content."""
        self.gave_up = True
        opened = self._open or self.sock
        if opened is not None:
            with contextlib.suppress(OSError):
                # The method of SSLSocket would take TLS from a read that is under way.
                socket.socket.shutdown(opened, socket.SHUT_RDWR)


def _proxy(named: str) -> tuple[str, int, dict[str, str]]:
    """Host, port and headers of the proxy that the environment names."""
    try:
        parts = urllib.parse.urlsplit(named if "://" in named else f"http://{named}")
        host, port = parts.hostname or "", parts.port or 8080
    except ValueError as error:
        what = f"the proxy that https_proxy names has no valid address ({reason_of(error, 100)})"
        raise InputError(what, "http://HOST:PORT") from error
    if parts.username is None:
        return host, port, {}
    user = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
    return host, port, {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def _parts(url: str, most_bytes: int, time_limit: float) -> Generator[bytes, None, None]:
    """The content behind `url`, piece by piece."""
    first, before, until = url, None, time.monotonic() + time_limit
    slow = InputError(f"took more than {time_limit:g} s", fix="try again later, or raise time_limit", where=told(first))
    for _ in range(_MOST_REDIRECTS + 1):
        parts, left = _split(url, before), until - time.monotonic()
        if left <= 0:
            raise slow
        connection = _Connection(parts, min(left, _QUIET_SECONDS))
        timer = threading.Timer(left, connection.give_up)
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", parts._replace(scheme="", netloc="", fragment="").geturl() or "/")
            response = connection.getresponse()
            if response.status not in _REDIRECTS:
                yield from _body(response, told(url), most_bytes)
                if connection.gave_up:
                    raise slow
                return
            before, url = url, urllib.parse.urljoin(url, response.getheader("Location") or "")
        except (OSError, http.client.HTTPException, ValueError, CorruptFileError) as error:
            if connection.gave_up:
                raise slow from error
            if isinstance(error, CorruptFileError):
                raise
            what = f"cannot be fetched ({reason_of(error)})"
            raise InputError(what, fix="check the URL and the connection", where=told(url)) from error
        finally:
            timer.cancel()
            connection.close()
    raise InputError("sends on without end", f"at most {_MOST_REDIRECTS} redirects", where=told(first))


def _body(response: http.client.HTTPResponse, where: str, most_bytes: int) -> Iterator[bytes]:
    if response.status != http.HTTPStatus.OK:
        with contextlib.suppress(ValueError):
            status = http.HTTPStatus(response.status)
            raise InputError(f"the server says {status.value} {status.phrase}", fix="check the URL", where=where)
        raise InputError(f"the server says {response.status}", fix="check the URL", where=where)
    size, done = response.length, 0
    large = InputError("a larger file", f"at most {most_bytes} bytes", "raise most_bytes if it is meant", where=where)
    if size is not None and size > most_bytes:
        raise large
    # `read1` gives what is there: a server that drips does not keep it from the time limit.
    while part := response.read1(_PART):
        done += len(part)
        if done > most_bytes:
            raise large
        yield part
    if size is not None and done < size:
        raise CorruptFileError(f"ended after {done} of {size} bytes", fix="load it again", where=where)
