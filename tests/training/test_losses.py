"""The losses against the paper's equations, written out in plain Python without the library's code."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_rag.losses import (
    conditional_distribution_alignment_loss,
    divergence_alignment_loss,
    information_compression_loss,
    js_divergence,
    kl_divergence,
)

RELATIVE = 1e-6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def minus_log_share(s1: float, s2s: list[float], tau: float) -> float:
    """-log( e^{S1/tau} / (e^{S1/tau} + sum_i e^{S2_i/tau}) )."""
    # Divided by the largest term above and below, so that none overflows.
    largest = max(s1, *s2s)
    denominator = sum(math.exp((s - largest) / tau) for s in (s1, *s2s))
    return math.log(denominator) - (s1 - largest) / tau


def equation_2(query_pos, self_pos, query_neg, ref_pos, ref_neg, beta, tau, sigma) -> float:
    rows = []
    for b in range(len(query_pos)):
        s1 = -sigma(beta * abs(query_pos[b] - self_pos[b]))
        s2s = [
            -sigma(beta * (query_pos[b] - ref_pos[b]) - beta * (query_neg[b][i] - ref_neg[b][i]))
            for i in range(len(query_neg[b]))
        ]
        rows.append(minus_log_share(s1, s2s, tau))
    return sum(rows) / len(rows)


def scores(seed: int, batch: int, negatives: int) -> dict:
    rng = random.Random(seed)
    row = lambda: [rng.uniform(-60, -5) for _ in range(batch)]  # noqa: E731
    table = lambda: [[rng.uniform(-60, -5) for _ in range(negatives)] for _ in range(batch)]  # noqa: E731
    return {"query_pos": row(), "self_pos": row(), "query_neg": table(), "ref_pos": row(), "ref_neg": table()}


def float64(values: dict, *, grad: bool = False) -> dict:
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=grad) for name, value in values.items()
    }


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    negatives=st.integers(1, 4),
    beta=st.floats(0.01, 1.0),
    tau=st.floats(0.05, 2.0),
    similarity=st.sampled_from([("sigmoid", sigmoid), ("log_sigmoid", log_sigmoid)]),
)
def test_alignment_loss_is_equation_2(seed, batch, negatives, beta, tau, similarity):
    name, sigma = similarity
    values = scores(seed, batch, negatives)
    expected = equation_2(**values, beta=beta, tau=tau, sigma=sigma)
    found = conditional_distribution_alignment_loss(
        **float64(values), beta=beta, temperature=tau, similarity=name
    )
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize(("similarity", "half"), [("sigmoid", 0.5), ("log_sigmoid", math.log(0.5))])
def test_s2_has_logit_zero_where_the_model_is_the_reference(similarity, half):
    values = scores(seed=1, batch=3, negatives=2)
    values["ref_pos"], values["ref_neg"] = values["query_pos"], values["query_neg"]
    values["self_pos"] = values["query_pos"]
    # Then every S is -s(0), the softmax is uniform over 1 + N, and the scores themselves do not matter.
    loss = conditional_distribution_alignment_loss(**float64(values), similarity=similarity)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-12)
    # A gap in S1 alone moves the loss by exactly what S2 = -s(0) predicts.
    values["self_pos"] = [x + 7.0 for x in values["query_pos"]]
    sigma = sigmoid if similarity == "sigmoid" else log_sigmoid
    expected = minus_log_share(-sigma(0.7), [-half, -half], 0.1)
    loss = conditional_distribution_alignment_loss(**float64(values), similarity=similarity)
    assert loss.item() == pytest.approx(expected, rel=RELATIVE)


def test_reference_is_subtracted_not_added():
    values = scores(seed=2, batch=1, negatives=1)
    shifted = dict(values, query_pos=[values["query_pos"][0] + 3], self_pos=[values["self_pos"][0] + 3])
    shifted["ref_pos"] = [values["ref_pos"][0] + 3]
    before = conditional_distribution_alignment_loss(**float64(values))
    after = conditional_distribution_alignment_loss(**float64(shifted))
    assert after.item() == pytest.approx(before.item(), rel=1e-12)


def test_negatives_share_one_softmax():
    one = scores(seed=3, batch=1, negatives=1)
    two = dict(one, query_neg=[one["query_neg"][0] * 2], ref_neg=[one["ref_neg"][0] * 2])
    loss_one = conditional_distribution_alignment_loss(**float64(one)).item()
    loss_two = conditional_distribution_alignment_loss(**float64(two)).item()
    # With odds o of one negative, one softmax gives log(1 + 2 o); a softmax for each would give 2 log(1 + o).
    odds = math.exp(loss_one) - 1
    assert loss_two == pytest.approx(math.log1p(2 * odds), rel=RELATIVE)


@pytest.mark.parametrize("similarity", ["sigmoid", "log_sigmoid"])
def test_alignment_gradients_agree_with_finite_differences(similarity):
    inputs = float64(scores(seed=4, batch=2, negatives=3), grad=True)
    loss = lambda *args: conditional_distribution_alignment_loss(*args, similarity=similarity)  # noqa: E731
    assert torch.autograd.gradcheck(loss, tuple(inputs.values()))


def test_divergence_loss_is_minus_sigmoid_in_the_same_softmax():
    pos, neg = [0.3, 2.0], [[0.5, 4.0, 0.0], [1.0, 0.1, 3.0]]
    expected = [
        minus_log_share(-sigmoid(p), [-sigmoid(n) for n in row], 0.2) for p, row in zip(pos, neg, strict=True)
    ]
    found = divergence_alignment_loss(
        torch.tensor(pos, dtype=torch.float64), torch.tensor(neg, dtype=torch.float64), temperature=0.2
    )
    assert found.item() == pytest.approx(sum(expected) / 2, rel=RELATIVE)


def test_divergence_gradients_agree_with_finite_differences():
    inputs = torch.tensor([0.3, 2.0]).double(), torch.tensor([[0.5, 4.0, 0.0], [1.0, 0.1, 3.0]]).double()
    assert torch.autograd.gradcheck(divergence_alignment_loss, tuple(x.requires_grad_() for x in inputs))
    logits = random_logits(8), random_logits(9)
    for divergence in (kl_divergence, js_divergence):
        between = lambda a, b: divergence(a.log_softmax(-1), b.log_softmax(-1))  # noqa: B023, E731
        assert torch.autograd.gradcheck(between, tuple(x.requires_grad_() for x in logits))


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def plain_kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_divergences_are_those_of_the_textbook_in_nats():
    one, other = random_logits(8).softmax(-1), random_logits(9).softmax(-1)
    middle = ((one + other) / 2).tolist()
    kl, back = (kl_divergence(a.log(), b.log()) for a, b in ((one, other), (other, one)))
    js = js_divergence(one.log(), other.log())
    for row, (p, q, m) in enumerate(zip(one.tolist(), other.tolist(), middle, strict=True)):
        assert kl[row].item() == pytest.approx(plain_kl(p, q), rel=1e-12)
        assert back[row].item() == pytest.approx(plain_kl(q, p), rel=1e-12)
        assert js[row].item() == pytest.approx((plain_kl(p, m) + plain_kl(q, m)) / 2, rel=1e-12)
    assert not torch.allclose(kl, back), "the first argument is the one that weighs"
    torch.testing.assert_close(js, js_divergence(other.log(), one.log()))
    certain = torch.tensor([[200.0, 0, 0], [0, 200.0, 0]]).log_softmax(-1)
    assert js_divergence(certain[0], certain[1]).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl_divergence(certain[0], certain[1]).item() == pytest.approx(200, rel=1e-6)
    assert kl_divergence(certain[0], certain[0]).item() == js_divergence(certain[0], certain[0]).item() == 0


@pytest.mark.parametrize("similarity", ["sigmoid", "log_sigmoid"])
def test_scores_of_long_texts_overflow_nowhere(similarity):
    """Sums over long texts differ by thousands of nats from one model to another."""
    far = {name: value * 1e3 for name, value in float64(scores(seed=10, batch=4, negatives=2)).items()}
    inputs = {name: value.float().requires_grad_() for name, value in far.items()}
    loss = conditional_distribution_alignment_loss(**inputs, similarity=similarity)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value.grad).all() for value in inputs.values())
    sigma = sigmoid if similarity == "sigmoid" else log_sigmoid
    expected = equation_2(
        **{name: value.tolist() for name, value in far.items()}, beta=0.1, tau=0.1, sigma=sigma
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_without_reduction_every_query_has_its_own_loss():
    values = float64(scores(seed=11, batch=3, negatives=2))
    each = conditional_distribution_alignment_loss(**values, reduction="none")
    alone = [
        conditional_distribution_alignment_loss(**{name: value[i : i + 1] for name, value in values.items()})
        for i in range(3)
    ]
    torch.testing.assert_close(each, torch.stack(alone))
    assert conditional_distribution_alignment_loss(**values).item() == pytest.approx(each.mean().item())
    pos, neg = torch.rand(3), torch.rand(3, 2)
    each = divergence_alignment_loss(pos, neg, reduction="none")
    alone = [divergence_alignment_loss(pos[i : i + 1], neg[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(each, torch.stack(alone))
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', not 'sum'"):
        divergence_alignment_loss(pos, neg, reduction="sum")


def test_compression_loss_is_the_mean_over_tokens_of_minus_log_p():
    rng = random.Random(5)
    logits = [[rng.gauss(0, 3) for _ in range(11)] for _ in range(7)]
    targets = [rng.randrange(11) for _ in range(7)]
    expected = 0.0
    for row, target in zip(logits, targets, strict=True):
        expected -= (row[target] - math.log(sum(math.exp(x) for x in row))) / 7
    log_probs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)[range(7), targets]
    assert information_compression_loss(log_probs).item() == pytest.approx(expected, rel=RELATIVE)
    of_targets, tokens = torch.stack([log_probs[:3].sum(), log_probs[3:].sum()]), torch.tensor([3, 4])
    assert information_compression_loss(of_targets, tokens).item() == pytest.approx(expected, rel=RELATIVE)


def test_half_precision_scores_are_computed_in_float32():
    values = {
        name: tensor.bfloat16() for name, tensor in float64(scores(seed=6, batch=2, negatives=2)).items()
    }
    wide = {name: tensor.float() for name, tensor in values.items()}
    found = conditional_distribution_alignment_loss(**values)
    assert found.dtype == torch.float32
    assert found.item() == conditional_distribution_alignment_loss(**wide).item()


def test_wrong_shapes_and_names_are_refused():
    values = float64(scores(seed=7, batch=2, negatives=2))
    with pytest.raises(ValueError, match=r"ref_neg has shape \[2, 1\], expected \[2, 2\]"):
        conditional_distribution_alignment_loss(**{**values, "ref_neg": values["ref_neg"][:, :1]})
    with pytest.raises(ValueError, match=r"self_pos has shape \[2, 1\]"):
        conditional_distribution_alignment_loss(**{**values, "self_pos": values["self_pos"][:, None]})
    with pytest.raises(ValueError, match="sigmoid, log_sigmoid"):
        conditional_distribution_alignment_loss(**values, similarity="kl")
    with pytest.raises(ValueError, match="no target tokens"):
        information_compression_loss(torch.empty(0))
