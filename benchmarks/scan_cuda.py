"""How fast the CUDA scan is, beside mamba_ssm's kernel, the device's copy bandwidth and an empty launch.

    python3 benchmarks/scan_cuda.py --out docs/results/scan_cuda.json
    python3 benchmarks/scan_cuda.py --backward --dtype float32
    python3 benchmarks/scan_cuda.py --tune --batch 1,16      every way of sharing out beside the rule's
    python3 benchmarks/scan_cuda.py --ways "lanes=2 channel_warps=2;chunk=64"    and these alone beside the rule's

Softplus, delta_bias, D and z, 16 states. For each case:

    ours           hcmen_cuda_selective_scan_forward (or _backward), output and workspace made before
    mamba_ssm      mamba_ssm's selective_scan_cuda on its own layout, channels before time, if it imports
    copy           an elementwise kernel of torch that moves as many bytes as the forward scan must
    nothing        an empty kernel through the same library

Times are the device's own: many calls are recorded in one CUDA graph, which is replayed behind a spinning kernel, so
that neither Python nor the driver is in them. Every call takes the next of several sets of random inputs, which
together exceed the device's L2 cache twice where memory allows. Ways are timed in turns, round after round; the median
is reported. `host_us` is what a call costs the host, in a stream that never waits.

`floor_us` is bytes moved over the bandwidth of a large copy; `of_copy` is floor over time. Run it where nothing else
uses the device. The result is written whole after every case, so that a run cut short loses nothing. From a checkout,
without installing, `python3 tests/gpu/run.py --prepare` builds the library and prints the environment to run this in.

Exit code 1 if ours failed or disagreed in a case, 2 for wrong options, 3 without a device, PyTorch or the library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

STATE = 16
BATCHES, CHANNELS, TIMES = (1, 16, 256), (512, 2048), (50, 500, 4096)
TYPES = ("float32", "float16")
MOST = (1 << 31) - 1
# Short names of what hcmen_cuda_launch may wish.
WISHES = {
    "lanes": "lanes_per_channel",
    "time_warps": "time_warps",
    "chunk": "steps_per_chunk",
    "channel_warps": "channel_warps",
    "steps": "steps_per_warp",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"scan_cuda.py: {message}\n")


def _whole(text: str, least: int) -> int | None:
    try:
        return int(text) if least <= int(text) <= MOST else None
    except ValueError:
        return None


def _sizes(text: str) -> list[int]:
    sizes = [_whole(part, 1) for part in text.split(",")]
    if None in sizes:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers from 1 to {MOST} with commas")
    return [size for size in sizes if size is not None]


def _types(text: str) -> list[str]:
    if not set(text.split(",")) <= set(TYPES):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of {' and '.join(TYPES)} with a comma")
    return text.split(",")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value


def _way(text: str) -> dict[str, int]:
    way = {}
    for part in text.split():
        name, _, number = part.partition("=")
        value = _whole(number, -1)
        if name not in WISHES or value is None:
            raise argparse.ArgumentTypeError(f"'{part}' is not NAME=NUMBER with a name among {', '.join(WISHES)}")
        way[name] = value
    if not way:
        raise argparse.ArgumentTypeError("a way is empty, expected NAME=NUMBER parts, and ; between ways")
    return way


def _ways(text: str) -> list[dict[str, int]]:
    return [_way(part) for part in text.split(";")]


def _joined(names: Sequence[object]) -> str:
    return ",".join(map(str, names))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=_sizes, default=_joined(BATCHES))
    parser.add_argument("--channel", type=_sizes, default=_joined(CHANNELS))
    parser.add_argument("--time", type=_sizes, default=_joined(TIMES))
    parser.add_argument("--dtype", type=_types, default=_joined(TYPES), help="float32, float16, or both with a comma")
    parser.add_argument("--seconds", type=_seconds, help="start no case after that many")
    parser.add_argument("--quick", action="store_true", help="two sizes, to see that it runs")
    parser.add_argument("--backward", action="store_true", help="time the gradients instead")
    parser.add_argument("--tune", action="store_true", help="time every way of sharing out instead")
    parser.add_argument(
        "--ways", type=_ways, help=f"time these instead: of {', '.join(WISHES)}, as in lanes=2 chunk=64"
    )
    options = parser.parse_args(arguments)
    if options.ways is not None and options.backward:
        parser.error("--ways is for the forward scan: leave out --backward, or take --backward --tune")
    if options.out is not None:
        try:
            if options.out.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            _part(options.out).write_text("")
            _part(options.out).unlink()
        except OSError as error:
            parser.error(f"--out is '{options.out}', expected a file to write: {error.strerror}")
    return options


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _line(result: dict[str, Any]) -> str:
    sizes = f"{result['batch']:>4} x {result['channel']:>4} x {result['time']:>4} {result['dtype']}"
    if "ranked" in result:
        shown = "; ".join(f"{r['way']} {r.get('median_us') or problem(r)}" for r in result["ranked"][:8])
        return f"{sizes}: {shown}"
    times = result.get("times", {})
    if "median_us" not in times.get("ours", {}):
        return f"{sizes}: {problem(result) or times}"
    line = f"{sizes} {result['direction']}: {times['ours']['median_us']:9.1f} us"
    if "of_copy" in result:
        line += f", {result['of_copy']:.2f} of copying"
    if "over_nothing" in result:
        line += f", {result['over_nothing']:.1f} x an empty kernel"
    if "times_faster_than_mamba_ssm" in result:
        line += f", {result['times_faster_than_mamba_ssm']:.2f} x mamba_ssm"
    if result["direction"] == "forward" and "agrees" not in result:
        line += ", held to nothing"
    return line + ("" if result.get("agrees", True) else f", OFF {result['disagreement']}")


def problem(row: dict[str, Any]) -> str | None:
    """Why a case or a way has no time, or None."""
    return next((row[k] for k in ("failed", "out_of_memory", "refused") if k in row), None)


def right(result: dict[str, Any]) -> bool:
    """Whether ours, or the rule, was timed and is near the reference, and no way failed. A way may be refused."""
    if "ranked" in result:
        rule = next((r for r in result["ranked"] if r["way"] == "the rule"), {})
        return "median_us" in rule and not any("failed" in r for r in result["ranked"])
    return "median_us" in result.get("times", {}).get("ours", {}) and bool(result.get("agrees", True))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    started = clock.monotonic()
    try:
        import scan_cuda_timing as timing
        import torch
        from machine import describe

        from hcmen.base.errors import HcmenError
    except ImportError as error:
        print(f"{error}: nothing was measured", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device: nothing was measured", file=sys.stderr)
        return 3
    try:
        timing.load_cuda_library()
        properties = torch.cuda.get_device_properties(0)
        cache = int(getattr(properties, "L2_cache_size", 64 << 20))
        bandwidth = timing.bandwidth_of_copies(cache, properties.total_memory)
    except (HcmenError, RuntimeError, timing.Lost) as error:
        print(f"nothing was measured: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    print(f"{properties.name}, L2 {cache >> 20} MiB, copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    device = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "l2_bytes": cache}
    data: dict[str, Any] = {
        "machine": describe(),
        "device": {**device, "copy_bytes_per_second": round(bandwidth)},
        "not_measured": [],
    }
    tuning = options.tune or options.ways is not None

    def measured(batch: int, channel: int, time: int, dtype: str) -> dict[str, Any]:
        case = timing.Case(batch, channel, time, dtype, cache)
        if not tuning:
            return timing.run_case(case, bandwidth, cache, options.backward)
        return {"ranked": timing.tune_backward(case) if options.backward else timing.tune(case, options.ways)}

    sizes = itertools.product(options.batch, options.channel, options.time)
    chosen = [(1, 512, 50), (16, 512, 500)] if options.quick else list(sizes)
    cases = [(*size, dtype) for dtype, size in itertools.product(options.dtype, chosen)]
    data["tuned" if tuning else "cases"] = results = []
    written = _cases(cases, measured, timing, data, results, options, started)
    if data["not_measured"]:
        print(f"{len(data['not_measured'])} cases were not measured: {data.get('lost') or 'the time was over'}")
    return 0 if written and "lost" not in data and all(map(right, results)) else 1


def _cases(
    cases: Sequence[tuple[int, int, int, str]],
    measured: Callable[[int, int, int, str], dict[str, Any]],
    timing: Any,
    data: dict[str, Any],
    results: list[dict[str, Any]],
    options: argparse.Namespace,
    started: float,
) -> bool:
    """Case after case into the results, which are written after each. False if they could not be written."""
    written = _write(options.out, data)
    for case in cases:
        names = dict(zip(("batch", "channel", "time", "dtype"), case, strict=True)) | {"state": STATE}
        late = options.seconds is not None and clock.monotonic() - started > options.seconds
        if late or "lost" in data:
            data["not_measured"].append([case[3], *case[:3]])
            continue
        notes: dict[str, Any] = {}
        try:
            timing.recover()
            result = timing.tried(notes, "why", lambda case=case: measured(*case))
        except timing.Lost as error:
            result, data["lost"] = None, str(error)
            notes.setdefault("why", {"failed": str(error)})
        results.append({**names, **(notes.get("why", {}) if result is None else result)})
        print(_line(results[-1]), flush=True)
        written = _write(options.out, data)
    return _write(options.out, data) and written


def _write(out: Path | None, data: dict[str, Any]) -> bool:
    """The result beside its place and then into it, so that half of one is never there."""
    if out is None:
        return True
    try:
        _part(out).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        _part(out).replace(out)
    except OSError as error:
        print(f"{out} cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
