"""Runs Python programs in several processes that find each other as those of a launcher do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """How one process ended."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """That of this process, without what a launcher of its own may have set, and one thread."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_"))}
    return {**mine, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **more}


def run(world: int, program: str, *arguments: Any, timeout: float = 400) -> list[Done]:
    """Runs `program` in `world` processes; one alone is told of no others."""
    port = str(free_port())
    started = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, arguments)],
                env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Done(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]
