"""Scores clips with the graphs of a bundle.

    model = load("build/bundle")
    model("samples/clip.npz").score
    model(["a.npz", "b.npz"], variant="text_only")

A variant's graph is loaded when a clip first needs it; all sessions share one verified copy of the weights. Clips are
grouped by variant and run in batches; a score depends neither on the padding nor on the batch.

A predictor may be used by several threads, sent to other processes (pickled: it opens its bundle again there) and
carried across a fork: its sessions' threads stay behind in the parent, so the child lets go of the sessions and opens
its own when they are needed. CUDA does not survive a fork, and a backend on it says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from hcmen.base.bundle import Bundle, begun_again, read_bundle
from hcmen.base.clip import TEXT_TOKENS, Clip, batch_clips, clip_from_arrays, read_clip
from hcmen.base.errors import BackendError, CheckFailed, HcmenError, InputError
from hcmen.base.modalities import MODALITIES, Variant, variant_named
from hcmen.base.shared_file import SharedFile
from hcmen.base.shipped import chosen_bundle
from hcmen.media.words import Encoded, Tokenizer
from hcmen.runtime.backends import forks
from hcmen.runtime.backends.limits import check_time_limit, within
from hcmen.runtime.backends.options import Options, Ort, OrtCuda, TensorRT, backend_options
from hcmen.runtime.best import variant_of
from hcmen.runtime.compare import GRAPH_BOUNDS
from hcmen.runtime.golden import SelfTest, golden_test

if TYPE_CHECKING:
    from hcmen.runtime.backends.ort import OrtBackend, OrtSession
    from hcmen.runtime.backends.tensorrt import TrtBackend, TrtSession
    from hcmen.runtime.stream import Stream
    from hcmen.runtime.stream_buffers import Number

__all__ = ["BATCH_CLIPS", "ClipLike", "Predictor", "Result", "load"]

BATCH_CLIPS = 32
"""Most clips in one run of a graph; more gain little and cost memory."""
_GROUP_CLIPS = 256  # clips read ahead to find batch mates of the same variant

ClipLike = str | os.PathLike[str] | Clip | Mapping[str, Any]
"""A path of an .npz clip, a `Clip`, or a dict of arrays per modality; `text` there may be raw words (a str) where the
bundle has a text encoder."""
Arrays = dict[str, NDArray[Any]]
Observer = Callable[[str, Sequence[int], Arrays, Arrays], None]
"""Told of every run: variant, the places of the batch's clips among all clips given, inputs, outputs."""


@dataclass(frozen=True)
class Result:
    """The sentiment of one clip.

    name: the clip. variant: the graph that scored it. score: sentiment, in the label range of the bundle.
    modality_weights: how much the score rests on each modality, in [0, 1], summing to 1. backend: what ran. kernels:
    how the hcmen ops ran: "native", "functions" (right, but slow: no kernel library) or "standard" (none in the graph).
    ignored: what the clip carries and the variant leaves out. cleaned: modality -> values set to zero by `clean`.
    run_seconds: the graph's run, which scored batch_size clips at once. first_call: whether it was the first run of
    the graph in this process, which is slower than those after it.
    """

    name: str
    variant: str
    score: float
    modality_weights: Mapping[str, float]
    backend: str
    kernels: str
    ignored: tuple[str, ...]
    cleaned: Mapping[str, int]
    run_seconds: float
    batch_size: int
    first_call: bool = False


