"""A signal ends a process that does not answer, or that drops what the answer raises."""

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

class Stop(BaseException):
    pass

with end_by_signal({signal.SIGINT: Stop, signal.SIGTERM: Stop}):
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


RAISED = """
import os, signal, sys, time
from hcmen.base.interrupts import end_by_signal, told, uninterrupted

class Stop(BaseException):
    pass

def stopped():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(20)

def dropped():
    try:
        stopped()
    except Stop:
        pass
    for _ in range(2):
        try:
            time.sleep(20)
        except Stop:
            print("once more")
    time.sleep(20)

def kept():
    try:
        stopped()
    except Stop as error:
        stop = error
    time.sleep(0.5)
    print("done")
    raise stop

def said():
    try:
        stopped()
    except Stop:
        told()
    time.sleep(0.5)

def put_off():
    with uninterrupted():
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(1.5)
        print("done")
    time.sleep(20)

with end_by_signal({signal.SIGINT: Stop, signal.SIGTERM: Stop}):
    try:
        globals()[sys.argv[2]]()
    except Stop:
        told()
        print("stopped")
    else:
        print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("case", "lines"),
    [
        ("stopped", ["stopped"]),
        ("dropped", ["once more", "once more", "stopped"]),  # by a library, as often as it likes
        ("kept", ["done", "stopped"]),  # what is still to be told of is no reason to signal again
        ("said", ["ended"]),
        ("put_off", ["done", "stopped"]),  # longer than the thread waits for an answer
    ],
)
def test_what_a_signal_raises_reaches_the_end_once(case, lines, number):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", RAISED, str(int(number)), case], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:-1], done.stderr) == (0, lines, "")
    assert time.monotonic() < started + 15  # no sleep of 20 s has ended by itself
