"""The paper's two objectives and the variants of its appendix B, as functions of log-probabilities.

Everything here is computed in float32 or wider, whatever comes in.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["sigmoid", "log_sigmoid"]

_SIGMA = {"sigmoid": torch.sigmoid, "log_sigmoid": F.logsigmoid}


def information_compression_loss(token_log_probs: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """L_IC (section 3.2): minus the mean of log p(d_t | d_<t, e) over all target tokens.

    Args:
        token_log_probs: one log-probability per target token, any shape, no padding among them.
        num_tokens: what to divide by instead of their number, e.g. the tokens of all accumulated batches.

    Returns:
        A scalar. ValueError if there is no token.
    """
    if token_log_probs.numel() == 0:
        raise ValueError("no target tokens: every target must have at least one token")
    total = -_wide(token_log_probs).sum()
    return total / (token_log_probs.numel() if num_tokens is None else num_tokens)


def conditional_distribution_alignment_loss(
    query_pos: Tensor,
    self_pos: Tensor,
    query_neg: Tensor,
    ref_pos: Tensor,
    ref_neg: Tensor,
    *,
    beta: float = 0.1,
    temperature: float = 0.1,
    similarity: Similarity = "sigmoid",
) -> Tensor:
    """L_CDA (equation 2): one softmax over the positive and the N negatives of every query.

        S1 = -s(beta |query_pos - self_pos|)
        S2 = -s(beta (query_pos - ref_pos) - beta (query_neg - ref_neg))
        L  = -log( exp(S1 / tau) / (exp(S1 / tau) + sum_i exp(S2_i / tau)) )

    with s the sigmoid, or its logarithm (appendix B, with the paper's signs). Where the model is the reference,
    the argument of s in S2 is 0.

    Args:
        query_pos: log p(d+ | e_q,next), shape [B].
        self_pos: log p(d+ | e_d+,self), shape [B].
        query_neg: log p(d_i- | e_q,next), shape [B, N].
        ref_pos: log p_ref(d+ | e_q,next), shape [B]; the model as stage 2 starts.
        ref_neg: log p_ref(d_i- | e_q,next), shape [B, N].
        beta: scale of differences of log-probabilities.
        temperature: tau.
        similarity: "sigmoid" (equation 2) or "log_sigmoid" (appendix B).

    Returns:
        The mean over the batch, a scalar.
    """
    if similarity not in _SIGMA:
        raise ValueError(f"similarity must be one of {', '.join(_SIGMA)}, not {similarity!r}")
    batch, negatives = query_neg.shape
    _check_shapes({"query_pos": query_pos, "self_pos": self_pos, "ref_pos": ref_pos}, (batch,))
    _check_shapes({"ref_neg": ref_neg}, (batch, negatives))
    query_pos, self_pos, query_neg = _wide(query_pos), _wide(self_pos), _wide(query_neg)
    ref_pos, ref_neg = _wide(ref_pos), _wide(ref_neg)
    sigma = _SIGMA[similarity]
    s1 = -sigma(beta * (query_pos - self_pos).abs())
    s2 = -sigma(beta * (query_pos - ref_pos)[:, None] - beta * (query_neg - ref_neg))
    return _contrast(s1, s2, temperature)


def divergence_alignment_loss(
    pos_divergence: Tensor, neg_divergence: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """L_CDA with a divergence between whole next-token distributions (KL and JS of appendix B).

    S = -sigmoid(D) with D the mean over a document's tokens of the divergence between
    p(. | d_<t, e_d,self), the first argument of KL, and p(. | d_<t, e_q,next), on the same prefix of the same
    document: d+ for S1, each d_i- for S2. The formula as printed pairs prefixes of d- with those of d+, which is
    undefined where their lengths differ. No reference model is needed.

    Args:
        pos_divergence: D for d+, shape [B].
        neg_divergence: D for each d_i-, shape [B, N].
        temperature: tau.

    Returns:
        The mean over the batch, a scalar.
    """
    _check_shapes({"pos_divergence": pos_divergence}, (neg_divergence.shape[0],))
    return _contrast(
        -torch.sigmoid(_wide(pos_divergence)), -torch.sigmoid(_wide(neg_divergence)), temperature
    )


def _contrast(s1: Tensor, s2: Tensor, temperature: float) -> Tensor:
    """-log softmax of the positive among 1 + N, averaged over the batch."""
    logits = torch.cat([s1[:, None], s2], dim=1) / temperature
    return -F.log_softmax(logits, dim=1)[:, 0].mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
