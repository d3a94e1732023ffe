"""Values per token from hidden states and a large vocabulary, with never more than a few rows of logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits that exist at once: 256 of a 32,000-word vocabulary are 33 MB in float32.
LOGIT_ROWS = 256

TokenFunction = Callable[..., Tensor]
"""(rows as a slice, their hidden states, ...) -> one value per row, each of which depends on its own row alone."""


def by_chunks(function: TokenFunction, *hidden: Tensor) -> Tensor:
    """`function` over a few rows of every tensor at a time, as one result: [m].

    A row's value depends on that row alone, so its gradient is known while its logits are still there, up to the
    factor that the backward pass brings: logits are computed once and never kept.

    Args:
        function: called with a slice and that part of each of `hidden`.
        hidden: tensors of m rows; gradients flow into these and into nothing else.
    """
    # Inside a Function gradients are off, and whether its inputs need any says nothing of the mode outside.
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in hidden)
    values: Tensor = _ByChunks.apply(function, wanted, *hidden)  # type: ignore[no-untyped-call]
    return values


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: TokenFunction, wanted: bool, *hidden: Tensor) -> Tensor:  # noqa: ANN401
        values: list[Tensor] = []
        gradients: list[tuple[Tensor, ...]] = []
        for start in range(0, len(hidden[0]), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            with torch.set_grad_enabled(wanted):
                inputs = [tensor[part].detach().requires_grad_(wanted) for tensor in hidden]
                value = function(part, *inputs)
            if wanted:
                gradients.append(torch.autograd.grad(value, inputs, torch.ones_like(value)))
            values.append(value.detach())
        ctx.save_for_backward(*(torch.cat(pieces) for pieces in zip(*gradients, strict=True)))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return None, None, *(gradient * factor[:, None].to(gradient.dtype) for gradient in ctx.saved_tensors)
