"""What the stages minimise, against the paper's equations computed one pair at a time in float64.

The plain side runs the language models whole, on one prompt and one text, and does the rest in Python's own floats:
none of the library's prompts, chunks, batches or losses. GPT-2 is the model because it computes in float64 throughout
(a Llama's norms are always in float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_base
from torch import Tensor, nn

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.losses import information_compression_loss
from autoregembed_rag.training import alignment, compression
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.data import AlignmentRow, CompressionRow, alignment_rows
from autoregembed_rag.training.negatives import Negatives
from autoregembed_rag.training.stage import Stage
from autoregembed_rag.training.trainer import Compressor

K = 3
BETA, TAU = 0.15, 0.4
# Reference scores are kept in float32, which alone stands between the two sides' values.
STORED = 1e-6

# Two rows share a query, two a positive, two are the same; a text is one row's positive and another's negative.
ALIGNMENT = [
    AlignmentRow(
        "Where is the fox?", "The fox is near the river.", ("No lemon.", "The bank reads.", "A dog")
    ),
    AlignmentRow("Where is the fox?", "The fox jumps over the lazy dog.", ("A lemon", "Oranges.")),
    AlignmentRow("Where is the dog?", "The fox jumps over the lazy dog.", ("The fox is near the river.",)),
    AlignmentRow("What is found in oranges, lemons?", "Vitamin C.", ("No answer at all, only a text.",)),
    AlignmentRow(
        "Where is the fox?", "The fox is near the river.", ("No lemon.", "The bank reads.", "A dog")
    ),
    AlignmentRow("Who writes the answer?", "A reader writes the answer.", ()),
]
COMPRESSION = [
    CompressionRow("The fox is near the river.", "Say it again.", "The fox is near the river."),
    CompressionRow(
        "Vitamin C", "What is it found in?", "Oranges, lemons and green peppers, 100 grams at a time."
    ),
    CompressionRow("The fox is near the river.", "Say it again.", "river"),
]


class Plain:
    """The models, one prompt and one text at a time."""

    def __init__(self, encoder: AutoRegEncoder, decoder: FrozenDecoder) -> None:
        self.encoder = encoder
        self.lm = decoder.model
        self.tokenizer = encoder.tokenizer
        self.compress = cache(self._compress)
        self.log_probs = cache(self._log_probs)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def target(self, text: str) -> list[int]:
        return [*self.ids(text), self.tokenizer.eos_token_id]

    @torch.no_grad()
    def _compress(self, text: str, instruction: str) -> Tensor:
        compressed = self.tokenizer.convert_tokens_to_ids([f"<EMBED{i}>" for i in range(K)])
        prompt = [self.tokenizer.bos_token_id, *self.ids(text), *self.ids(f"\n{instruction}\n"), *compressed]
        return self.encoder.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -K:]

    @torch.no_grad()
    def _log_probs(self, text: str, instruction: str, target: str) -> np.ndarray:
        """log p(. | d_<t, e_text,instruction) for every t: [T + 1, vocabulary]."""
        read = self.lm.get_input_embeddings()(torch.tensor(self.target(target)[:-1], dtype=torch.long))
        states = torch.cat([self.compress(text, instruction), read])
        logits = self.lm(inputs_embeds=states[None]).logits[0, K - 1 :].numpy()
        assert logits.dtype == np.float64
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def score(self, text: str, instruction: str, target: str, *, mean: bool = False) -> float:
        """log p(target | e_text,instruction), or its mean over the tokens."""
        ids = self.target(target)
        values = [
            row[token] for row, token in zip(self.log_probs(text, instruction, target), ids, strict=True)
        ]
        return math.fsum(values) / (len(ids) if mean else 1)

    def next(self, query: str, target: str, *, mean: bool = False) -> float:
        return self.score(query, self.encoder.config.query_instruction, target, mean=mean)

    def self(self, document: str, *, mean: bool = False) -> float:
        return self.score(document, self.encoder.config.document_instruction, document, mean=mean)

    def divergence(self, query: str, document: str, kind: str) -> float:
        """Mean over the document's tokens of D(p(. | d_<t, e_d,self), p(. | d_<t, e_q,next))."""
        config = self.encoder.config
        log_p = self.log_probs(document, config.document_instruction, document)
        log_q = self.log_probs(query, config.query_instruction, document)
        p, q = np.exp(log_p), np.exp(log_q)
        if kind == "kl":
            return float((p * (log_p - log_q)).sum(axis=1).mean())
        log_m = np.log((p + q) / 2)
        return float(((p * (log_p - log_m)).sum(axis=1) / 2 + (q * (log_q - log_m)).sum(axis=1) / 2).mean())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return math.log(sigmoid(x))


