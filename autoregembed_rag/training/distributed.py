"""Several processes that train as one: every row counts once, and weights that are sharded are visited alike by all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..encoder import AutoRegEncoder

# The number of a row that only fills a batch, so that all processes have as many.
FILLER = -1
# What transformers' Trainer does not count among a batch's labels.
UNCOUNTED = -100


class EvenRows(Sampler[int]):
    """The row numbers of `order`, then fillers until they are a multiple of `batch`, that of all processes together.

    Accelerate would fill up with rows from the start of the epoch, which would count twice.
    """

    def __init__(self, order: Any, batch: int, epoch: Callable[[], int]) -> None:  # noqa: ANN401
        """Wrap `order`, a sampler with `set_epoch`.

        Accelerate passes the epoch through its own wrappers, but not where a sharded loader goes on in the middle of
        an epoch: so it is asked for here, by `epoch`.
        """
        self.order = order
        self.batch = batch
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order) + self._fillers

    def __iter__(self) -> Iterator[int]:
        self.order.set_epoch(self.epoch())
        yield from self.order
        yield from [FILLER] * self._fillers

    @property
    def _fillers(self) -> int:
        return -len(self.order) % self.batch


def without_fillers(
    collate: Callable[[list[tuple[int, Any]]], dict[str, Any]],
) -> Callable[..., dict[str, Any]]:
    """`collate` for the real rows of a batch; where there are none, for one filler, none of whose losses count."""

    def collated(batch: list[tuple[int, Any]]) -> dict[str, Any]:
        real = [(number, row) for number, row in batch if number != FILLER]
        inputs = collate(real or batch[:1])
        if not real:
            inputs["labels"].fill_(UNCOUNTED)
        return inputs

    return collated


def is_filler(numbers: list[int]) -> bool:
    """Whether the rows with these numbers stand in for a batch without any."""
    return numbers == [FILLER]


def weights_are_sharded() -> bool:
    """Whether `accelerate launch` was told to split the model, by FSDP or DeepSpeed (ZeRO-2 splits less than that, but
    what sharded weights need does it no harm)."""
    return _says("ACCELERATE_USE_FSDP") or _says("ACCELERATE_USE_DEEPSPEED")


def check_sharding(encoder: AutoRegEncoder) -> None:
    """ValueError for what FSDP and DeepSpeed cannot train, before anything is computed."""
    if not weights_are_sharded():
        return
    if encoder.has_adapter:
        raise ValueError(
            "a LoRA adapter shares its base weights with the decoder, which FSDP and DeepSpeed would split: train it "
            "under plain torchrun (DDP), or train all weights, without LoRA"
        )
    if _says("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP version 1 is not supported: set fsdp_version to 2 in the accelerate config")
    if _says("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves every process but the first without weights, and each needs the "
            "decoder's: set it to false in the accelerate config"
        )


def _says(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def alike(groups: list[list[int]], device: torch.device) -> list[list[int]]:
    """`groups` in as many parts as the process with the fewest has: sharded weights are gathered by all processes
    together, pass by pass, so one more pass on one of them would wait for ever."""
    fewest = torch.tensor(len(groups), device=device)
    torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
    last = int(fewest) - 1
    return [*groups[:last], [row for group in groups[last:] for row in group]]


def exact_sharding(plugin: Any) -> None:  # noqa: ANN401
    """Change accelerate's FSDP settings where they would cost precision or the promises of a checkpoint.

    Gradients are summed in float32, whatever a pass computes in. State is gathered into plain files, which load in any
    number of processes; torch's sharded ones are described by a pickle that is read without `weights_only=True`.
    """
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def finite_everywhere(weights: Iterable[Tensor], accelerator: Any) -> bool:  # noqa: ANN401
    """Whether all weights are finite, on every process that holds a part of them: all of them learn it, so that none
    waits for one that stopped."""
    finite = all(bool(torch.isfinite(_own_part(weight)).all()) for weight in weights)
    return bool(accelerator.gather(torch.tensor(finite, device=accelerator.device)).all())


def _own_part(weight: Tensor) -> Tensor:
    part: Any = getattr(weight, "to_local", None)
    return weight if part is None else part()
