"""Training in several processes: what they exchange, and how they end together.

torchrun starts one process (rank) per GPU or core and tells each its number in the environment. Every rank runs the
model on its share of a batch and gets the outputs of all others (`gather_outputs`), so that the losses see the whole
batch: an InfoNCE over a rank's share, or mixtures within it, would be another loss.

Gradients. Every rank computes the same loss of the same gathered outputs. Differentiated is the sum of these losses
over the R ranks: the backward pass of a gathering adds up what every rank wants of a row, and leaves it to the rank
that computed the row. `Ranks.average` then sums the parameters' gradients over the ranks and divides by R, and what is
left is the gradient of the one loss, for parameters behind a gathering (of which each rank has its rows' part, R-fold)
as well as for the losses' own (of which each rank has the whole).

Collective operations must come in the same order on every rank. They do, since their number depends on the
configuration and on gathered values alone; a rank without rows runs the model on another's row and gives none away.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hcmen.base.console import end_at_once
from hcmen.base.errors import BackendError, InputError, reason_of
from hcmen.training.device import choose_device

__all__ = ["Ranks", "gather_outputs", "joined", "launched"]


class Ranks:
    """The processes of a run, seen from one of them; alone, all of this does nothing.

    Attributes:
        rank: the number of this process. world: how many there are. device: where this one computes.
    """

    def __init__(self, device: torch.device | None = None, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = device or torch.device("cpu"), rank, world

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` rows are this process's (or `rank`'s): neighbouring ones, none where there are too few."""
        rank = self.rank if rank is None else rank
        size, more = divmod(count, self.world)
        start = rank * size + min(rank, more)
        return slice(start, start + size + (rank < more))

    def gather(self, x: Tensor, count: int) -> Tensor:
        """All `count` rows, in order, from this process's share `x` of them; gradients as the module says."""
        if self.world == 1:
            return x
        gathered: Tensor = _Gather.apply(x, self, count)
        return gathered

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages gradients over the processes; a parameter that has none in any of them is left without."""
        if self.world == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        missing = torch.tensor([float(p.grad is None) for p in parameters], device=self.device)
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        everything = torch.cat([*grads, missing])
        _together(dist.all_reduce, everything)
        everything /= self.world
        *grads, missing = everything.split([*map(len, grads), len(parameters)])
        for p, grad, none in zip(parameters, grads, missing.tolist(), strict=True):
            p.grad = None if none == 1.0 else grad.view_as(p)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites `tensors` with those of the first process."""
        if self.world > 1:
            for x in tensors:
                _together(dist.broadcast, x, 0)

    def agreed(self, value: Any) -> Any:
        """The `value` of the first process, on every one; it goes through pickle, between processes of one run."""
        if self.world == 1:
            return value
        values = [value]
        _together(dist.broadcast_object_list, values, 0, device=self.device)
        return values[0]

    def check_same(self, value: str, what: str) -> None:
        """Raises InputError on every process if `value` differs between them."""
        if self.world == 1:
            return
        values: list[Any] = [None] * self.world
        _together(dist.all_gather_object, values, value)
        odd = [i for i, other in enumerate(values) if other != values[0]]
        if odd:
            raise InputError(
                f"process {odd[0]} has other {what} than process 0: give every process of a run the same options and "
                "files"
            )


class _Gather(torch.autograd.Function):
    """What PyTorch has of the kind gives the same gradients (two processes: bit for bit; three: to rounding).

    But `nn.functional.all_gather` is deprecated in 2.13 and warns. What is to replace it lies in a private module, had
    another name before 2.13 and takes 1.3 to 1.5 times as long over gloo. A process that ends meanwhile is a
    RuntimeError of the backward pass in both, which nothing tells from any other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, count: int) -> Tensor:
        ctx.ranks, ctx.count = ranks, count
        shares = [ranks.share(count, rank) for rank in range(ranks.world)]
        sizes = [share.stop - share.start for share in shares]
        # Every rank sends as much as the fullest one: NCCL and gloo gather equal sizes only.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        _together(dist.all_gather, parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        _together(dist.all_reduce, total)
        return total[ctx.ranks.share(ctx.count)], None, None


def gather_outputs(ranks: Ranks, views: Sequence[Any], count: int) -> tuple[Any, ...]:
    """Each of `views`, a model's outputs, of all `count` rows of a batch, from those of this rank's share of them.

    One message for all, float32. Rows beyond the share (of a rank that has none) are dropped.
    """
    if ranks.world == 1:
        return tuple(views)
    own = ranks.share(count)
    tensors = [x for view in views for x in _tensors(view)]
    flat = torch.cat([x.reshape(len(x), -1).float() for x in tensors], dim=1)[: own.stop - own.start]
    columns = ranks.gather(flat, count).split([x[0].numel() for x in tensors], dim=1)
    whole = iter(
        (column > 0.5 if x.dtype == torch.bool else column.to(x.dtype)).reshape(count, *x.shape[1:])
        for x, column in zip(tensors, columns, strict=True)
    )
    return tuple(each_tensor(view, lambda _: next(whole)) for view in views)


def each_tensor(outputs: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """`of` every tensor of a model's outputs, in the order of `_tensors`."""
    fields = ({m: of(x) for m, x in f.items()} if isinstance(f, dict) else of(f) for f in outputs)
    return type(outputs)(*fields)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for field in outputs:
        if isinstance(field, dict):
            yield from field.values()
        else:
            yield field


def launched() -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") and "RANK" in os.environ


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of this run, on `device` (see `choose_device`): one, unless a launcher says otherwise.

    An error within the block ends all processes, the others by a BackendError at the next thing they exchange. torchrun
    names the first to fail by what is recorded for it here.

    Raises:
        BackendError: the device is not there, or the other processes cannot be reached.
    """
    if not launched():
        yield Ranks(choose_device(device))
        return
    ranks = _join(device)
    # In one of hundreds of runs on a crowded machine a finished rank ended in std::terminate, as a thread does that
    # wants Python's lock when the interpreter is on its way out; torchrun then takes the training for a failed one.
    end_at_once()
    if ranks.rank:
        # What there is to warn of is the same everywhere, and said by the first.
        warnings.simplefilter("ignore")
    try:
        yield ranks
        # Nobody takes down connections that another may still use.
        _together(dist.barrier)
    except Exception as error:
        get_error_handler().record_exception(error)
        raise
    finally:
        _leave()


def _leave() -> None:
    """Closes the connections, at which those who wait for this process are told that it has gone."""
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def _join(device: str) -> Ranks:
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        store, rank, world = next(dist.rendezvous("env://"))
    except (RuntimeError, ValueError, KeyError, StopIteration) as error:
        raise _unreachable(error) from error
    try:
        chosen = choose_device(device, local)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise _unreachable(error) from error
    return Ranks(chosen, rank, world)


def _unreachable(error: Exception) -> BackendError:
    return BackendError(
        f"the other processes of this run cannot be reached ({reason_of(error)})",
        fix="start it with torchrun, or unset RANK and WORLD_SIZE",
    )


def _together(operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Runs a collective operation; BackendError if another process has gone."""
    try:
        operation(*arguments, **options)
    except RuntimeError as error:
        # Gloo begins with a place in its sources.
        reason = re.sub(r"^\[[^]]*\] *", "", reason_of(error)).partition(". ")[0][:150]
        raise BackendError(
            f"another process of this run has ended or does not answer ({reason})",
            fix="see what stopped it, then go on with --resume",
        ) from error
