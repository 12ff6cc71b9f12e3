"""Where a training can be followed from elsewhere: TensorBoard, Weights & Biases, or any object of the same methods.

    loggers = Loggers({"mine": MyLogger()}, warn=print)
    loggers.start({"out": "build/run", "resumed_after": 0, ...})
    trainer.run(on_epoch=loggers.epoch)
    loggers.end(report)

A logger is no part of the training: one that raises is told of once and left out of the rest of the run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import netrc
import os
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from hcmen.base.errors import reason_of
from hcmen.base.files import read_small, write_file
from hcmen.training.outputs import TENSORBOARD, WANDB_ID

__all__ = ["LOGGERS", "Logger", "Loggers", "TensorBoard", "WeightsAndBiases", "named_loggers"]


class Logger(Protocol):
    """What follows a run."""

    def start(self, config: Mapping[str, Any]) -> None:
        """A run begins, or goes on.

        config: out, the run's folder; group, the name of the folder of several runs, else None; resumed_after, the
        epochs that were done before; kind, model, train and run, as in config.json.
        """
        ...

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is over. record: as in log.jsonl."""
        ...

    def end(self, report: Mapping[str, Any] | None) -> None:
        """The run is over. report: as in report.json; None where the run failed or was stopped."""
        ...


class Loggers:
    """Several loggers as one, which never raises.

    Args:
        loggers: by the name that a warning calls them. warn: told, once a run, of one that failed.
    """

    def __init__(self, loggers: Mapping[str, Logger], warn: Callable[[str], None]) -> None:
        self._loggers, self._warn = dict(loggers), warn
        self._following: dict[str, Logger] = {}

    def start(self, config: Mapping[str, Any]) -> None:
        """As of `Logger`."""
        self._following = dict(self._loggers)
        self._tell("start", config)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """As of `Logger`."""
        self._tell("epoch", record)

    def end(self, report: Mapping[str, Any] | None) -> None:
        """As of `Logger`; the second of two calls does nothing."""
        self._tell("end", report)
        self._following = {}

    def close(self) -> None:
        """Ends a run that has not come to its end."""
        self.end(None)

    def _tell(self, what: str, value: Mapping[str, Any] | None) -> None:
        for name, logger in list(self._following.items()):
            try:
                # A copy, since the history of a run is what it goes on from.
                getattr(logger, what)(copy.deepcopy(value))
            except Exception as error:
                del self._following[name]
                self._warn(
                    f"the log of {name} ends here ({type(error).__name__}: {reason_of(error)}); the training goes on"
                )


class TensorBoard:
    """Events in the folder `tensorboard` of the run: losses and validation by epoch, the test split at the end.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make: Any = SummaryWriter
        self._writer: Any = None
        self._epoch = 0

    def start(self, config: Mapping[str, Any]) -> None:
        """As of `Logger`. A run that goes on writes into the same folder, from its next epoch on."""
        _silence_writers()
        self._epoch = config["resumed_after"]
        self._writer = self._make(str(Path(config["out"]) / TENSORBOARD), purge_step=self._epoch + 1)
        if not self._epoch:
            self._writer.add_text("settings", f"```\n{json.dumps(config, indent=2)}\n```", 0)
            self._writer.flush()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """As of `Logger`."""
        self._epoch = record["epoch"]
        self._add(_numbers({key: value for key, value in record.items() if key not in ("epoch", "best")}))

    def end(self, report: Mapping[str, Any] | None) -> None:
        """As of `Logger`."""
        self._add(_numbers({"test": report["test"]}) if report else ())
        self._writer.close()

    def _add(self, values: Iterable[tuple[str, float]]) -> None:
        for name, value in values:
            self._writer.add_scalar(name, value, self._epoch)
        self._writer.flush()  # a run that is killed leaves what it had


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT ("hcmen" if that is not set), in the mode WANDB_MODE.

    Without a key for the server the run is offline, in the folder `wandb` of the run, and nobody is asked for one.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """As of `Logger`. A run that goes on has the name by which the server knows it."""
        out = Path(config["out"])
        known = out / WANDB_ID
        name = _known_id(known) if config["resumed_after"] else None
        if name is None:
            name = secrets.token_hex(4)
            write_file(known, f"{name}\n".encode())
        settings = self._wandb.Settings(console="off", silent=True, init_timeout=30)
        mode = _wandb_mode(settings.base_url)

        def begin(mode: str | None) -> Any:
            return self._wandb.init(
                id=name,
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "hcmen"),
                name=os.environ.get("WANDB_NAME", out.name),
                group=os.environ.get("WANDB_RUN_GROUP", config["group"]),
                dir=os.environ.get("WANDB_DIR", str(out)),
                mode=mode,
                config=dict(config),
                settings=settings,
            )

        try:
            self._run = begin(mode)
        except Exception as error:
            if mode == "offline":
                raise
            warnings.warn(
                f"W&B does not answer ({reason_of(error)}): the run is logged offline, send it with wandb sync",
                stacklevel=2,
            )
            self._wandb.teardown()  # it holds the name of the run that it could not begin
            self._run = begin("offline")

    def epoch(self, record: Mapping[str, Any]) -> None:
        """As of `Logger`."""
        self._run.log(
            dict(_numbers({k: v for k, v in record.items() if k not in ("epoch", "best")})), step=record["epoch"]
        )

    def end(self, report: Mapping[str, Any] | None) -> None:
        """As of `Logger`."""
        if report:
            self._run.summary.update(dict(_numbers({"test": report["test"]})))
        self._run.finish(exit_code=0 if report else 1)


LOGGERS: dict[str, Callable[[], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""What --log can name."""


def named_loggers(names: Iterable[str]) -> dict[str, Logger]:
    """The loggers of these names, each once.

    Raises:
        ModuleNotFoundError: the package of one is not installed.
    """
    return {name: LOGGERS[name]() for name in dict.fromkeys(names)}


def _numbers(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested objects, by their keys with `/` between."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{above}{key}", float(value)


def _silence_writers() -> None:
    """Has no thread of TensorBoard's print a traceback: what it failed with is raised by the next flush as well."""
    hook = threading.excepthook
    if getattr(hook, "silences_writers", False):
        return

    def told(failed: Any) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            hook(failed)

    told.silences_writers = True  # type: ignore[attr-defined]
    threading.excepthook = told


def _wandb_mode(server: str) -> str | None:
    """ "offline" where wandb would ask for a key; None leaves the mode to its own environment variables."""
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return None
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return None
    host = urlsplit(server).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return None
    return "offline"


def _known_id(path: Path) -> str | None:
    """What W&B knows the run by, where a run of before has written it."""
    with contextlib.suppress(OSError):
        found = re.fullmatch(rb"([0-9a-f]{8})\n", read_small(path, 9))
        return found[1].decode() if found else None
    return None
