"""Every named attack ends as the table says: by its parser, in bounded time and memory, and some by their command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from attacks.attack import FILES, Attack
from attacks.pickles import BOMBS
from attacks.table import ATTACKS
from fuzz.formats import FORMATS
from fuzz.worker import Worker, put

_COMMANDS = [attack for attack in ATTACKS if attack.command is not None]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(tmp_path_factory.mktemp("attacks"))
    yield made
    made.close()


def named(attack: Attack) -> str:
    return f"{attack.parser}: {attack.tries}".replace(" ", "_")


def made_by(worker: Worker, attack: Attack) -> bytes | object:
    valid, made = worker.samples(attack.parser)[0], attack.made
    return made if isinstance(made, bytes) else lambda path: made(path, valid)


@pytest.mark.parametrize("attack", [pytest.param(a, id=named(a)) for a in ATTACKS])
def test_an_attack_ends_as_documented(worker: Worker, attack: Attack) -> None:
    found = worker.attempt(attack.parser, made_by(worker, attack))
    assert found.kind == (f"exit {attack.code}" if attack.code else "ok"), found.detail
    if attack.code:
        assert attack.says in found.detail
        assert "\n" not in found.detail
        assert len(found.detail) < 1100
    if attack.parser == "pickle" and attack.tries in BOMBS:
        assert any(fix in found.detail for fix in ("check its SHA-256", "size and SHA-256", "dump it again"))


@pytest.mark.parametrize("attack", [pytest.param(a, id=named(a)) for a in _COMMANDS])
def test_an_attack_on_a_command_is_one_line(worker: Worker, attack: Attack) -> None:
    format_ = FORMATS[attack.parser]
    assert format_.command is not None
    worker.samples(attack.parser)
    folder = worker.folder / attack.parser
    put(folder / format_.file, made_by(worker, attack))
    command = [sys.executable, "-m", "hcmen", *format_.command(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == attack.command, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert attack.says in done.stderr


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [named(attack) for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 300_000
    assert {attack.parser for attack in _COMMANDS} >= {"clip", "manifest", "graph", "pickle", "golden set"}
