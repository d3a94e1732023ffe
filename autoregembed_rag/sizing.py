"""What encoding will take: floating-point operations of a prompt, a device's speed, hours.

Only a model's configuration is read: its body is built on PyTorch's meta device, which holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig, Qwen2Config

from .config import CONFIG_NAME, AutoRegConfig
from .last_layer import restricted_parts
from .loading import ADAPTER_CONFIG, add_embed_tokens, is_hub_id, load_tokenizer, resolve_folder
from .prompt import PromptBuilder
from .weights import adapter_base, is_adapter

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "58m": partial(
        LlamaConfig,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1376,
        vocab_size=32_000,
    ),
    "qwen2.5-0.5b": partial(
        Qwen2Config,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151_936,
    ),
    "llama2-7b": partial(
        LlamaConfig,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32_000,
    ),
}
"""Models that are planned for before they are there."""

CORES_PER_GPU = 16
"""Assumed to tokenise for each GPU."""

TOKENS_PER_CORE = 245_000
"""Tokens a second that one CPU core tokenises (mini's tokenizer, passages of 72 tokens; AMD EPYC)."""

USABLE = 0.8
"""Of the memory of a machine, or of a GPU."""

GPU_UTILISATION = 0.4
"""Assumed: no GPU was measured."""

CPU_WIDTHS, CPU_UTILISATION = (320, 512, 896), (0.25, 0.52, 0.68)
"""Measured by `python -m benchmarks.encode`: the share of the matmul peak by hidden size."""


@dataclass(frozen=True)
class Device:
    """What matrix products in half precision run at, at most, in operations a second, and memory in bytes."""

    name: str
    peak: float
    memory: float | None
    source: str


_VENDOR = "its maker's figure, bfloat16, dense"
DEVICES = {
    device.name: device
    for device in (
        Device("h200", 989e12, 141e9, _VENDOR),
        Device("h100", 989e12, 80e9, _VENDOR),
        Device("a100", 312e12, 80e9, _VENDOR),
        Device("l40s", 362e12, 48e9, _VENDOR),
        Device("a10", 125e12, 24e9, _VENDOR),
        Device("l4", 121e12, 24e9, _VENDOR),
        Device("cpu", 0.2e12, None, "a core of an AMD EPYC with bfloat16 instructions, measured"),
    )
}


@dataclass(frozen=True)
class Workload:
    """What a body asks of a device for each prompt.

    Attributes:
        parameters: of the body, input embeddings included, the language-model head not.
        hidden: width of a compressed vector.
        layers: how many.
        attention_width: heads times their dimensions.
        matrices: entries of all matrices that a token is multiplied with.
        last: of these, those of the last layer that only compressed tokens go through; 0: all tokens do.
        experts: whether the body is a mixture of experts, all of which are counted here.
    """

    parameters: int
    hidden: int
    layers: int
    attention_width: int
    matrices: int
    last: int
    experts: bool = False

    @classmethod
    def of(cls, body: nn.Module, config: PretrainedConfig) -> Workload:
        """Of a body, on any device."""
        text = config.get_text_config()
        tables = {id(module.weight) for module in body.modules() if isinstance(module, nn.Embedding)}
        matrices = sum(p.numel() for p in body.parameters() if p.ndim > 1 and id(p) not in tables)
        heads = text.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in body.parameters()),
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
            matrices=matrices,
            last=sum(p.numel() for part in restricted_parts(body) for p in part.parameters() if p.ndim > 1),
            experts=any(
                getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
            ),
        )

    def products(self, tokens: int, k: int) -> int:
        """Operations of all matrix products of a prompt: a multiplication and an addition for each entry."""
        return 2 * (self.matrices * tokens - self.last * (tokens - k))

    def attention(self, tokens: int, k: int) -> int:
        """Operations of attention: scores, and sums of values, over what stands to the left."""
        whole = 2 * self.attention_width * tokens**2
        if not self.last:
            return whole * self.layers
        return whole * (self.layers - 1) + 4 * self.attention_width * k * tokens

    def operations(self, tokens: int, k: int) -> int:
        """Floating-point operations of one prompt of so many tokens, of which the last k are compressed ones."""
        return self.products(tokens, k) + self.attention(tokens, k)

    def utilisation(self, device: Device) -> float:
        """Which share of its peak the device is expected to reach."""
        if device.name != "cpu":
            return GPU_UTILISATION
        return round(float(np.interp(self.hidden, CPU_WIDTHS, CPU_UTILISATION)), 2)


