"""by_chunks: the values and gradients of the plain function, with a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from autoregembed_rag import AutoRegEncoder, FrozenDecoder, chunked
from autoregembed_rag.chunked import by_chunks
from autoregembed_rag.losses import js_divergence, kl_divergence

ROWS, HIDDEN, VOCABULARY = 11, 8, 37


class Head:
    """A frozen output embedding, and what is computed from it for every row."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
        self.factor = torch.randn(ROWS, generator=generator, dtype=torch.float64)

    def log_probs(self, part: slice, states: Tensor) -> Tensor:
        return -F.cross_entropy((states @ self.weight.T).double(), self.targets[part], reduction="none")

    def divergences(self, _: slice, one: Tensor, other: Tensor) -> Tensor:
        log_p, log_q = ((states @ self.weight.T).double().log_softmax(-1) for states in (one, other))
        return kl_divergence(log_p, log_q) + js_divergence(log_p, log_q)


def states(seed: int, *, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


@pytest.fixture(params=[1, 2, 7, ROWS, ROWS + 1])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunked, "LOGIT_ROWS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("rows_at_once")
def test_values_and_gradients_are_those_of_the_plain_function():
    head, hidden = Head(), states(1)
    plain = head.log_probs(slice(None), hidden)
    found = by_chunks(head.log_probs, hidden)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    # A factor for every row: the gradient known in the forward pass is scaled row by row.
    (expected,) = torch.autograd.grad(plain @ head.factor, hidden)
    (gradient,) = torch.autograd.grad(found @ head.factor, hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("rows_at_once")
def test_two_tensors_are_cut_alike_and_each_gets_its_own_gradient():
    head, hidden = Head(), (states(1), states(2))
    plain = head.divergences(slice(None), *hidden)
    found = by_chunks(head.divergences, *hidden)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(plain @ head.factor, hidden)
    gradients = torch.autograd.grad(found @ head.factor, hidden)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*gradients), "the two are not interchangeable"


def test_gradients_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "LOGIT_ROWS", 4)
    head = Head()
    assert torch.autograd.gradcheck(lambda hidden: by_chunks(head.log_probs, hidden), (states(1),))
    both = lambda one, other: by_chunks(head.divergences, one, other)  # noqa: E731
    assert torch.autograd.gradcheck(both, (states(1), states(2)))


def test_gradients_reach_only_the_tensors_that_want_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "LOGIT_ROWS", 4)
    head = Head()
    head.weight.requires_grad_()
    one, other = states(1), states(2, grad=False)
    by_chunks(head.divergences, one, other).sum().backward()
    assert one.grad is not None
    assert one.grad.abs().max() > 0
    assert other.grad is None
    assert head.weight.grad is None, "what the function reads besides is a constant"
    assert not by_chunks(head.log_probs, other).requires_grad


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_are_the_same_values_and_no_gradient_is_computed(mode, monkeypatch):
    head, hidden = Head(), states(1)
    expected = head.log_probs(slice(None), hidden).detach()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient nobody asked for"))
    with mode():
        for given in (hidden, hidden * 1):
            found = by_chunks(head.log_probs, given)
            assert not found.requires_grad
            torch.testing.assert_close(found.clone(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_errs_no_more_than_the_plain_function(dtype, monkeypatch):
    monkeypatch.setattr(chunked, "LOGIT_ROWS", 4)
    head, hidden = Head(torch.float32), states(1, dtype=dtype)
    exact_hidden = states(1, dtype=dtype).detach().double().requires_grad_()
    exact = Head().log_probs(slice(None), exact_hidden)
    (exact_gradient,) = torch.autograd.grad(exact @ head.factor, exact_hidden)

    def log_probs(part: slice, part_states: Tensor) -> Tensor:
        return -F.cross_entropy(
            F.linear(part_states, head.weight).float(), head.targets[part], reduction="none"
        )

    errors = {}
    for name in ("plain", "chunked"):
        with torch.autocast("cpu", torch.bfloat16):
            values = log_probs(slice(None), hidden) if name == "plain" else by_chunks(log_probs, hidden)
        assert values.dtype == torch.float32
        (gradient,) = torch.autograd.grad(values @ head.factor.float(), hidden)
        assert gradient.dtype == dtype
        errors[name] = ((values - exact).norm().item(), (gradient - exact_gradient).norm().item())
    assert errors["plain"][0] > 1e-4, "the product is in bfloat16"
    assert errors["chunked"][0] == pytest.approx(errors["plain"][0], rel=1e-6)
    assert errors["chunked"][1] < 2 * errors["plain"][1]


class LogitWatch(TorchDispatchMode):
    """Remembers every tensor of vocabulary width that an operation makes, and the most rows that lived at once."""

    def __init__(self, vocabulary: int, weights: list[Tensor]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.storages: list[tuple[StorageWeakRef, int]] = []
        self.rows = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self._saw(tensor)
        return out

    def _saw(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.weights:
            return
        rows = tensor.numel() // self.vocabulary
        self.rows += rows
        self.most = max(self.most, rows)
        self.storages.append((StorageWeakRef(storage), rows))

    def alive(self) -> int:
        """Rows of vocabulary width in memory now, each tensor's storage once."""
        return sum({ref.cdata: rows for ref, rows in self.storages if not ref.expired()}.values())


@contextmanager
def watching(decoder: FrozenDecoder) -> Iterator[LogitWatch]:
    weight = decoder.model.get_output_embeddings().weight
    with LogitWatch(len(weight), [*decoder.parameters()]) as watch:
        yield watch


LIMIT = 8
KINDS = ["log_probs", "kl", "js"]


def score(decoder: FrozenDecoder, kind: str, given: Tensor, targets: list[list[int]]) -> Tensor:
    if kind == "log_probs":
        return decoder.target_log_probs(given, targets)
    divergence = {"kl": kl_divergence, "js": js_divergence}[kind]
    return decoder.target_divergences(given, given.flip(0), targets, divergence)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_of_logits_exist_at_once_and_none_is_kept_for_the_backward_pass(
    kind, decoder: FrozenDecoder, encoder: AutoRegEncoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunked, "LOGIT_ROWS", LIMIT)
    given = torch.from_numpy(encoder.compress(["a", "fox", "lemon", "river"])).requires_grad_()
    targets = [[5] * 30, [6] * 3, [7] * 25, [8]]
    tokens = sum(map(len, targets))
    with watching(decoder) as watch:
        values = score(decoder, kind, given, targets)
        assert watch.rows >= tokens, "the watch sees the logits"
        assert watch.most <= LIMIT
        assert watch.alive() == 0, "logits outlive the forward pass"
        seen = watch.rows
        values.sum().backward()
        assert watch.rows == seen, "logits are computed once"
    assert given.grad is not None


def test_the_watch_sees_whole_logits_where_they_are_kept(decoder: FrozenDecoder, encoder: AutoRegEncoder):
    """Against the plain computation the test above would fail."""
    given = torch.from_numpy(encoder.compress(["a", "fox"])).requires_grad_()
    with watching(decoder) as watch:
        losses = decoder.model(inputs_embeds=given).logits.log_softmax(-1)[..., 0]
        assert watch.most == 2 * 5
        assert watch.alive() >= 2 * 5
    assert losses.requires_grad
