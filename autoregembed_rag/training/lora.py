"""LoRA: an encoder and its frozen decoder over one copy of the base model's weights.

The encoder is the base's body with an adapter switched on, the decoder the whole language model with it switched off.
The rows of `<EMBEDi>` are trained within the adapter (peft's trainable tokens), so the base keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import CONFIG_NAME, AutoRegConfig
from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..loading import (
    add_embed_tokens,
    embedding_table,
    initial_rows,
    load_model,
    load_tokenizer,
    model_arguments,
    resolve_folder,
    untrained_config,
)
from ..weights import (
    adapter_base_folder,
    attach_adapter,
    checkpoint_config,
    grow_table,
    is_adapter,
    require_peft,
)


@dataclass(frozen=True)
class LoraArguments:
    """The adapter: W x becomes W x + (alpha / rank) B A x.

    Attributes:
        rank: rows of A and columns of B.
        alpha: scale of the adapter, over `rank`.
        dropout: share of A's input that is dropped while training.
        target_modules: names of the linear layers that get one, or "all-linear".
        seed: of A's start; B starts at zero, so that a fresh adapter changes nothing.
    """

    rank: int = 32
    alpha: float = 64
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, at least 0 and below 1, not {self.dropout}")
        if not self.target_modules:
            raise ValueError('target_modules names no layer: give some, or "all-linear"')


def lora_pair(
    model: str | Path,
    arguments: LoraArguments | None = None,
    *,
    num_compressed_tokens: int = 5,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    max_length: int = 512,
) -> tuple[AutoRegEncoder, FrozenDecoder]:
    """An encoder to train and the decoder to train it with, over one copy of the base model.

    The adapter's weights are float32 whatever the base's `dtype`. Neither model may be moved or cast afterwards
    (tied embeddings would come apart), and while the decoder computes in one thread, the encoder must not in another.

    Args:
        model: a base language model (folder or hub id), or a checkpoint with an adapter, which goes on.
        arguments: of a new adapter, by default `LoraArguments()`; those of one that goes on must be its own.
        num_compressed_tokens, max_length: of a new encoder; a checkpoint has its own.
        device, dtype, attn_implementation: as in `AutoRegEncoder.from_pretrained`.

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: the model, or the base of an adapter, cannot be loaded.
        ValueError: a checkpoint of whole weights, which are not its decoder's; or other `arguments` than the adapter's.
    """
    require_peft()
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    goes_on = is_adapter(folder)
    if not goes_on:
        _check_base(folder, tokenizer.get_vocab())
    base = adapter_base_folder(folder) if goes_on else folder
    place, keywords = model_arguments(device, dtype, attn_implementation, False)
    lm = load_model(AutoModelForCausalLM, base, keywords)
    lm.to(place).requires_grad_(False)  # type: ignore[arg-type]
    body = cast(PreTrainedModel, lm.base_model)
    decoder = FrozenDecoder(lm, load_tokenizer(base), frozen=base_alone(body))
    if goes_on:
        config = checkpoint_config(folder, tokenizer.get_vocab())
        adapted = _recorded_adapter(lm, folder, arguments, config)
    else:
        ids = add_embed_tokens(tokenizer, num_compressed_tokens)
        config = untrained_config(model, folder, body, num_compressed_tokens, max_length)
        adapted = _fresh_adapter(lm, ids, len(tokenizer) - len(ids), arguments or LoraArguments(), config)
    _check_switch(body)
    return AutoRegEncoder(adapted.eval(), tokenizer, config), decoder


def base_alone(body: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context in which `body` computes what its base weights say: no adapter, no trained rows, eval mode.

    On leaving, by an exception too, everything is as it was; contexts may be nested. Parameters keep their
    `requires_grad` throughout (peft's own `disable_adapter` takes it from them, while the encoder's graph, in which
    they are leaves, is alive).
    """

    @contextmanager
    def alone() -> Iterator[None]:
        modules = [*body.modules()]
        training = [module for module in modules if module.training]
        active = [module for module in _switches(modules) if not module.disable_adapters]
        try:
            for module in training:
                module.training = False
            for module in active:
                module._disable_adapters = True
            yield
        finally:
            for module in training:
                module.training = True
            for module in active:
                module._disable_adapters = False

    return alone


def _switches(modules: list[nn.Module]) -> list[Any]:
    """The modules that peft put an adapter around: each has a switch. (A transformers model has a method so named.)"""
    return [module for module in modules if type(getattr(module, "disable_adapters", None)) is bool]


def _check_switch(body: nn.Module) -> None:
    """RuntimeError if this release of peft is not switched as `base_alone` does it."""
    switches = _switches([*body.modules()])
    with base_alone(body)():
        off = [module.disable_adapters for module in switches]
    if not off or not all(off) or any(module.disable_adapters for module in switches):
        raise RuntimeError("this release of peft cannot be switched off layer by layer: install peft 0.21")


def _check_base(folder: Path, vocabulary: dict[str, int]) -> None:
    if (folder / CONFIG_NAME).is_file() or "<EMBED0>" in vocabulary:
        raise ValueError(
            f"{folder} is a checkpoint of whole weights, which differ from its decoder's, so that the two cannot share "
            "one copy: keep the adapter in the first stage (keep_adapter) and go on from there, or train this "
            "checkpoint without LoRA"
        )


def _recorded_adapter(
    lm: PreTrainedModel, folder: Path, arguments: LoraArguments | None, config: AutoRegConfig
) -> Any:  # noqa: ANN401
    """The adapter in `folder` around the body of `lm`; `arguments` may change its dropout alone."""
    settings = require_peft().PeftConfig.from_pretrained(folder)
    settings.base_model_name_or_path = config.decoder  # it may have moved
    if arguments is not None:
        kind = settings.peft_type.value
        if (kind, settings.r, settings.lora_alpha) != ("LORA", arguments.rank, arguments.alpha):
            raise ValueError(
                f"{folder} goes on with its own adapter ({kind}, rank {settings.r}, alpha {settings.lora_alpha}), not "
                f"with rank {arguments.rank}, alpha {arguments.alpha}: give those, or leave the arguments out"
            )
        settings.lora_dropout = arguments.dropout
    with _head_kept(lm):
        return attach_adapter(cast(PreTrainedModel, lm.base_model), folder, config=settings)


def _fresh_adapter(
    lm: PreTrainedModel, ids: list[int], known: int, arguments: LoraArguments, config: AutoRegConfig
) -> Any:  # noqa: ANN401
    """A new adapter around the body of `lm`, with rows for the tokens `ids` that start from the `known` ones."""
    peft = require_peft()
    body = cast(PreTrainedModel, lm.base_model)
    rows = initial_rows(embedding_table(body)[:known], len(ids))
    targets = arguments.target_modules
    settings = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION",
        base_model_name_or_path=config.decoder,
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        trainable_token_indices=ids,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in body.modules()),
    )
    with _head_kept(lm), torch.random.fork_rng(devices=[]):  # peft draws A on the CPU
        grow_table(body, 1 + max(ids))
        torch.manual_seed(arguments.seed)
        adapted = peft.get_peft_model(body, settings)
    with torch.no_grad():
        adapted.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].copy_(rows)
    return adapted


@contextmanager
def _head_kept(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, the embedding table may grow; the head keeps its rows and, if tied, shares them with the table."""
    body = cast(PreTrainedModel, lm.base_model)
    head: Any = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    table = embedding_table(body)
    size, tied = len(table), head.weight.data_ptr() == table.data_ptr()
    yield
    body.config.vocab_size = size
    if tied:
        head.weight = nn.Parameter(embedding_table(body).data[:size], requires_grad=False)
