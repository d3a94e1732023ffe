"""The paper's two objectives and the variants of its appendix B, as functions of log-probabilities.

Everything here is computed in float32 or wider, whatever comes in.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["sigmoid", "log_sigmoid"]
Divergence = Literal["kl", "js"]
Reduction = Literal["mean", "none"]

_SIGMA = {"sigmoid": torch.sigmoid, "log_sigmoid": F.logsigmoid}


def information_compression_loss(log_probs: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """L_IC (section 3.2): minus the mean of log p(d_t | d_<t, e) over all target tokens.

    Args:
        log_probs: log p of every target token, or its sum over the tokens of each target; any shape, no padding.
        num_tokens: how many tokens each entry is the sum of, of the same shape; None: one each.

    Returns:
        A scalar. ValueError if there is no token.
    """
    count = log_probs.numel() if num_tokens is None else int(num_tokens.sum())
    if count == 0:
        raise ValueError("no target tokens: every target must have at least one token")
    return -wide(log_probs).sum() / count


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
    reduction: Reduction = "mean",
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
        reduction: "mean" over the batch, or "none" for every query's own loss.

    Returns:
        A scalar, or [B].
    """
    if similarity not in _SIGMA:
        raise ValueError(f"similarity must be one of {', '.join(_SIGMA)}, not {similarity!r}")
    batch, negatives = query_neg.shape
    _check_shapes({"query_pos": query_pos, "self_pos": self_pos, "ref_pos": ref_pos}, (batch,))
    _check_shapes({"ref_neg": ref_neg}, (batch, negatives))
    query_pos, self_pos, query_neg = wide(query_pos), wide(self_pos), wide(query_neg)
    ref_pos, ref_neg = wide(ref_pos), wide(ref_neg)
    sigma = _SIGMA[similarity]
    s1 = -sigma(beta * (query_pos - self_pos).abs())
    s2 = -sigma(beta * (query_pos - ref_pos)[:, None] - beta * (query_neg - ref_neg))
    return _reduced(_contrast(s1, s2, temperature), reduction)


def divergence_alignment_loss(
    pos_divergence: Tensor, neg_divergence: Tensor, *, temperature: float = 0.1, reduction: Reduction = "mean"
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
        reduction: "mean" over the batch, or "none" for every query's own loss.

    Returns:
        A scalar, or [B].
    """
    _check_shapes({"pos_divergence": pos_divergence}, (neg_divergence.shape[0],))
    s1, s2 = -torch.sigmoid(wide(pos_divergence)), -torch.sigmoid(wide(neg_divergence))
    return _reduced(_contrast(s1, s2, temperature), reduction)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension: [..., vocabulary] twice -> [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence in nats, at most log 2, as `kl_divergence` takes and gives it."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}


def _contrast(s1: Tensor, s2: Tensor, temperature: float) -> Tensor:
    """-log softmax of the positive among 1 + N: [B]."""
    logits = torch.cat([s1[:, None], s2], dim=1) / temperature
    return -F.log_softmax(logits, dim=1)[:, 0]


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
    return losses.mean() if reduction == "mean" else losses


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it comes so."""
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
