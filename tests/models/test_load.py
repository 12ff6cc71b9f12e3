"""`hcmen.models.load`: a model by folder, archive, URL, repository or name, and what is refused on the way."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.processes import loaded_after

import hcmen.models
from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, InputError
from hcmen.base.shipped import DEMO
from hcmen.models import load
from hcmen.training.checkpoint import load_checkpoint

TRAIN = DEMO / "train"
WEIGHTS = hashlib.sha256((TRAIN / "checkpoint.safetensors").read_bytes()).hexdigest()
OTHER = "0" * 64


def zipped(top: str = "") -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(TRAIN.rglob("*")):
            archive.write(path, top + path.relative_to(TRAIN).as_posix())
    return target.getvalue()


def tarred(mode: str, top: str, form: int = tarfile.PAX_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode, format=form) as archive:
        archive.add(TRAIN, top)
    return target.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_the_demo(model: torch.nn.Module) -> bool:
    demo = load_checkpoint(TRAIN)[0].state_dict()
    found = model.state_dict()
    return not model.training and found.keys() == demo.keys() and all(torch.equal(found[k], x) for k, x in demo.items())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, and a temporary folder that has to be empty again at the end."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "hcmen" / "models"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*")) if cache.exists() else []


# --- folders, archives and names -------------------------------------------------------------------------------------


def test_importing_the_models_is_light() -> None:
    loaded = loaded_after("import hcmen.models; assert 'load' in dir(hcmen.models)")
    assert loaded.isdisjoint({"torch", "numpy", "safetensors", "ssl", "huggingface_hub"})
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = hcmen.models.laod


def test_a_folder_and_what_comes_with_hcmen_are_loaded() -> None:
    for source in (TRAIN, str(TRAIN), "demo"):
        model = load(source, sha256=WEIGHTS)
        assert is_the_demo(model)
        assert model.config.inputs.label_max == 3.0
    with pytest.raises(CorruptFileError, match=f"has the sha256 {WEIGHTS}, expected 0000"):
        load(TRAIN, sha256=OTHER)
    with pytest.raises(CorruptFileError, match="do not use it"):
        load("demo", sha256=OTHER)


def test_what_is_there_goes_before_a_name(tmp_path: Path) -> None:
    shutil.copytree(TRAIN, "demo")
    (tmp_path / "demo" / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"demo/checkpoint\.safetensors: 0 bytes"):
        load("demo")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(zipped(), id="zip"),
        pytest.param(zipped("some/train/"), id="zip of a folder"),
        pytest.param(tarred("w:gz", "."), id="tar.gz of ."),
        pytest.param(tarred("w", "train"), id="tar"),
        pytest.param(tarred("w", "train", tarfile.GNU_FORMAT), id="tar of GNU"),
        pytest.param(tarred("w", "train", tarfile.USTAR_FORMAT), id="tar of POSIX"),
    ],
)
def test_an_archive_is_loaded(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    path = tmp_path / "model"
    path.write_bytes(content)
    assert is_the_demo(load(path))
    assert is_the_demo(load(path, sha256=sha256(content).upper()))
    with pytest.raises(CorruptFileError, match="expected 0000"):
        load(path, sha256=OTHER)
    with pytest.raises(InputError, match="a larger file, expected at most"):
        load(path, most_bytes=len(content) - 1)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match="model: "):
        load(path)
    assert not any((tmp_path / "temporary").iterdir())


def test_an_archive_by_other_tools_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(TRAIN, "train")
    subprocess.run(["tar", "czf", "train.tar.gz", "train"], check=True)
    assert is_the_demo(load("train.tar.gz"))


def test_an_archive_of_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    shutil.copytree(TRAIN, "train")
    (tmp_path / "train" / "checkpoint.safetensors").write_bytes(
        bytes((TRAIN / "checkpoint.safetensors").stat().st_size)
    )
    shutil.make_archive("train", "zip", "train")
    with pytest.raises(CorruptFileError, match=r"^train\.zip: .*make the archive again"):
        load("train.zip")
    config = json.loads((TRAIN / "config.json").read_text())
    (tmp_path / "train" / "config.json").write_text(json.dumps({**config, "kind": "hcmn"}))
    shutil.make_archive("train", "zip", "train")
    with pytest.raises(InputError, match=r"^train\.zip: unknown model kind 'hcmn': did you mean 'hcmen'"):
        load("train.zip")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("dmeo", "unknown model 'dmeo': did you mean 'demo'"),
        ("", "unknown model '': choose from demo"),
        ("\0", "unknown model"),
        ("./missing", "nothing is there, expected a checkpoint folder"),
        ("a/b/c", "nothing is there"),
        ("model.zip", "nothing is there"),
        (Path("missing"), "nothing is there"),
        (Path("owner/name"), "nothing is there"),
        (DEMO / "bundle", "a bundle, .* load it with hcmen.runtime.load"),
        (DEMO / "train" / "config.json", "no zip or tar, expected an archive of a checkpoint folder"),
        ("/dev/zero", "not a regular file"),
        ("http://127.0.0.1/x.zip", "a URL of 'http', expected https"),
        ("file:///etc/passwd", "a URL of 'file', expected https"),
        ("ftp://127.0.0.1/x.zip", "expected https"),
        ("https:///x.zip", "expected https"),
        ("https://user:secret@127.0.0.1/x.zip", r"^https://127\.0\.0\.1/x\.zip: a URL with a user's name"),
        ("https://127.0.0.1:x/x.zip", "no URL"),
        ("https://[::/x.zip", "no URL"),
        ("https://127.0.0.1/x y.zip", "unquoted"),
        ("https://127.0.0.1/x.zip?token=secret", "a URL without a sha256"),
    ],
)
def test_what_is_none_is_one_line(source: str | Path, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load(source)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", 5, b"0" * 64])
def test_a_sha256_is_64_digits(digest: object) -> None:
    with pytest.raises(InputError, match="expected 64 hexadecimal digits"):
        load("demo", sha256=digest)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    """Neither in the place of the weights nor beside them."""
    shutil.copytree(TRAIN, "train")
    torch.save({"x": torch.ones(1)}, "train/checkpoint.safetensors")
    with pytest.raises(CorruptFileError):
        load("train")


# --- URLs ------------------------------------------------------------------------------------------------------------

Answer = Callable[[ssl.SSLSocket], None]


class Server:
    """A server over TLS that answers each path as it is told to."""

    def __init__(self, folder: Path) -> None:
        key, self.certificate = folder / "key.pem", folder / "certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", self.certificate]
        subprocess.run(command, check=True, capture_output=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, key)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def url(self, path: str, answer: Answer | None = None) -> str:
        if answer is not None:
            self.answers[path] = answer
        return f"https://127.0.0.1:{self._socket.getsockname()[1]}{path}"

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with self._context.wrap_socket(connection, server_side=True) as secure:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += secure.recv(4096)
                path = request.split()[1].decode()
                self.asked.append(path)
                self.answers[path.partition("?")[0]](secure)
        except OSError:
            pass


def says(head: str, *parts: bytes, every: float = 0.0) -> Answer:
    def answer(connection: ssl.SSLSocket) -> None:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        for part in parts:
            connection.sendall(part)
            time.sleep(every)

    return answer


def file(content: bytes) -> Answer:
    return says(f"HTTP/1.1 200 OK\nContent-Length: {len(content)}", content)


def endless(head: str, part: bytes, every: float = 0.0) -> Answer:
    def answer(connection: ssl.SSLSocket) -> None:
        connection.sendall(head.replace("\n", "\r\n").encode())
        while True:
            connection.sendall(part)
            time.sleep(every)

    return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture
def trusted(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    server.asked.clear()
    return server


CONTENT = zipped("train/")


def test_a_url_is_fetched_once_and_held_to_its_hash_each_time(trusted: Server, cache: Path) -> None:
    url, digest = trusted.url("/model.zip?token=1", None), sha256(CONTENT)
    trusted.url("/model.zip", file(CONTENT))
    assert is_the_demo(load(url, sha256=digest))
    assert left_in(cache) == [digest]
    assert (cache / digest).stat().st_mode & 0o777 == 0o600
    assert is_the_demo(load(url, sha256=digest.upper()))
    assert trusted.asked == ["/model.zip?token=1"]
    (cache / digest).write_bytes(CONTENT[:-1] + b"x")
    assert is_the_demo(load(url, sha256=digest))
    assert len(trusted.asked) == 2
    assert (cache / digest).read_bytes() == CONTENT


def test_a_cache_that_is_altered_between_check_and_use_is_seen(
    trusted: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcmen.models.loading_url._is_there", lambda path, digest: True)
    digest = sha256(CONTENT)
    cache.mkdir(parents=True)
    (cache / digest).write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(CorruptFileError, match=f"expected {digest}"):
        load(trusted.url("/model.zip", file(CONTENT)), sha256=digest)


def test_a_redirect_is_followed_to_https_alone(trusted: Server, cache: Path) -> None:
    trusted.url("/model.zip", file(CONTENT))
    moved = trusted.url("/moved", says("HTTP/1.1 308 Permanent Redirect\nLocation: /model.zip\nContent-Length: 0"))
    assert is_the_demo(load(moved, sha256=sha256(CONTENT)))
    assert trusted.asked == ["/moved", "/model.zip"]
    for place in ("http://127.0.0.1/model.zip", "file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"):
        url = trusted.url("/away", says(f"HTTP/1.1 302 Found\nLocation: {place}\nContent-Length: 0"))
        with pytest.raises(InputError, match=r"/away: sends on to"):
            load(url, sha256=OTHER)
    url = trusted.url("/away", says("HTTP/1.1 302 Found\nLocation: //[/\nContent-Length: 0"))
    with pytest.raises(InputError, match=r"/away: cannot be fetched \(Invalid IPv6 URL\)"):
        load(url, sha256=OTHER)
    for head in ("HTTP/1.1 302 Found\nLocation: /round\nContent-Length: 0", "HTTP/1.1 302 Found\nContent-Length: 0"):
        with pytest.raises(InputError, match="sends on without end"):
            load(trusted.url("/round", says(head)), sha256=OTHER)
    # The body of a redirect is nobody's, and is not waited for.
    url = trusted.url("/more", endless("HTTP/1.1 302 Found\nLocation: /model.zip\n\n", bytes(1000)))
    assert is_the_demo(load(url, sha256=sha256(CONTENT)))
    assert left_in(cache) == [sha256(CONTENT)]


_OK = "HTTP/1.1 200 OK\n"
REFUSED: dict[str, tuple[Answer, type[HcmenError], str]] = {
    "another file": (file(CONTENT + b"x"), CorruptFileError, "has the sha256 .*, expected .*do not use it"),
    "no such file": (says("HTTP/1.1 404 Gone\nContent-Length: 0"), InputError, "says 404 Not Found: check the URL"),
    "a code of its own": (says("HTTP/1.1 799 \x1b[31m\nContent-Length: 0"), InputError, "says 799: check the URL"),
    "a part": (says("HTTP/1.1 206 Partial Content\nContent-Length: 3", b"abc"), InputError, "says 206"),
    "cut off": (says(_OK + f"Content-Length: {len(CONTENT)}", CONTENT[:1000]), CorruptFileError, "ended after 1000 of"),
    "a chunk cut off": (says(_OK + "Transfer-Encoding: chunked", b"ffff\r\nabc"), InputError, "cannot be fetched"),
    "longer than it says": (says(_OK + "Content-Length: 1000", CONTENT), CorruptFileError, "has the sha256"),
    "too large": (
        says(_OK + "Content-Length: 99999999999", b""),
        InputError,
        "a larger file, expected at most 1000000",
    ),
    "too large, and does not say so": (endless(_OK + "\n", bytes(1000)), InputError, "a larger file, expected"),
    "chunks without end": (
        endless(_OK + "Transfer-Encoding: chunked\n\n", b"3e8\r\n" + bytes(1000) + b"\r\n"),
        InputError,
        "a larger file",
    ),
    "a size below zero": (says(_OK + "Content-Length: -5", CONTENT[:9]), CorruptFileError, "has the sha256"),
    "no HTTP": (says("SSH-2.0-OpenSSH_9.6"), InputError, "cannot be fetched"),
    "headers without end": (endless(_OK, b"a: b\r\n"), InputError, "cannot be fetched"),
    "nothing": (lambda connection: None, InputError, "cannot be fetched"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_server_can_do_is_one_line_and_leaves_nothing(trusted: Server, cache: Path, name: str) -> None:
    answer, kind, told = REFUSED[name]
    with pytest.raises(kind, match=told) as caught:
        load(trusted.url("/model.zip", answer), sha256=sha256(CONTENT), most_bytes=1_000_000, time_limit=60.0)
    assert str(caught.value).startswith("https://127.0.0.1/model.zip: ")
    assert str(caught.value).isprintable()
    assert left_in(cache) == []


SLOW: dict[str, Answer] = {
    "the body": endless(_OK + "Content-Length: 100000\n\n", b"x", every=0.05),
    "a chunk's head": endless(_OK + "Transfer-Encoding: chunked\n\n", b"0", every=0.05),
    "headers": endless(_OK, b"a", every=0.05),
    "nothing at all": lambda connection: time.sleep(30),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_server_that_drips_ends_at_the_time_limit(trusted: Server, cache: Path, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"took more than 0\.5 s: try again later, or raise time_limit"):
        load(trusted.url("/model.zip", SLOW[name]), sha256=OTHER, time_limit=0.5)
    assert time.monotonic() - began < 15
    assert left_in(cache) == []


def test_a_handshake_that_drips_ends_at_the_time_limit(cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                try:
                    connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB
                    while True:
                        connection.sendall(b"\x02")
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(InputError, match=r"took more than 0\.5 s"):
            load(f"https://127.0.0.1:{listening.getsockname()[1]}/x", sha256=OTHER, time_limit=0.5)


def test_a_server_that_nobody_vouches_for_is_refused(server: Server, cache: Path) -> None:
    server.asked.clear()
    with pytest.raises(InputError, match=r"cannot be fetched \(.*certificate verify failed"):
        load(server.url("/model.zip", file(CONTENT)), sha256=sha256(CONTENT))
    with pytest.raises(InputError, match="cannot be fetched"):
        load("https://127.0.0.1:1/model.zip", sha256=OTHER)
    assert server.asked == []
    assert left_in(cache) == []


def test_a_certificate_for_another_name_is_refused(trusted: Server) -> None:
    with pytest.raises(InputError, match=r"cannot be fetched \(.*certificate verify failed.*localhost"):
        load(trusted.url("/model.zip", file(CONTENT)).replace("127.0.0.1", "localhost"), sha256=sha256(CONTENT))


def test_a_proxy_of_the_environment_is_gone_through(trusted: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def forward() -> None:
            client, _ = listening.accept()
            asked.append(client.recv(4096))
            target = asked[0].split()[1].decode().rpartition(":")
            server = socket.create_connection((target[0], int(target[2])))
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            threading.Thread(target=_pump, args=[server, client], daemon=True).start()
            _pump(client, server)

        threading.Thread(target=forward, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://me:a%20b@127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert is_the_demo(load(trusted.url("/model.zip", file(CONTENT)), sha256=sha256(CONTENT)))
    assert asked[0].startswith(b"CONNECT 127.0.0.1:")
    assert b"Proxy-Authorization: Basic bWU6YSBi\r\n" in asked[0]  # me:a b
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:x")
    with pytest.raises(InputError, match="the proxy that https_proxy names has no valid address"):
        load(trusted.url("/other.zip"), sha256=OTHER)


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while content := source.recv(65536):
            target.sendall(content)
    except OSError:
        pass


def test_an_interrupted_download_leaves_nothing(trusted: Server, cache: Path, tmp_path: Path) -> None:
    drip = endless(_OK + "Content-Length: 100000\n\n", b"x", every=0.05)
    code = "import sys; from hcmen.models import load; load(sys.argv[1], sha256='0' * 64)"
    command = [sys.executable, "-c", code, trusted.url("/model.zip", drip)]
    for ended_by in (signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True) as process:
            until = time.monotonic() + 60
            while not any(name.startswith(f".{OTHER}.tmp-") for name in left_in(cache)):
                assert time.monotonic() < until
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.02)
            process.send_signal(ended_by)
            assert process.stderr is not None
            told = process.stderr.read()
        assert ended_by != signal.SIGINT or told.rstrip().endswith("KeyboardInterrupt")
        assert len(left_in(cache)) == (ended_by == signal.SIGKILL)
    # What a killed process left goes with the next one.
    with pytest.raises(CorruptFileError):
        load(trusted.url("/model.zip", file(CONTENT)), sha256=OTHER)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(trusted: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"")
    url = trusted.url("/model.zip", file(CONTENT))
    with pytest.raises(InputError, match=r"models: .*: set XDG_CACHE_HOME"):
        load(url, sha256=sha256(CONTENT))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match="no home folder for a cache: set XDG_CACHE_HOME"):
        load(url, sha256=sha256(CONTENT))


# --- repositories ----------------------------------------------------------------------------------------------------

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """What huggingface_hub was asked for; it gives the demo's folder."""
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(TRAIN)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_repository_is_asked_for_two_files_alone(hub: dict[str, object]) -> None:
    assert is_the_demo(load("owner/na.me_1", sha256=WEIGHTS))
    assert hub == {
        "name": "owner/na.me_1",
        "revision": None,
        "allow_patterns": ["config.json", "checkpoint.safetensors"],
    }
    assert is_the_demo(load("owner/name@refs/pr/1"))
    assert (hub["name"], hub["revision"]) == ("owner/name", "refs/pr/1")
    with pytest.raises(CorruptFileError, match="expected 0000"):
        load("owner/name", sha256=OTHER)


