"""The main job, end to end: train, export the seven variants, score a clip on each, check it against PyTorch.

Run by `make demo`. Everything lands in build/: train/ (checkpoint, curves), bundle/ (what a device needs) and demo/
(the table below as text and as a picture). A training or bundle there that it did not make is never replaced. With
--ship checkpoint and bundle are put into the package as well, as the ones that commands take where a user has made
none.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hcmen.base.bundle import read_bundle, write_manifest
from hcmen.base.clip import batch_clips, read_clip
from hcmen.base.errors import HcmenError
from hcmen.base.files import write_file, writing_folder
from hcmen.base.modalities import VARIANTS, variant_named
from hcmen.base.shipped import BUNDLE, DEMO
from hcmen.base.tables import aligned
from hcmen.base.typed import as_typed, from_here
from hcmen.runtime import load

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = Path(sys.executable).parent
TIMED_RUNS = 100
TRAINED = ("checkpoint.safetensors", "config.json", "last.safetensors")
TIME_IS = f"Time: median of {TIMED_RUNS} calls after the first."
MADE = "made.json"
"""In demo/: the checkpoints that the demo made at this place, by the sha256 of their weights."""
HEADER = ("variant", "score", "eager score", "difference", "time", "graph file")


def run(*arguments: str | Path, capture: bool = False) -> str:
    """Runs one of our commands, its progress on this terminal; ends the demo with its exit code if it fails."""
    command, *rest = (from_here(a) if isinstance(a, Path) else a for a in arguments)
    print(f"\n$ {as_typed(command, *rest)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [COMMANDS / command, *rest], check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def refuse_to_lose(train: Path, bundle: Path, made: Path) -> None:
    """Ends the demo where `train` or `bundle` holds what somebody else made. made: the list of what the demo made."""
    ours = made_before(made)
    strangers = []
    if any((train / name).exists() for name in TRAINED) and checkpoint_of(train) not in ours:
        strangers.append(train)
    if bundle.is_dir() and any(bundle.iterdir()) and exported_of(bundle) not in ours:
        strangers.append(bundle)
    if strangers:
        other = f"{shlex.join([from_here(sys.executable), from_here(sys.argv[0])])} --build OTHER"
        print(
            f"error: {' and '.join(map(from_here, strangers))}: not made by the demo, which would replace it: move it "
            f"away, or let the demo write elsewhere with {other}",
            file=sys.stderr,
        )
        sys.exit(2)


def made_before(made: Path) -> set[object]:
    """The weights that the demo made; those in the package are its own as well."""
    found = {checkpoint_of(DEMO / "train")} - {None}
    with contextlib.suppress(OSError, ValueError, TypeError):
        found.update(json.loads(made.read_bytes()))
    return found


def remember(train: Path, made: Path) -> None:
    """Adds what lies in `train` now to the list of what the demo made."""
    made.parent.mkdir(parents=True, exist_ok=True)
    write_file(made, json.dumps(sorted(map(str, made_before(made) | {checkpoint_of(train)} - {None}))).encode())


def checkpoint_of(train: Path) -> object:
    """The sha256 of the weights in the folder `train`; None where there is no whole checkpoint."""
    try:
        return hashlib.sha256((train / "checkpoint.safetensors").read_bytes()).hexdigest()
    except OSError:
        return None


def exported_of(bundle: Path) -> object:
    """The sha256 of the weights that the bundle was exported from; None where nothing says."""
    try:
        return read_bundle(bundle).manifest.source.get("checkpoint_sha256")
    except (HcmenError, OSError):
        return None


def score_every_variant(clip: Path, train: Path, bundle: Path) -> list[dict[str, Any]]:
    """One row per variant: what `hcmen-run --check` says about the clip, and how long a call takes."""
    rows = []
    for variant in VARIANTS:
        answer = run(
            *("hcmen-run", clip, "--bundle", bundle, "--variant", variant.name),
            *("--check", "--checkpoint", train, "--format", "json", "--quiet"),
            capture=True,
        )
        result = json.loads(answer)["results"][0]
        rows.append(
            {
                "variant": variant.name,
                "score": result["score"],
                "eager": result["eager_score"],
                "difference": abs(result["score"] - result["eager_score"]),
                "latency_ms": latency_ms(clip, bundle, variant.name),
                "bytes": (bundle / f"{variant.name}.onnx").stat().st_size,
            }
        )
    return rows


def latency_ms(clip: Path, bundle: Path, variant: str) -> float:
    """Median milliseconds of one graph run, after one run to warm up."""
    model = load(bundle)
    inputs = batch_clips([read_clip(clip, model.inputs)], variant_named(variant).present)
    seconds = []
    for _ in range(TIMED_RUNS + 1):
        started = time.perf_counter()
        model.run(variant, inputs)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[1:])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table, as text."""
    return (
        row["variant"],
        f"{row['score']:+.4f}",
        f"{row['eager']:+.4f}",
        f"{row['difference']:.1e}",
        f"{row['latency_ms']:.2f} ms",
        f"{row['bytes'] / 1024:.0f} KiB",
    )


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table with aligned columns."""
    return "\n".join(aligned([HEADER, *map(cells, rows)]))


def as_picture(rows: list[dict[str, Any]], footer: str, path: Path) -> None:
    """The table as a picture, with the scores as bars beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 2.6), layout="constrained", dpi=140)
    names = [r["variant"] for r in rows]
    left.barh(names, [r["score"] for r in rows], color=["#33658a" if r["score"] >= 0 else "#bc4b51" for r in rows])
    left.axvline(0, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set_title("sentiment score of one clip", fontsize=10)
    left.tick_params(labelsize=9)
    left.spines[["top", "right"]].set_visible(False)
    right.axis("off")
    table = right.table([cells(r) for r in rows], colLabels=HEADER, loc="center", cellLoc="right")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.5)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if line == 0:
            cell.set_text_props(weight="bold")
        if column == 0:
            cell.set_text_props(ha="left")
    figure.suptitle(footer, fontsize=9, y=-0.02, va="top")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


