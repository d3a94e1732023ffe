"""Values of rows, a few rows at a time, with nothing kept for the backward pass but their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits that exist at once: 256 of a 32,000-word vocabulary are 33 MB in float32.
LOGIT_ROWS = 256

RowFunction = Callable[..., Tensor]
"""(some rows, those of every tensor, ...) -> one value for each of them, which depends on its own row alone."""


def by_chunks(function: RowFunction, *tensors: Tensor) -> Tensor:
    """`by_groups` over a few rows of logits at a time: `function` is called with a slice."""
    starts = range(0, len(tensors[0]), LOGIT_ROWS)
    return by_groups(function, [slice(start, start + LOGIT_ROWS) for start in starts], *tensors)


def by_groups(function: RowFunction, groups: Sequence[slice | list[int]], *tensors: Tensor) -> Tensor:
    """`function` over some rows of every tensor at a time, as one result: [m].

    A row's value depends on that row alone, so its gradient is known while what it was computed from is still there,
    up to the factor that the backward pass brings: nothing is kept but that gradient, and nothing computed twice.

    Args:
        function: called with a group and those rows of each of `tensors`.
        groups: which rows are computed together; every row in one of them.
        tensors: m rows each; gradients flow into these and into nothing else.
    """
    # Inside a Function gradients are off, and whether its inputs need any says nothing of the mode outside.
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    values: Tensor = _ByGroups.apply(function, groups, wanted, *tensors)  # type: ignore[no-untyped-call]
    return values


class _ByGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        function: RowFunction,
        groups: Sequence[slice | list[int]],
        wanted: bool,
        *tensors: Tensor,
    ) -> Tensor:
        values = tensors[0].new_empty(0)
        gradients = [torch.empty_like(tensor) for tensor in tensors] if wanted else []
        for group in groups:
            with torch.set_grad_enabled(wanted):
                parts = [tensor[group].detach().requires_grad_(wanted) for tensor in tensors]
                value = function(group, *parts)
            if not len(values):
                values = value.new_empty(len(tensors[0]))
            values[group] = value.detach()
            if wanted:
                found = torch.autograd.grad(value, parts, torch.ones_like(value))
                for gradient, part in zip(gradients, found, strict=True):
                    gradient[group] = part
        ctx.save_for_backward(*gradients)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        scaled = (g * factor.view(-1, *[1] * (g.ndim - 1)).to(g.dtype) for g in ctx.saved_tensors)
        return None, None, None, *scaled