def test_a_folder_goes_before_a_repository(hub: dict[str, object]) -> None:
    shutil.copytree(TRAIN, "owner/name")
    assert is_the_demo(load("owner/name"))
    assert not hub


def test_what_goes_wrong_with_a_repository_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(name: str, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find\n\nthe files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(InputError, match=r"^owner/name: no such folder, and no such repository can be had \(Cannot"):
        load("owner/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"owner/name: the repository has no config\.json and no checkpoint\.saf"):
        load("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match=r"is not installed, expected it: pip install 'hcmen\[hub\]'"):
        load("owner/name")


def test_a_hub_on_this_machine_is_read_and_offline_its_cache(tmp_path: Path) -> None:
    """huggingface_hub itself, which asks a small server of the hub's own interface."""
    import http.server

    commit = "a" * 40
    files = {name: (TRAIN / name).read_bytes() for name in ("config.json", "checkpoint.safetensors", "report.json")}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, headers, content = self.path.partition("?")[0], {"Content-Type": "application/json"}, b"{}"
            if path.startswith("/api/models/owner/name/tree/"):
                tree = [{"type": "file", "oid": sha256(x)[:40], "size": len(x), "path": n} for n, x in files.items()]
                content = json.dumps(tree).encode()
            elif path.startswith("/api/models/owner/name"):
                about = {"id": "owner/name", "modelId": "owner/name", "sha": commit, "private": False, "tags": []}
                about |= {"siblings": [{"rfilename": name} for name in files], "downloads": 0, "likes": 0}
                content = json.dumps(about).encode()
            elif path.startswith(f"/owner/name/resolve/{commit}/"):
                name = path.rpartition("/")[2]
                asked.append(f"{self.command} {name}")
                content = files[name]
                headers = {"ETag": f'"{sha256(content)[:40]}"', "X-Repo-Commit": commit}
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        code = """
import sys
from hcmen.base.errors import HcmenError
from hcmen.models import load
for source, digest in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        print(load(source, sha256=digest).config.kind)
    except HcmenError as error:
        print(error)
"""

        def loaded(*sources: str, **more: str) -> list[str]:
            command = [sys.executable, "-c", code, *sources]
            done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        first, pinned, missing = loaded("owner/name", WEIGHTS, f"owner/name@{commit}", OTHER, "owner/other", WEIGHTS)
        server.shutdown()
    assert first == "hcmen"
    assert f"has the sha256 {WEIGHTS}, expected 0000" in pinned
    assert missing.startswith("owner/other: no such folder, and no such repository can be had (")
    assert {line.split()[1] for line in asked} == {"config.json", "checkpoint.safetensors"}
    there, none = loaded("owner/name", WEIGHTS, "owner/none", WEIGHTS, HF_HUB_OFFLINE="1")
    assert there == "hcmen"
    assert "offline, it has to be in the cache" in none


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """What takes a moment to make takes one to refuse; tests/attacks has more archives."""
    with gzip.open(tmp_path / "bomb", "wb", compresslevel=1) as target, tarfile.open(fileobj=target, mode="w") as made:
        for name in ("other.bin", "checkpoint.safetensors"):
            entry = tarfile.TarInfo(name)
            entry.size = 3 << 20
            made.addfile(entry, io.BytesIO(bytes(entry.size)))
    with pytest.raises(InputError, match="unpacks to too much, expected at most 2097152 bytes"):
        load(tmp_path / "bomb", most_bytes=2 << 20)
