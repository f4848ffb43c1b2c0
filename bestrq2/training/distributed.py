"""Several processes that train one model: started by torchrun, or this one alone."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bestrq2.config import ConfigError
from bestrq2.errors import BestRQError
from bestrq2.layers.conformer import ConformerBlock
from bestrq2.layers.conformer_convolution import MaskedBatchNorm
from bestrq2.layers.transformer import Block

from .rendezvous import POLL_SECONDS, agree_on_round, join_store, joining_time

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Decoding a damaged archive or finding the files of a large folder takes one rank minutes while the others wait.
PATIENCE = timedelta(hours=1)


class Ranks:
    """This process among those that train together.

    Attributes:
        rank, size: its number, and how many there are (``RANK`` and ``WORLD_SIZE`` of torchrun).
        local_rank: its number on this machine, which is also its GPU.

    Control values travel between CPUs by gloo, gradients between GPUs by NCCL.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store  # of this start of the ranks

    @classmethod
    def start(cls) -> "Ranks":
        """Join the processes that torchrun started; without torchrun, this process is the only one.

        Raises:
            ConfigError: if the environment describes the ranks only in part, or wrongly.
            TrainingError: if a rank does not come; the message says which.
        """
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        if "RANK" not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE={size} is set, but RANK is not: start the ranks by torchrun --nproc-per-node {size} -m "
                "bestrq2 train ..., or unset WORLD_SIZE to train in one process"
            )
        ranks = cls(_number("RANK", 0), size, _number("LOCAL_RANK", 0))
        if not 0 <= ranks.rank < size:
            raise ConfigError(f"RANK: expected 0..{size - 1} for WORLD_SIZE={size}, got {ranks.rank}")
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = join_store(ranks.rank, size)
        ranks._store = dist.PrefixStore(agree_on_round(store, ranks.rank, size, joining_time()), store)
        dist.init_process_group(backend, timeout=PATIENCE, store=ranks._store, rank=ranks.rank, world_size=size)
        return ranks

    @property
    def is_first(self) -> bool:
        """True if this process writes the logs and the checkpoints."""
        return self.rank == 0

    def say(self, message: str) -> None:
        """Log a message, from the first rank only."""
        if self.is_first:
            logger.info(message)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64 and the same on every rank."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def summed(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` summed over all ranks, on the CPU."""
        total = tensor.detach().to("cpu", copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gathered(self, value: float) -> list[float]:
        """``value`` of every rank, in their order."""
        return self.sum([value if rank == self.rank else 0.0 for rank in range(self.size)])

    def texts(self, text: str) -> list[str]:
        """``text`` of every rank, in their order (a collective call)."""
        if self.size == 1:
            return [text]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, text)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """Return the result of ``make()`` on the first rank; an exception there is raised on every rank."""
        if self.size == 1:
            return make()
        packet: list[Any] = [None, None]
        if self.is_first:
            try:
                packet[0] = make()
            except Exception as error:
                packet[1] = error
        dist.broadcast_object_list(packet, src=0, device=torch.device("cpu"))
        if packet[1] is not None:
            raise shared(packet[1])
        return packet[0]

    def all_agree(self, make: Callable[[], T]) -> T:
        """``make()`` of every rank on its own; if one fails, all raise the same error (a collective call).

        Raises:
            ConfigError: where one of ours was raised by another rank.
        """
        if self.size == 1:
            return make()
        problem: BestRQError | None = None
        try:
            result = make()
        except BestRQError as error:
            problem = error
        first = next(filter(None, self.texts("" if problem is None else str(problem))), None)
        if first is not None:
            raise shared(ConfigError(first) if problem is None else problem)
        return result

    def tell_end(self, error: Exception, message: str | None) -> int:
        """Print what ended this rank, unless another rank prints the same. Returns the exit code.

        Args:
            message: a sentence for the user; None for a fault of this program, whose traceback is printed.
        """
        if is_shared(error) and not self.is_first:
            self._await_first()  # torchrun ends the first rank as soon as this one has ended
        elif message is None:
            sys.excepthook(type(error), error, error.__traceback__)
        elif not message.startswith("another rank") or self._is_first_to_miss_one():
            print(f"error: {'' if self.is_first else f'rank {self.rank}: '}{message}", file=sys.stderr)
        if self.is_first and self._store is not None:
            with suppress(RuntimeError):
                self._store.set("bestrq2/told", "")
        return 1 if message is None else 2

    def _is_first_to_miss_one(self) -> bool:
        """Return True on one of the ranks that are left, and where that cannot be known."""
        try:
            return self._store is None or self._store.add("bestrq2/missed", 1) == 1
        except RuntimeError:  # it went with the first rank
            return True

    def _await_first(self) -> None:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        with suppress(RuntimeError):
            while self._store is not None and not self._store.check(["bestrq2/told"]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def shared(error: Exception) -> Exception:
    """Mark an error that every rank raises, so that the first one alone has to print it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def is_shared(error: Exception) -> bool:
    return getattr(error, "shared", False)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}: expected a number, got {text!r}") from error


def wrap_model(model: nn.Module, strategy: str, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model as this rank trains it: itself, or with gradients averaged over the ranks.

    Args:
        model: on ``device``, the same on every rank.
        strategy: "auto" and "ddp" replicate it (DistributedDataParallel); "fsdp" shards parameters, gradients and
            optimizer state, block by block (FSDP2), for models that do not fit otherwise. One rank needs neither.

    Raises:
        ConfigError: for an unknown strategy.
    """
    if strategy not in ("auto", "ddp", "fsdp"):
        raise ConfigError(f"train.strategy: expected auto, ddp or fsdp, got {strategy!r}")
    if ranks.size == 1:
        return model
    if strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (ranks.size,))
        for module in list(model.modules()):
            if isinstance(module, (Block, ConformerBlock)):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # Its outputs are read, never written in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        return model
    sync_buffers = any(isinstance(module, MaskedBatchNorm) for module in model.modules())
    replicate: Any = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in signature(replicate).parameters  # torch 2.13
    # Other buffers are constants (filters, projections, codebooks): nothing to send before each pass.
    return replicate(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": sync_buffers},
    )


def only_accumulate(model: nn.Module, last: bool) -> AbstractContextManager:
    """Context of a micro-batch: gradients are exchanged only with the ``last`` one of a step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    set_sync: Any = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks (a collective call); any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def placed_like(full: Tensor, target: Tensor) -> Tensor:
    """``full`` with the dtype, device and, if ``target`` is sharded, the sharding of ``target``."""
    full = full.to(target.device, target.dtype, copy=True)
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return full