def minus_log_share(s1: float, s2s: list[float]) -> float:
    total = math.exp(s1 / TAU) + math.fsum(math.exp(s2 / TAU) for s2 in s2s)
    return -math.log(math.exp(s1 / TAU) / total)


def plain_loss(
    now: Plain, start: Plain, row: AlignmentRow, negatives: list[str], kind: str, mean: bool
) -> float:
    """Equation 2 or its variant in appendix B, of one row."""
    if kind in ("kl", "js"):
        s1, *s2s = (-sigmoid(now.divergence(row.query, text, kind)) for text in (row.pos, *negatives))
        return minus_log_share(s1, s2s)
    sigma = {"sigmoid": sigmoid, "log_sigmoid": log_sigmoid}[kind]
    ratio = lambda text: now.next(row.query, text, mean=mean) - start.next(row.query, text, mean=mean)  # noqa: E731
    s1 = -sigma(BETA * abs(now.next(row.query, row.pos, mean=mean) - now.self(row.pos, mean=mean)))
    s2s = [-sigma(BETA * ratio(row.pos) - BETA * ratio(text)) for text in negatives]
    return minus_log_share(s1, s2s)


class World:
    """A model as stage 2 starts, the same some steps later, and both as the plain side sees them, in float64."""

    def __init__(self, base: Any) -> None:
        self.decoder = FrozenDecoder.from_pretrained(base, device="cpu", dtype="float64")
        self.start = AutoRegEncoder.from_base(base, K, device="cpu", dtype="float64")
        self.now = AutoRegEncoder.from_base(base, K, device="cpu", dtype="float64")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for encoder, scale in ((self.start, 0.01), (self.now, 0.03)):
                for weight in encoder.trainable().parameters():
                    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    weight.add_(scale * noise)
        self.plain_start, self.plain = Plain(self.start, self.decoder), Plain(self.now, self.decoder)

    def objective(self, folder: Any, arguments: AlignmentArguments) -> Any:
        """The stage's own, its reference scores those of `start`."""
        rows = alignment_rows(ALIGNMENT)
        stage = Stage("alignment", self.start, self.decoder, rows, folder, arguments)
        divergence = arguments.similarity in ("kl", "js")
        made = alignment.Divergences if divergence else alignment.LogProbabilities
        return made(stage, self.decoder, Negatives(rows, arguments), arguments)

    def negatives(
        self, arguments: AlignmentArguments, batch: list[tuple[int, AlignmentRow]]
    ) -> list[list[str]]:
        chosen = Negatives(ALIGNMENT, arguments)
        return [a + b for a, b in zip(chosen.own(batch), chosen.in_batch(batch), strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(write_base(tmp_path_factory.mktemp("objectives") / "base", "gpt2"))


def compressor(encoder: AutoRegEncoder) -> nn.Module:
    """As Trainer sees it, in float64. Stages train in float32: the weights come and go without loss."""
    weights = {name: weight.clone() for name, weight in encoder.model.state_dict().items()}
    module = Compressor(encoder).double()
    encoder.model.load_state_dict(weights)
    return module


def settings(**changes: Any) -> AlignmentArguments:
    common = {"beta": BETA, "temperature": TAU, "batch_size": 6, "bf16": False, "seed": 3}
    return AlignmentArguments(**{**common, **changes})


VARIANTS = [
    ("sigmoid", False),
    ("sigmoid", True),
    ("log_sigmoid", False),
    ("log_sigmoid", True),
    ("kl", False),
    ("js", False),
]
variants = pytest.mark.parametrize(("kind", "mean"), VARIANTS)
BATCH = list(enumerate(ALIGNMENT))


@variants
@pytest.mark.parametrize(("n", "m"), [(1, 0), (2, 0), (3, 0), (0, 1), (0, 3), (1, 2), (3, 3)])
def test_alignment_is_the_papers_equation_row_by_row(world: World, tmp_path, kind, mean, n, m):
    arguments = settings(similarity=kind, length_normalized=mean, num_negatives=n, in_batch_negatives=m)
    objective = world.objective(tmp_path, arguments)
    losses = objective.step_loss(compressor(world.now), objective.collate(BATCH))
    negatives = world.negatives(arguments, BATCH)
    assert [len(texts) for texts in negatives] == [n + m] * len(ALIGNMENT)
    expected = [
        plain_loss(world.plain, world.plain_start, row, texts, kind, mean)
        for row, texts in zip(ALIGNMENT, negatives, strict=True)
    ]
    assert losses.dtype == torch.float64
    tolerance = 1e-10 if kind in ("kl", "js") else STORED
    np.testing.assert_allclose(losses.detach(), expected, rtol=tolerance)
    assert np.std(expected) > 1e-3, "rows differ"


@variants
def test_texts_that_come_again_in_a_batch_lose_nothing(world: World, tmp_path, kind, mean):
    """Distinct prompts and pairs, encoded and scored once, give what every row alone gives."""
    objective = world.objective(tmp_path, settings(similarity=kind, length_normalized=mean, num_negatives=3))
    encoder = compressor(world.now)
    together = objective.step_loss(encoder, objective.collate(BATCH))
    alone = [objective.step_loss(encoder, objective.collate([row])) for row in BATCH]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


@variants
def test_each_distinct_prompt_is_encoded_once(world: World, tmp_path, kind, mean):
    objective = world.objective(tmp_path, settings(similarity=kind, length_normalized=mean, num_negatives=3))
    encoder, prompts = compressor(world.now), []

    def record(module: nn.Module, arguments: tuple, keywords: dict) -> None:
        prompts.extend(map(tuple, keywords["input_ids"].tolist()))

    handle = world.now.model.register_forward_pre_hook(record, with_kwargs=True)
    objective.step_loss(encoder, objective.collate(BATCH))
    handle.remove()
    queries = {row.query for row in ALIGNMENT}
    documents = {row.pos for row in ALIGNMENT}
    if kind in ("kl", "js"):
        documents.update(*world.negatives(objective.arguments, BATCH))
    assert len(prompts) == len(set(prompts)) == len(queries) + len(documents)


@pytest.mark.parametrize(("kind", "half"), [("sigmoid", 0.5), ("log_sigmoid", math.log(0.5))])
def test_where_the_model_is_the_reference_every_s2_is_that_of_0(world: World, tmp_path, kind, half):
    """Defect 1 of the released code: with the reference's sign turned round, S2 would start far from -s(0)."""
    objective = world.objective(tmp_path, settings(similarity=kind, num_negatives=2, in_batch_negatives=1))
    losses = objective.step_loss(compressor(world.start), objective.collate(BATCH))
    sigma = {"sigmoid": sigmoid, "log_sigmoid": log_sigmoid}[kind]
    gaps = [abs(world.plain_start.next(r.query, r.pos) - world.plain_start.self(r.pos)) for r in ALIGNMENT]
    expected = [minus_log_share(-sigma(BETA * gap), [-half] * 3) for gap in gaps]
    np.testing.assert_allclose(losses.detach(), expected, rtol=STORED)


@variants
def test_negatives_share_one_softmax(world: World, tmp_path, kind, mean):
    """Defect 2 of the released code. Odds of single negatives add up; one softmax for each would add their losses."""
    encoder, row = compressor(world.now), ALIGNMENT[0]
    # Leaves the reference scores of all three negatives in the folder.
    world.objective(tmp_path, settings(similarity=kind, length_normalized=mean, num_negatives=3))

    def loss(negatives: tuple[str, ...]) -> float:
        arguments = settings(similarity=kind, length_normalized=mean, num_negatives=len(negatives))
        objective = world.objective(tmp_path, arguments)
        numbered = [(0, AlignmentRow(row.query, row.pos, negatives))]
        return objective.step_loss(encoder, objective.collate(numbered)).item()

    odds = [math.expm1(loss((text,))) for text in row.neg]
    assert loss(row.neg) == pytest.approx(math.log1p(sum(odds)), rel=STORED)


def compression_objective(
    world: World, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable, Callable]:
    """What `train_compression` hands to its stage."""
    taken: list[Callable] = []
    monkeypatch.setattr(Stage, "run", lambda _, collate, step_loss: taken.extend((collate, step_loss)))
    arguments = CompressionArguments(bf16=False)
    compression.train_compression(world.start, world.decoder, COMPRESSION, tmp_path, arguments)
    collate, step_loss = taken
    return collate, step_loss


def test_compression_is_minus_log_p_of_every_target_token(world: World, tmp_path, monkeypatch):
    collate, step_loss = compression_objective(world, tmp_path, monkeypatch)
    batch = collate(list(enumerate(COMPRESSION)))
    losses = step_loss(compressor(world.now), batch)
    expected, tokens = [], 0
    for row in COMPRESSION:
        table = world.plain.log_probs(row.context, row.instruction, row.output)
        ids = world.plain.target(row.output)
        expected.append(-sum(line[token] for line, token in zip(table, ids, strict=True)))
        tokens += len(ids)
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-10)
    assert batch["labels"].numel() == tokens, "what the sum is divided by"
    mean = information_compression_loss(-losses, torch.tensor([tokens]))
    assert (losses.sum() / batch["labels"].numel()).item() == pytest.approx(mean.item(), rel=1e-12)


def check_gradient(encoder: AutoRegEncoder, loss: Callable[[], Tensor]) -> None:
    """Autograd against central differences at the largest and at other entries of weights of every kind."""
    weights = dict(encoder.model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    gradients = torch.autograd.grad(loss(), list(weights.values()))
    assert all(gradient.dtype == torch.float64 for gradient in gradients)
    compared = 0
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if not name.startswith(("wte", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight", "ln_f.bias")):
            continue
        entries = [
            int(gradient.abs().argmax()),
            int(torch.randint(gradient.numel(), (), generator=generator)),
        ]
        for entry in entries:
            value = weight.data.view(-1)[entry].item()
            sides = []
            for step in (1e-5, -1e-5):
                weight.data.view(-1)[entry] = value + step
                with torch.no_grad():
                    sides.append(loss().item())
            weight.data.view(-1)[entry] = value
            difference = (sides[0] - sides[1]) / 2e-5
            assert gradient.view(-1)[entry].item() == pytest.approx(difference, rel=1e-5, abs=1e-9), name
            compared += 1
        assert gradient.abs().max() > 1e-4, f"{name} has a gradient to speak of"
    assert compared == 8


@pytest.mark.parametrize(
    ("kind", "mean", "recompute"),
    [(*v, False) for v in VARIANTS] + [("sigmoid", False, True), ("js", False, True)],
)
def test_an_alignment_steps_gradient_agrees_with_finite_differences(
    world: World, tmp_path, kind, mean, recompute
):
    arguments = settings(
        similarity=kind,
        length_normalized=mean,
        num_negatives=2,
        in_batch_negatives=1,
        gradient_checkpointing=recompute,
    )
    objective = world.objective(tmp_path, arguments)
    encoder, batch = compressor(world.now), objective.collate(BATCH)
    gaps = [world.plain.next(r.query, r.pos) - world.plain.self(r.pos) for r in ALIGNMENT]
    assert min(map(abs, gaps)) > 0.05, "away from the kink"

    def loss() -> Tensor:
        return objective.step_loss(encoder, batch).mean()

    check_gradient(world.now, loss)


def test_a_compression_steps_gradient_agrees_with_finite_differences(world: World, tmp_path, monkeypatch):
    collate, step_loss = compression_objective(world, tmp_path, monkeypatch)
    encoder, batch = compressor(world.now), collate(list(enumerate(COMPRESSION)))
    check_gradient(world.now, lambda: step_loss(encoder, batch).mean())
