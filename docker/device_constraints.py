"""Writes constraints-device.txt: what a device installs beside hcmen, each file by its sha256.

    python docker/device_constraints.py > constraints-device.txt

The versions of NumPy, click and ONNX Runtime are those of constraints.txt; what these need in turn has the version that
is installed here. The digests are the package index's own, for every platform and Python that a release has a file for.
"""

from __future__ import annotations

import json
import re
import urllib.request
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
INDEX = "https://pypi.org/simple"
DEVICE = ("click", "numpy", "onnxruntime")
HEAD = """\
# What a device's Python needs beside hcmen, each file by its digest; docker/device_constraints.py wrote it:
#   pip install --require-hashes --only-binary :all: -r constraints-device.txt
#   pip install --no-deps hcmen-*.whl
"""


def needed() -> dict[str, str]:
    """Names and versions: the device's three packages and what they need on Linux."""
    pinned = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("ascii")))
    found, to_do = {}, list(DEVICE)
    while to_do:
        name = to_do.pop()
        if name in found:
            continue
        found[name] = pinned.get(name) or metadata.version(name)
        # A marker names an extra or another system: click's colorama is for Windows.
        to_do += [re.split(r"[^\w.-]", need)[0].lower() for need in metadata.requires(name) or [] if ";" not in need]
    return dict(sorted(found.items()))


def digests(name: str, version: str) -> list[str]:
    """The sha256 of every wheel of a release, sorted."""
    request = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    start = f"{name}-{version}-"
    return sorted(
        f["hashes"]["sha256"] for f in files if f["filename"].startswith(start) and f["filename"].endswith(".whl")
    )


if __name__ == "__main__":
    print(HEAD, end="")
    for name, version in needed().items():
        hashes = digests(name, version)
        if not hashes:
            raise SystemExit(f"{name}: {INDEX} has no wheel of version {version}: pin one that it has")
        print(f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in hashes), sep=" \\\n    ")