class Predictor:
    """A loaded bundle; call it with a clip, or with a list of clips. Several threads may, and so may a forked child.

    `close`, or the end of a `with` block, gives its memory back.

    Args:
        bundle: from `read_bundle`; its manifest is checked, its files are verified as they are loaded.
        backend: how it is run: `Ort(...)` (ONNX Runtime on the CPU), `OrtCuda(...)` (on a CUDA device), `TensorRT(...)`
            or `TensorRTRTX(...)` (engines of hcmen-compile), from `hcmen.runtime.backends`; or a name, "ort",
            "ort-cuda", "tensorrt", "tensorrt-rtx", or "auto", which is "ort".
        clean: set NaN and infinity in clips to zero, and count them, instead of refusing them.
        time_limit: seconds that loading a graph, each run of it, and reading words may take; None for no limit.
        options: those of the backend, as keywords beside its name: threads, prepack, spin, map, cuda_graph, precision,
            trust_engines, specialization.

    Raises:
        InputError: no such backend, a value out of range, or an option that the backend does not have.
        BackendError: the backend is not installed or does not work.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | Options = "auto",
        clean: bool = False,
        time_limit: float | None = None,
        **options: Any,
    ):
        chosen = backend_options(backend, options)
        self._options: dict[str, Any] = {"backend": chosen, "clean": clean, "time_limit": check_time_limit(time_limit)}
        self.bundle = bundle
        self.inputs = bundle.manifest.inputs
        self.clean = clean
        self.backend: OrtBackend | TrtBackend
        if isinstance(chosen, TensorRT):
            from hcmen.runtime.backends.tensorrt import TrtBackend

            self.backend = TrtBackend(chosen)
        else:
            if isinstance(chosen, Ort) and chosen.prepack is None and bundle.manifest.precision != "fp32":
                # float16 is widened by every session anyway, and unpacked int8 is packed at every call
                chosen = dataclasses.replace(chosen, prepack=True)
            self.backend = _ort_backend(chosen)
        self.backend.time_limit = time_limit
        self._sessions: dict[str, OrtSession | TrtSession] = {}
        self._called: dict[str, OrtSession | TrtSession] = {}
        self._weights: SharedFile | NDArray[np.uint8] | None = None
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()
        self._unusable: HcmenError | None = None
        forks.watch(self)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants of this bundle."""
        return tuple(self.bundle.manifest.variants)

    @overload
    def __call__(self, clips: ClipLike, *, variant: str = "auto") -> Result: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, clips: Sequence[ClipLike], *, variant: str = "auto") -> list[Result]: ...
    def __call__(self, clips: ClipLike | Sequence[ClipLike], *, variant: str = "auto") -> Result | list[Result]:
        """The `Result` of one clip, or the list of results of a list of clips, in their order.

        Args:
            clips: a path, a `Clip`, a dict of arrays, or a list of those.
            variant: which graph; "auto" takes the one for exactly the modalities that each clip carries, or where the
                bundle lacks it the best one that needs no others; `Result.ignored` says what was left out.

        Raises:
            InputError: a clip or the variant cannot be used, such as a variant that needs what the clip lacks.
            CorruptFileError: a clip or a file of the bundle is damaged or unsafe.
            BackendError: the backend refused to run.
            CheckFailed: a score came out as NaN or infinite.
        """
        single = isinstance(clips, (str, os.PathLike, Clip, Mapping))
        if not single and (isinstance(clips, (bytes, np.ndarray)) or not isinstance(clips, Iterable)):
            raise _no_clip(clips)
        items = [cast(ClipLike, clips)] if single else list(cast("Sequence[ClipLike]", clips))
        if not items:
            raise InputError("no clip was given, expected a clip or a list of clips that is not empty: give one")
        results = []
        for outcome in self.outcomes(items, variant=variant):
            if isinstance(outcome, HcmenError):
                raise outcome
            results.append(outcome)
        return results[0] if single else results

    def outcomes(
        self, clips: Iterable[ClipLike], *, variant: str = "auto", observe: Observer | None = None
    ) -> Iterator[Result | HcmenError]:
        """Per clip, in order, its result or what is wrong with it; one bad clip does not stop the others.

        Args:
            clips: as for a call. variant: as for a call. observe: told of every run of a graph.

        Raises:
            InputError: there is no such variant, or the bundle lacks it.
            CorruptFileError, BackendError: a graph cannot be loaded.
        """
        chosen = None if variant == "auto" else variant_named(variant)
        if chosen is not None:
            self.bundle.variant(chosen.name)
        first = 0
        group: list[ClipLike] = []
        for clip in clips:
            group.append(clip)
            if len(group) == _GROUP_CLIPS:
                yield from self._score_group(group, first, chosen, observe)
                first += len(group)
                group = []
        yield from self._score_group(group, first, chosen, observe)

    def run(self, variant: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The graph outputs of `variant` for graph inputs as `batch_clips` makes them.

        Raises:
            InputError, CorruptFileError, BackendError: the variant cannot be loaded, or refused to run.
        """
        return self._session(variant).run(inputs)

    def encode(self, text: str) -> Encoded:
        """The tokens of raw words, for a bundle that carries a text encoder and its tokenizer.

        Raises:
            InputError: the bundle has none, or the text is empty. BackendError: `tokenizers` is not installed.
            CorruptFileError: the bundle's tokenizer is damaged.
        """
        record, text_features = self.bundle.manifest.tokenizer, self.inputs.modality("text").features
        if self.inputs.text_tokens is None:
            raise InputError(
                f"{self.bundle.path}: has no text encoder and takes no words, expected text features [time, "
                f"{text_features}]: give a clip, or export a model trained with --text-encoder"
            )
        if record is None:
            raise InputError(
                f"{self.bundle.path}: has a text encoder and no tokenizer, expected {TEXT_TOKENS} [3, time]: give a "
                "clip, or export again from a checkpoint with its tokenizer.json"
            )
        where = str(self.bundle.path / record.file)
        with forks.opening(), self._lock:
            if self._unusable is not None:
                raise self._unusable
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self.bundle.read(record).tobytes(), self.inputs, where)
            read = self._tokenizer
        return within(self.backend.time_limit, lambda: read(text), where, "reading the words")

    def stream(
        self,
        variant: str = "auto",
        *,
        window: Number,
        hop: Number,
        rates: Mapping[str, Number],
        delay: Number = 0,
        patience: Number | None = None,
        live: bool = True,
    ) -> Stream:
        """Scores a live source window by window: push what comes, get the updates. All arguments: see `Stream`.

        Raises:
            InputError: a time or rate that cannot be used, such as a window longer than the model takes.
            CorruptFileError, BackendError: the named variant cannot be loaded.
        """
        from hcmen.runtime.stream import Stream

        return Stream(self, variant, window=window, hop=hop, rates=rates, delay=delay, patience=patience, live=live)

    def close(self) -> None:
        """Frees sessions and weights; calls after that are refused. Calls under way in other threads end first."""
        with self._lock:
            sessions, self._sessions = self._sessions, {}
            self._called = {}
            self._weights = self._tokenizer = None
            self._unusable = InputError(f"{self.bundle.path}: this model was closed: load it again")
        while sessions:
            _, session = sessions.popitem()
            if hasattr(session, "close"):
                session.close()
            del session
        _trim()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the bundle's place, what its manifest says, and the options: who unpickles it opens it again."""
        if isinstance(self._unusable, InputError):
            raise self._unusable
        return _reopened, (os.path.abspath(self.bundle.path), _digest(self.bundle), self._options)

    def after_fork(self) -> None:
        """In a forked child: whatever holds threads is left to the parent, and opened again when it is needed."""
        self._lock = threading.Lock()
        sessions, self._sessions = self._sessions, {}
        self._called = {}
        self._tokenizer = None
        if self.backend.name == "ort":
            return
        for session in sessions.values():
            forks.keep_for_ever(session)
        self._unusable = BackendError(
            f"{self.bundle.path}: the backend '{self.backend.name}' was opened before this process was forked, and "
            "CUDA does not survive a fork: load the model in the child, or start it with multiprocessing's 'spawn'"
        )

    def kernels(self, variant: str) -> str:
        """How the hcmen ops of `variant` run: "native", "functions" or "standard"; loads the graph if need be."""
        return self._session(variant).kernels

    def tolerance(self, variant: str) -> tuple[float, float]:
        """(atol, rtol) within which `variant` agrees with the eager model; loads it if need be."""
        return self._session(variant).tolerance

    def self_test(
        self, variants: Sequence[str] | None = None, *, atol: float | None = None, rtol: float | None = None
    ) -> Iterator[SelfTest]:
        """Runs the golden inputs of each variant (all by default) and compares with the eager model's outputs.

        Args:
            variants: which. atol, rtol: the bound; by default the one of docs/parity.md for what runs.

        Raises:
            InputError, CorruptFileError, BackendError: a variant or its golden file cannot be loaded, or did not run.
        """
        for variant in self.variants if variants is None else variants:
            session = self._session(variant)  # which may be of another bundle than before
            yield golden_test(self.bundle, variant, session, atol, rtol)

    def _session(self, variant: str) -> OrtSession | TrtSession:
        if (found := self._sessions.get(variant)) is not None:
            return found
        with forks.opening(), self._lock:
            if self._unusable is not None:
                raise self._unusable
            if variant not in self._sessions:
                self._sessions[variant] = begun_again(self.bundle, lambda b: self._open(b, variant), self._may_follow)
            return self._sessions[variant]

    def _open(self, bundle: Bundle, variant: str) -> OrtSession | TrtSession:
        if bundle is not self.bundle:
            self.bundle, self._weights = bundle, None
        if isinstance(self._options["backend"], TensorRT):
            return cast("TrtBackend", self.backend).open(bundle, variant)
        backend = cast("OrtBackend", self.backend)
        record, manifest = bundle.variant(variant), bundle.manifest
        if self._weights is None:
            chosen = self._options["backend"]  # of which only those that map have a setting for it
            shared = backend.maps_weights and (chosen.map or not bundle.others_may_write(manifest.weights))
            self._weights = SharedFile(bundle, manifest.weights) if shared else bundle.read(manifest.weights)
        where = str(bundle.path / record.graph.file)
        session = backend.session(bundle.read(record.graph).tobytes(), self._weights, manifest.weights.file, where)
        session.hold_to(record)
        if manifest.precision == "int8":
            session.tolerance = (float(record.parity["atol"]), float(record.parity["rtol"]))
        else:
            session.tolerance = GRAPH_BOUNDS[manifest.precision]
        return session

    def _may_follow(self, found: Bundle) -> bool:
        """Whether nothing has run yet, and `found` suits the clips that wait and the backend that was set up."""
        same = (found.manifest.inputs, found.manifest.precision) == (self.inputs, self.bundle.manifest.precision)
        return same and not self._sessions and self._tokenizer is None

    def _score_group(
        self, items: Sequence[ClipLike], first: int, chosen: Variant | None, observe: Observer | None
    ) -> list[Result | HcmenError]:
        outcomes: list[Result | HcmenError | None] = [None] * len(items)
        batches: dict[str, list[tuple[int, Clip]]] = {}
        for i, item in enumerate(items):
            try:
                clip = self._clip(item)
                batches.setdefault(variant_of(clip, chosen, self.bundle.manifest), []).append((i, clip))
            except HcmenError as error:
                outcomes[i] = error
        for variant, members in batches.items():
            members.sort(key=lambda member: member[1].steps)  # what is of one length needs no padding
            for start in range(0, len(members), BATCH_CLIPS):
                part = members[start : start + BATCH_CLIPS]
                places = [first + i for i, _ in part]
                scored = self._score_batch(variant, [clip for _, clip in part], places, observe)
                for (i, _), outcome in zip(part, scored, strict=True):
                    outcomes[i] = outcome
        return [o for o in outcomes if o is not None]

    def _score_batch(
        self, variant: str, clips: list[Clip], places: list[int], observe: Observer | None
    ) -> list[Result | HcmenError]:
        present = variant_named(variant).present
        session = self._session(variant)
        if self.bundle.variant(variant).parity["passed"] is not True:
            what = f"{self.bundle.path}: variant '{variant}' failed its parity check at export, its scores may be wrong"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
        inputs = batch_clips(clips, present)
        first = self._called.get(variant) is not session
        started = time.perf_counter()
        outputs = session.run(inputs)
        seconds = time.perf_counter() - started
        self._called[variant] = session
        if observe is not None:
            observe(variant, places, inputs, outputs)
        results: list[Result | HcmenError] = []
        for clip, score, weights in zip(clips, outputs["score"], outputs["modality_weights"], strict=True):
            if not (np.isfinite(score) and np.isfinite(weights).all()):
                results.append(
                    CheckFailed(
                        f"{clip.name}: variant '{variant}' gave score {score} with weights {weights.tolist()}, "
                        "expected finite numbers: check the features, then the bundle with --self-test"
                    )
                )
                continue
            results.append(
                Result(
                    name=clip.name,
                    variant=variant,
                    score=float(score),
                    modality_weights=dict(zip(MODALITIES, weights.tolist(), strict=True)),
                    backend=self.backend.name,
                    kernels=session.kernels,
                    ignored=(*(m for m in clip.present if m not in present), *clip.ignored),
                    cleaned=clip.cleaned,
                    run_seconds=seconds,
                    batch_size=len(clips),
                    first_call=first,
                )
            )
        return results

    def _clip(self, item: ClipLike) -> Clip:
        if isinstance(item, (str, os.PathLike)):
            return read_clip(item, self.inputs, self.clean)
        if isinstance(item, Clip):
            checked = clip_from_arrays(item.name, item.arrays, self.inputs, self.clean)
            return dataclasses.replace(checked, cleaned=checked.cleaned or item.cleaned, ignored=item.ignored)
        if isinstance(item, Mapping):
            if isinstance(item.get("text"), str):
                item = {**{k: x for k, x in item.items() if k != "text"}, TEXT_TOKENS: self.encode(item["text"]).tokens}
            return clip_from_arrays("clip", item, self.inputs, self.clean)
        raise _no_clip(item)


def _no_clip(item: object) -> InputError:
    return InputError(
        f"a clip is of type {type(item).__name__}, expected a path of an .npz file, a Clip, a dict of arrays per "
        "modality, or a list of those: model('clip.npz'), or model({'text': text, 'audio': audio})"
    )


def _ort_backend(options: Ort | OrtCuda) -> OrtBackend:
    if isinstance(options, OrtCuda):
        from hcmen.runtime.backends.ort_cuda import OrtCudaBackend

        return OrtCudaBackend(options)
    from hcmen.runtime.backends.ort import OrtBackend

    return OrtBackend(options)


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    backend: str | Options = "auto",
    clean: bool = False,
    time_limit: float | None = None,
    **options: Any,
) -> Predictor:
    """Opens the bundle in the folder `bundle`; graphs are loaded when they are first needed.

    Args:
        bundle: a folder that hcmen-export wrote; None takes build/bundle, or the demo's where nothing is there.
        The others: see `Predictor`.

    Raises:
        InputError: no bundle there, or an argument that cannot be used.
        CorruptFileError: its manifest is damaged or unsafe.
        BackendError: the backend is missing, or the bundle needs another version of the ops.
    """
    # Graphs are opened later, when the working directory may be another one.
    path = os.path.abspath(chosen_bundle(bundle, lambda _: None))
    return Predictor(read_bundle(path), backend=backend, clean=clean, time_limit=time_limit, **options)


def _trim() -> None:
    """Hands what the C heap has free back to the system; glibc keeps most of it otherwise."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _digest(bundle: Bundle) -> str:
    return hashlib.sha256(json.dumps(bundle.manifest.to_json(), sort_keys=True).encode()).hexdigest()


def _reopened(path: str, digest: str, options: Mapping[str, Any]) -> Predictor:
    """What a pickled predictor becomes."""
    bundle = read_bundle(path)
    if _digest(bundle) != digest:
        raise InputError(f"{path}: another bundle than the one that the pickled model had: load the model again")
    return Predictor(bundle, **options)
