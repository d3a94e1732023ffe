"""Small training runs, for one process or for several: `torchrun distributed_runs.py WHAT BASE FOLDER`.

What each run measured is left in FOLDER/NAME.json and, for its weights and first gradients, beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training import checkpoints
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.lora import LoraArguments, lora_pair
from autoregembed_rag.training.reference import ReferenceStore
from autoregembed_rag.training.trainer import StageTrainer

GLOBAL_BATCH = 8
WORDS = ["fox", "dog", "river", "bank", "text", "vector", "answer", "question", "lemon", "green", "hundred"]
# Contexts of 2 to 120 words, so that a batch has several groups of length; targets of 3 to 60, longest where contexts
# are shortest. 22 rows: the last batch has 6, of which the first process gets 4.
COMPRESSION = [
    CompressionRow(
        " ".join(WORDS[(i + j) % 11] for j in range(2 + (i * 37) % 50)),
        "Say it again.",
        " ".join(WORDS[(i * j) % 11] for j in range(3 + (i * 53) % 40)),
    )
    for i in range(22)
]
# 19 rows: the last batch has 3, and the second process none of them.
ALIGNMENT = [
    AlignmentRow(
        f"Where is the {WORDS[i % 11]}, number {i}?",
        f"The {WORDS[i % 11]} is near {'the river and ' * (i * 29 % 9)}the {WORDS[(i + 3) % 11]} {i}.",
        (f"No {WORDS[i % 11]} here, only {i} of {'any ' * (i % 5)}{WORDS[(i + 5) % 11]}.",),
    )
    for i in range(19)
]


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def settings(accumulated: int = 1, **changes: Any) -> dict[str, Any]:
    """Plain SGD over the same global batch in any number of processes."""
    plain = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "learning_rate": 0.05,
        "batch_size": GLOBAL_BATCH // processes() // accumulated,
        "gradient_accumulation_steps": accumulated,
        "epochs": 100,
        "max_steps": 10,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": None,
    }
    return {**plain, **changes}


def load(base: Path) -> tuple[AutoRegEncoder, FrozenDecoder]:
    encoder = AutoRegEncoder.from_base(base, 3, device="cpu", dtype="float32")
    return encoder, FrozenDecoder.from_pretrained(base, device="cpu", dtype="float32")


def compress(
    base: Path, output: Path, rows: list[CompressionRow] = COMPRESSION, **changes: Any
) -> AutoRegEncoder:
    return train_compression(*load(base), rows, output, CompressionArguments(**settings(**changes)))


def align(base: Path, output: Path, **changes: Any) -> AutoRegEncoder:
    return train_alignment(*load(base), ALIGNMENT, output, AlignmentArguments(**settings(**changes)))


def adapt(base: Path, output: Path) -> AutoRegEncoder:
    encoder, decoder = lora_pair(
        base, LoraArguments(rank=4), num_compressed_tokens=3, device="cpu", dtype="float32"
    )
    arguments = CompressionArguments(**settings(learning_rate=0.005))
    return train_compression(encoder, decoder, COMPRESSION, output, arguments)


Run = Callable[[Path, Path], AutoRegEncoder]
RUNS: dict[str, Run] = {
    "compression": compress,
    "accumulated": lambda base, output: compress(base, output, accumulated=2),
    "sigmoid": lambda base, output: align(base, output),
    "kl": lambda base, output: align(base, output, similarity="kl"),
    "recomputed": lambda base, output: align(base, output, gradient_checkpointing=True, max_steps=3),
    "few": lambda base, output: compress(base, output, COMPRESSION[:3], max_steps=2),
    "bf16": lambda base, output: compress(base, output, bf16=True, max_steps=1),
}


def adam(base: Path, output: Path) -> AutoRegEncoder:
    """The defaults: three steps an epoch, and a checkpoint in the middle of the second."""
    defaults = {"optim": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 3e-3, "max_grad_norm": 1.0}
    return compress(base, output, **defaults, accumulated=2, save_steps=4, max_steps=8)


def measure(name: str, run: Run, base: Path, folder: Path) -> None:
    """Leave the losses, the first gradients and the weights of a run in `folder`."""
    added, add = [], ReferenceStore.add
    ReferenceStore.add = lambda self, pairs, scores: added.append(len(pairs)) or add(self, pairs, scores)
    with first_gradients() as (gradients, sharded):
        encoder = run(base, folder / name)
    ReferenceStore.add = add
    if rank() == 0:
        save_file(gradients, folder / f"{name}-gradients.safetensors")
        weights = {key: value.contiguous() for key, value in encoder.model.state_dict().items()}
        save_file(weights, folder / f"{name}-weights.safetensors")
    record = {"reference": sum(added), "losses": losses(folder / name), "sharded": all(sharded)}
    (folder / f"{name}-{rank()}.json").write_text(json.dumps(record))


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "training.json").read_text())["losses"]]


@contextmanager
def first_gradients() -> Iterator[tuple[dict[str, torch.Tensor], list[bool]]]:
    """What the optimizer sees in its first step, by the number of the parameter, and whether that was split."""
    found: dict[str, torch.Tensor] = {}
    sharded: list[bool] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not found:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            sharded.extend(isinstance(weight.grad, DTensor) for weight in weights)
            for number, weight in enumerate(weights):
                whole = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
                found[str(number)] = whole.detach().clone()

    handle = register_optimizer_step_pre_hook(look)
    yield found, sharded
    handle.remove()


@contextmanager
def interrupted(at_step: int) -> Iterator[None]:
    """Break off whatever trains inside before step `at_step` + 1, in every process."""
    step = StageTrainer.training_step

    def breaking(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= at_step:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    StageTrainer.training_step = breaking
    try:
        yield
    except KeyboardInterrupt:
        # As in a process that begins: the run stopped in the middle of a batch that it accumulates.
        GradientState._reset_state()
    finally:
        StageTrainer.training_step = step


def resume(base: Path, folder: Path) -> None:
    """A run that is never interrupted, and one that is and goes on."""
    measure("whole", adam, base, folder)
    with interrupted(6):
        adam(base, folder / "broken")
    if rank() == 0:
        left = sorted(path.relative_to(folder / "broken").as_posix() for path in folder.glob("broken/*/*"))
        (folder / "left.json").write_text(json.dumps(left))
    PartialState().wait_for_everyone()
    measure("broken", adam, base, folder)


def poisoned(base: Path, folder: Path) -> None:
    """In the third step, the second process alone finds a loss that is not finite."""
    encoder, decoder = load(base)
    scores, calls = decoder.target_log_probs, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = scores(*args, **kwargs)
        return found * float("nan") if rank() and len(calls) > 2 else found

    decoder.target_log_probs = broken
    train_compression(encoder, decoder, COMPRESSION, folder / "out", CompressionArguments(**settings()))


@contextmanager
def late_look() -> Iterator[None]:
    """The second process is still looking into the output folder when the first has done so."""
    newest = checkpoints.newest_checkpoint

    def late(output: Path) -> Path | None:
        time.sleep(0.5 * rank())
        return newest(output)

    checkpoints.newest_checkpoint = late
    yield
    checkpoints.newest_checkpoint = newest


def refused_adapter(base: Path, folder: Path) -> None:
    try:
        adapt(base, folder / "lora")
    except ValueError as error:
        (folder / "refused.txt").write_text(str(error))


def fsdp_without_gpus() -> None:
    """Accelerate shards over GPUs only: let it take these processes for some, with the CPU as their device."""
    initialise = AcceleratorState.__init__

    def sharded(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = sharded


def main(what: str, base: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    if what == "nan":
        poisoned(base, folder)
        return
    if what == "fsdp":
        fsdp_without_gpus()
        refused_adapter(base, folder)
    else:
        measure("lora", adapt, base, folder)
    for name, run in RUNS.items():
        with late_look() if name == "few" else nullcontext():
            measure(name, run, base, folder)
    resume(base, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
