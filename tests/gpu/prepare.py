"""What run.py starts before its suites: NAME FOLDER ARCHITECTURE [LIBRARY], where NAME is `library` or `probe`.

Writes NAME.json with the path. A LIBRARY that was built elsewhere is only loaded. Exit code 3 with the reason.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from build import build, build_probe


def prepare(name: str, folder: Path, architecture: int, library: str | None) -> dict[str, Any]:
    """Raises RuntimeError with what is missing or was refused."""
    if name == "probe":
        return {"path": str(build_probe(folder, architecture))}
    if library is None:
        path, kernels = build(folder, [architecture], jobs=os.cpu_count() or 2, strict=False)
        on_stack = [k.name for k in kernels if k.in_local_memory]
        return {"path": str(path), "kernels": len(kernels), "spilled_or_on_the_stack": on_stack}
    from hcmen.base.cuda_library import load_cuda_library
    from hcmen.base.errors import HcmenError

    os.environ["HCMEN_CUDA_LIBRARY"] = library
    try:
        load_cuda_library()
    except HcmenError as error:
        raise RuntimeError(str(error)) from None
    return {"path": library, "reason": f"built elsewhere, taken as it stands: {library}"}


def main(name: str, folder: str, architecture: str, library: str | None = None) -> int:
    try:
        found = prepare(name, Path(folder), int(architecture), library)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 3
    Path(f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
