"""Fresh Python processes, and what they import."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path


def loaded_after(script: str, *arguments: str) -> set[str]:
    """The top-level modules that a fresh process holds after `script`, which may end the process."""
    code = textwrap.dedent(
        """
        import atexit, json, os, sys
        target = os.environ["HCMEN_TEST_MODULES"]
        atexit.register(lambda: open(target, "w").write(json.dumps(sorted({m.partition(".")[0] for m in sys.modules}))))
        """
    ) + textwrap.dedent(script)
    target = Path(os.environ.get("TMPDIR", "/tmp")) / f"hcmen-modules-{os.getpid()}.json"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "HCMEN_TEST_MODULES": str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(target.read_text()))
    finally:
        target.unlink(missing_ok=True)


def open_files(*, collected: bool = True) -> int:
    """How many files this process has open; `collected`: less those of objects that only wait for the collector."""
    if collected:
        gc.collect()
    return len(os.listdir("/proc/self/fd"))