@dataclass(frozen=True)
class PlannedModel:
    """A model by its configuration.

    Attributes:
        name: as it was asked for.
        workload: of its body.
        config: of its checkpoint; the defaults where there is none.
        around: tokens of a document's prompt beside the text, compressed tokens included.
        notes: what was assumed, a sentence each.
    """

    name: str
    workload: Workload
    config: AutoRegConfig
    around: int
    notes: tuple[str, ...]

    @property
    def k(self) -> int:
        """How many compressed tokens."""
        return self.config.num_compressed_tokens

    @property
    def room(self) -> int:
        """Tokens of text that fit into a prompt; the rest is cut."""
        return self.config.max_length - self.around

    def dimension(self, num_tokens: int) -> int:
        """Of an embedding of the first so many tokens."""
        return self.workload.hidden * (num_tokens if self.config.pooling == "flatten" else 1)

    @property
    def widths(self) -> list[int]:
        """Each number of tokens that an embedding can be cut to, the most last; [1] for mean pooling."""
        return list(range(1, self.k + 1)) if self.config.pooling == "flatten" else [1]


def plan_model(name: str) -> PlannedModel:
    """Read the configuration of a model: a bundled name, a folder, a hub id that is here, or one of `SHAPES`.

    Raises:
        FileNotFoundError: there is no such model here.
        ValueError: its configuration cannot be used.
    """
    if name in SHAPES:
        return _planned(name, SHAPES[name](), AutoRegConfig(), None, [])
    folder = _folder(name)
    body = _folder(adapter_base(folder)) if is_adapter(folder) else folder
    try:
        shape = AutoConfig.from_pretrained(body, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{body / 'config.json'} does not describe a model that is known: {error}"
        ) from error
    if (folder / CONFIG_NAME).is_file():
        return _planned(name, shape, AutoRegConfig.load(folder / CONFIG_NAME), folder, [])
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None) or AutoRegConfig.max_length
    config = AutoRegConfig(max_length=min(AutoRegConfig.max_length, longest))
    note = f"{name} has no {CONFIG_NAME}: {config.num_compressed_tokens} compressed tokens and the other defaults"
    return _planned(name, shape, config, folder, [note])


def _folder(name: str) -> Path:
    """Where a model's configuration is, without a download."""
    remedy = f"or a shape: {', '.join(SHAPES)}"
    if not is_hub_id(name):
        try:
            return resolve_folder(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, {remedy}") from error
    for file in ("config.json", ADAPTER_CONFIG):
        if isinstance(found := try_to_load_from_cache(name, file), str):
            return Path(found).parent
    raise FileNotFoundError(
        f"the configuration of {name!r} is not on this machine, and a plan downloads nothing: get it by "
        f"`hf download {name} config.json`, or give a bundled name, a folder, {remedy}"
    )


def _planned(
    name: str, shape: PretrainedConfig, config: AutoRegConfig, folder: Path | None, notes: list[str]
) -> PlannedModel:
    try:
        with torch.device("meta"):
            body = AutoModel.from_config(shape, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(f"{name!r} is of a kind that cannot be planned: {error}") from error
    workload = Workload.of(body, shape)
    if workload.experts:
        notes = [*notes, "a mixture of experts: all of them are counted, which is too much"]
    if folder is None or not (folder / "tokenizer.json").is_file():
        folder, notes = (
            resolve_folder("mini"),
            [*notes, "the instruction's tokens are those of mini's tokenizer"],
        )
    return PlannedModel(name, workload, config, _around(folder, config), tuple(notes))


def _around(folder: Path, config: AutoRegConfig) -> int:
    """Tokens of a document's prompt that are not its text, by the tokenizer in `folder`."""
    tokenizer = load_tokenizer(folder)
    add_embed_tokens(tokenizer, config.num_compressed_tokens)
    prompts = PromptBuilder(tokenizer, config.num_compressed_tokens, config.max_length)
    return config.max_length - prompts.max_text_tokens(config.document_instruction)
