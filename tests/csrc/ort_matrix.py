"""The same files and the same library in several versions of ONNX Runtime; writes docs/results/ort_matrix.json.

    python tests/csrc/ort_matrix.py                      about two minutes, and a virtual environment for each version
    python tests/csrc/ort_matrix.py --versions 1.17.3 1.31.1 --out /tmp/matrix.json

Here the models, their inputs and the expected outputs (float64, PyTorch) are made. Each version then runs them in an
environment that holds onnxruntime and numpy alone: with the library, without it, and every malformed node of
tests/csrc/ort_cases.py. Exit code 1 if anything in any version is not as expected.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# 1.16 is older than what the package asks for; it is the one that has no thread pool to offer to an operator.
VERSIONS = ("1.16.3", "1.17.3", "1.20.1", "1.23.2", "1.31.1")
NUMPY_1 = ("1.16", "1.17")  # built against it
# Of the largest output. Half precision: half a unit in the last place of outputs as large as that.
BOUNDS = {"kernel": 1e-6, "function": 2e-6, "float16": 1e-3}


def build_cases(folder: Path) -> None:
    """Writes <name>.onnx and <name>.npz (inputs "in/<name>", outputs "out/<name>") and the malformed nodes."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import ort_cases
    from helpers.op_cases import ConvCase, ScanCase, conv_arrays, conv_oracle, model_of, scan_arrays, scan_oracle

    def write(
        name: str, case: ScanCase | ConvCase, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
    ) -> None:
        (folder / f"{name}.onnx").write_bytes(model_of(case, functions=True).SerializeToString())
        arrays = {f"in/{key}": x for key, x in feeds.items()} | {f"out/{key}": x for key, x in outputs.items()}
        np.savez(folder / f"{name}.npz", **arrays)

    batch, time, channel, state = 3, 120, 68, 12
    for dtype in ("float32", "float16"):
        for reverse, group, gated, stateful in (
            (False, None, False, False),
            (True, 2, True, False),
            (False, 4, False, True),
            (True, None, True, True),
        ):
            scan = ScanCase(batch, time, channel, state, group, dtype, gated, stateful, reverse)
            feeds = scan_arrays(scan)
            y, last = scan_oracle(scan, feeds)
            switches = {"reverse": reverse, "group": group, "gated": gated, "stateful": stateful}
            on = "-".join(f"{key}{value}" if key == "group" else key for key, value in switches.items() if value)
            outputs = {"y": y, "last_state": last} if stateful else {"y": y}
            write(f"scan-{dtype}" + (f"-{on}" if on else ""), scan, feeds, outputs)
        for reverse, stateful, activation in ((False, False, "silu"), (True, False, "none"), (True, True, "silu")):
            conv = ConvCase(batch, time, channel, 4, dtype, activation == "silu", reverse, stateful)
            feeds = conv_arrays(conv)
            name = f"conv-{dtype}-{activation}" + "-reverse" * reverse + "-stateful" * stateful
            y, last = conv_oracle(conv, feeds)
            write(name, conv, feeds, {"y": y, "last_state": last} if stateful else {"y": y})

    bad = folder / "malformed"
    bad.mkdir()
    index = []
    for i, (name, case) in enumerate(ort_cases.MALFORMED.items()):
        (bad / f"{i}.onnx").write_bytes(case.model().SerializeToString())
        np.savez(bad / f"{i}.npz", **case.feeds())
        index.append({"case": name, "says": list(case.says)})
    (bad / "index.json").write_text(json.dumps(index))


# --- in the environment of one version: no torch, no onnx, no hcmen ---------------------------------------------------


def check(folder: Path, library: Path) -> dict[str, Any]:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)

    def session(model: Path, with_library: bool, profile: Path | None = None) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if with_library:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    cases = []
    for model in sorted(folder.glob("*.onnx")):
        arrays = np.load(model.with_suffix(".npz"))
        feeds = {key[3:]: arrays[key] for key in arrays.files if key.startswith("in/")}
        want = [arrays[key] for key in arrays.files if key.startswith("out/")]
        result: dict[str, Any] = {"name": model.stem}
        for kind in ("kernel", "function"):
            with tempfile.TemporaryDirectory() as scratch:
                made = session(model, kind == "kernel", Path(scratch) / "profile")
                got = made.run(None, feeds)
                events = json.loads(Path(made.end_profiling()).read_text())
            ran = {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})}
            pairs = zip(got, want, strict=True)
            error = max(float(np.abs(g.astype(np.float64) - w).max() / np.abs(w).max()) for g, w in pairs)
            bound = BOUNDS["float16" if "float16" in model.stem else kind]
            op_type = "SelectiveScan" if model.stem.startswith("scan") else "CausalConv1d"
            result[kind] = {
                "max_error_of_largest": float(f"{error:.3g}"),
                "ran_kernel": op_type in ran,
                "passed": error <= bound and (op_type in ran) == (kind == "kernel"),
            }
        cases.append(result)

    silent, unworded = [], []
    for i, case in enumerate(json.loads((folder / "malformed" / "index.json").read_text())):
        model = folder / "malformed" / f"{i}.onnx"
        try:
            session(model, True).run(None, dict(np.load(model.with_suffix(".npz"))))
        except Exception as error:
            if not all(part in str(error) for part in case["says"]):
                unworded.append({"case": case["case"], "error": str(error).replace(str(folder), "")[:300]})
        else:
            silent.append(case["case"])
    return {
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cases": cases,
        "malformed": {"cases": i + 1, "without_error": silent, "without_our_words": unworded},
        "passed": not silent and not unworded and all(c[k]["passed"] for c in cases for k in ("kernel", "function")),
    }


# --- the whole --------------------------------------------------------------------------------------------------------


def environment(version: str, root: Path) -> Path:
    """The Python of a virtual environment with this version, made if it is not there."""
    folder = root / version
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        numpy = "numpy<2" if version.startswith(NUMPY_1) else "numpy"
        install = [str(python), "-m", "pip", "install", "--quiet", f"onnxruntime=={version}", numpy]
        subprocess.run(install, check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return python


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS))
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "hcmen-ort-matrix")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "results" / "ort_matrix.json")
    parser.add_argument("--check", nargs=2, type=Path, metavar=("FOLDER", "LIBRARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        print(json.dumps(check(*arguments.check)))
        return 0

    from hcmen.base.library import library_path, load_library

    runtimes = []
    with tempfile.TemporaryDirectory() as scratch:
        build_cases(Path(scratch))
        for version in arguments.versions:
            print(f"onnxruntime {version} ...", file=sys.stderr, flush=True)
            python = environment(version, arguments.environments)
            command = [str(python), "-I", str(Path(__file__).resolve()), "--check", scratch, str(library_path())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stderr[-3000:], file=sys.stderr)
                runtimes.append({"onnxruntime": version, "exit_code": done.returncode, "passed": False})
            else:
                runtimes.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"onnxruntime {version}: {'passed' if runtimes[-1]['passed'] else 'FAILED'}", file=sys.stderr)

    isa = load_library().hcmen_ops_isa
    isa.restype = ctypes.c_char_p
    report = {
        "schema_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "kernels": isa().decode(),
        },
        "op": {"domain": "hcmen", "version": 1},
        "files": {"opset": 19, "ir_version": 9},
        "bounds_of_largest_output": BOUNDS,
        "runtimes": runtimes,
        "passed": all(r["passed"] for r in runtimes),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}", file=sys.stderr)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