_ABOUT = """# The demo's checkpoint and bundle

`train/` and `bundle/` are what `make demo` makes in build/: a small HCMEN that was trained for half a minute on a
synthetic set. Commands take them where no other was named and none was made. They show how hcmen works, and mean
nothing on real recordings; bundle/README.md has the figures. `train/clips/` holds clips to score.

Made by `samples/demo.py --ship`. Do not edit: every file has its sha256 in config.json or manifest.json.
"""


def ship(train: Path, bundle: Path, target: Path = DEMO) -> None:
    """Puts a checkpoint and its bundle into the package, whole or not at all, in place of those there."""
    from hcmen.export.card import CARD

    made = read_bundle(bundle)
    made.verify()
    report = json.loads((train / "report.json").read_text())
    with writing_folder(target) as folder:
        shutil.copytree(train / "clips", folder / "train" / "clips")
        for name in ("checkpoint.safetensors", "config.json"):
            shutil.copyfile(train / name, folder / "train" / name)
        # Where it was trained is of no use to others.
        (folder / "train" / "report.json").write_text(json.dumps({**report, "checkpoint": train.name}, indent=2) + "\n")
        (folder / "bundle" / "golden").mkdir(parents=True)
        for record in made.records():
            shutil.copyfile(bundle / record.file, folder / "bundle" / record.file)
        write_manifest(folder / "bundle", made.manifest)
        shutil.copyfile(bundle / CARD, folder / "bundle" / CARD)
        (folder / "README.md").write_text(_ABOUT)


def next_commands(clip: Path, bundle: Path) -> str:
    """What to type next, as it can be typed from here."""
    named = () if from_here(bundle) == str(BUNDLE) else ("--bundle", from_here(bundle))
    lines = [as_typed("hcmen-run", from_here(clip), *named), as_typed("hcmen-run", "--self-test", *named)]
    return "Next:    " + "\n         ".join(lines)


def main() -> None:
    """Trains, exports, runs, and writes build/demo/table.{txt,json,png}.

    Refuses, with exit code 2, to replace a training or bundle that it did not make.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where everything is written")
    parser.add_argument("--clip", type=Path, default=ROOT / "samples" / "clip.npz")
    parser.add_argument("--ship", action="store_true", help="put checkpoint and bundle into the package as well")
    arguments = parser.parse_args()
    train, bundle, demo = (arguments.build / name for name in ("train", "bundle", "demo"))

    started = time.monotonic()
    refuse_to_lose(train, bundle, demo / MADE)
    try:
        run("hcmen-train", "--preset", "tiny", "--out", train, "--force")
    finally:  # a demo that is stopped can be run again
        remember(train, demo / MADE)
    run("hcmen-export", "--checkpoint", train, "--bundle", bundle, "--force")
    rows = score_every_variant(arguments.clip, train, bundle)
    minutes = (time.monotonic() - started) / 60

    demo.mkdir(parents=True, exist_ok=True)
    text = as_text(rows)
    largest = max(r["difference"] for r in rows)
    footer = (
        f"{arguments.clip.name} on ONNX Runtime, checked against eager PyTorch: largest difference {largest:.1e}. "
        f"{TIME_IS}\n"
        f"All graphs share weights.bin, {(bundle / 'weights.bin').stat().st_size / 1024:.0f} KiB. "
        f"Training, export and runs took {minutes:.1f} min."
    )
    (demo / "table.txt").write_text(f"{text}\n\n{footer}\n")
    (demo / "table.json").write_text(json.dumps({"schema_version": 1, "rows": rows, "minutes": minutes}, indent=2))
    as_picture(rows, footer, demo / "table.png")
    print(f"\n{text}\n\n{footer}\nPicture: {from_here(demo / 'table.png')}\n{next_commands(arguments.clip, bundle)}")
    if arguments.ship:
        ship(train, bundle)
        print(f"Shipped: {from_here(DEMO)}")


if __name__ == "__main__":
    main()
