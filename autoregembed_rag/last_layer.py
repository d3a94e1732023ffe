"""The last layer's work for the compressed tokens alone.

Of the last hidden states only those at the k compressed tokens are read, and no later layer attends to the others. So
the last layer needs keys and values of all tokens, but queries, attention's output and the feed-forward network at k
positions of each text. Hooks on these modules take the positions out before and leave zeros elsewhere after; attention
itself, where it is PyTorch's sdpa, does the same by a function of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SDPA = "sdpa"
SDPA_AT_COLUMNS = "sdpa_at_columns"

_wanted: ContextVar[tuple[Tensor, int] | None] = ContextVar("columns [n, k], tokens of a row", default=None)


def restrict_last_layer(model: nn.Module) -> None:
    """Let `last_layer_at` restrict the last layer of a body built like Llama's, as most are; others stay whole."""
    parts = restricted_parts(model)
    if parts and not _is_restricted(parts[0]):
        layer = cast(nn.ModuleList, model.layers)[-1]
        for part in parts:
            part.register_forward_pre_hook(partial(_take, layer))
            part.register_forward_hook(partial(_put_back, layer))
        _restrict_attention(cast(nn.Module, layer.self_attn), layer)


def restricted_parts(model: nn.Module) -> list[nn.Module]:
    """The modules of the last layer that only compressed tokens need to go through; none where they stay whole."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    attention = getattr(layers[-1], "self_attn", None)
    names = ((attention, "q_proj"), (attention, "o_proj"), (layers[-1], "mlp"))
    parts = [part for owner, name in names if isinstance(part := getattr(owner, name, None), nn.Module)]
    return parts if len(parts) == len(names) else []


def _restrict_attention(attention: nn.Module, layer: nn.Module) -> None:
    config = getattr(attention, "config", None)
    if getattr(config, "_attn_implementation", None) == SDPA:
        own: Any = copy(config)  # the other layers' stays as it is
        own._attn_implementation = SDPA_AT_COLUMNS
        attention.config = own
        attention.restricted = (layer,)  # type: ignore[assignment]  # in a tuple, or it would be a part of its part


def _is_restricted(part: nn.Module) -> bool:
    """By another encoder around the same body, or before it was copied."""
    return any(getattr(hook, "func", None) is _take for hook in part._forward_pre_hooks.values())


@contextmanager
def last_layer_at(columns: Tensor, tokens: int) -> Iterator[None]:
    """Inside, in this thread, only the last hidden states at `columns` [n, k] of rows of so many `tokens` are right.

    Layers whose passes are repeated or traced (gradient checkpointing, torch.compile) are computed whole.
    """
    token = _wanted.set((columns, tokens))
    try:
        yield
    finally:
        _wanted.reset(token)


def _asked(layer: nn.Module) -> tuple[Tensor, int] | None:
    repeated = layer.training and getattr(layer, "gradient_checkpointing", False)
    return None if repeated or torch.compiler.is_compiling() else _wanted.get()


def _take(layer: nn.Module, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """[n, tokens, d] -> [n, k, d]."""
    if (asked := _asked(layer)) is None:
        return inputs
    states, *rest = inputs
    return (states.gather(1, _index(asked[0], states)), *rest)


def _put_back(layer: nn.Module, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    """[n, k, d] -> [n, tokens, d], zeros elsewhere."""
    if (asked := _asked(layer)) is None:
        return output
    columns, tokens = asked
    whole = output.new_zeros(len(output), tokens, output.shape[-1])
    return whole.scatter(1, _index(columns, output), output)


def _attend(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """sdpa with queries [n, heads, tokens, d] at the columns alone -> [n, tokens, heads, d], zeros elsewhere."""
    (layer,) = cast(tuple[nn.Module], attention.restricted)
    if (asked := _asked(layer)) is None:
        return sdpa_attention_forward(attention, query, key, value, attention_mask, **options)
    columns, tokens = asked
    if attention_mask is None:
        seen = (torch.arange(tokens, device=columns.device) <= columns[:, :, None])[:, None]
    else:
        rows = columns[:, None, :, None].expand(-1, -1, -1, tokens)
        seen = attention_mask.expand(len(columns), -1, -1, -1).gather(2, rows)
    few = query.gather(2, columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    output, _ = sdpa_attention_forward(attention, few, key, value, seen, **{**options, "is_causal": False})
    whole = output.new_zeros(len(output), tokens, *output.shape[2:])
    return whole.scatter(1, columns[:, :, None, None].expand(-1, -1, *output.shape[2:]), output), None


AttentionInterface.register(SDPA_AT_COLUMNS, _attend)


def _index(columns: Tensor, states: Tensor) -> Tensor:
    return columns[:, :, None].expand(-1, -1, states.shape[-1])
