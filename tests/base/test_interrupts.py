"""A signal ends a process that does not answer, even one that has no memory left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEAF = """
import hashlib, resource, signal, sys
from hcmen.base.interrupts import end_by_signal

def stop():
    raise KeyboardInterrupt

with end_by_signal({signal.SIGINT: stop, signal.SIGTERM: stop}):
    if sys.argv[1] == "full":
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20),) * 2)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"a", 200_000_000)  # minutes, during which no signal is answered
"""


def processor_time(process: int) -> float:
    """Seconds that it has had of a processor."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("memory", ["free", "full"])
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_deaf_process_ends_though_no_thread_can_be_started(memory, number, word):
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, memory], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        begun = processor_time(process.pid)
        while processor_time(process.pid) < begun + 0.3:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (128 + number, f"error: {word}\n")
