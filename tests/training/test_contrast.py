"""The contrast stage: its loss against plain numpy, entry by entry, and which pairs are left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.training.arguments import ContrastArguments
from autoregembed_rag.training.contrast import contrast_loss, train_contrast
from autoregembed_rag.training.data import AlignmentRow
from autoregembed_rag.training.stage import Stage
from autoregembed_rag.training.trainer import Compressor

# Rows 0 and 1 share a query, 1 and 2 a positive, 0 and 4 both; row 3's negative is row 0's positive.
ROWS = [
    AlignmentRow("Where is the fox?", "The fox is near the river."),
    AlignmentRow("Where is the fox?", "The fox jumps over the lazy dog.", ("A lemon.",)),
    AlignmentRow("Where is the dog?", "The fox jumps over the lazy dog."),
    AlignmentRow("Vitamin C?", "Oranges and lemons.", ("The fox is near the river.", "A lemon.")),
    AlignmentRow("Where is the fox?", "The fox is near the river."),
]
TAU = 0.3


def log_sum_exp(values: list[float]) -> float:
    return math.log(math.fsum(map(math.exp, values)))


def plain_losses(rows: list[AlignmentRow], cosine: Callable[[str, str], float]) -> list[float]:
    """Each query over the batch's distinct documents and each row's document over the batch's queries, answers of a
    query left out among what it or they are told apart from."""
    documents = {text for row in rows for text in (row.pos, *row.neg)}
    answers = {(row.query, row.pos) for row in rows}
    losses = []
    for row in rows:
        own = cosine(row.query, row.pos) / TAU
        wrong = [d for d in documents if (row.query, d) not in answers]
        forward = log_sum_exp([own, *(cosine(row.query, d) / TAU for d in wrong)]) - own
        others = [other.query for other in rows if (other.query, row.pos) not in answers]
        backward = log_sum_exp([own, *(cosine(q, row.pos) / TAU for q in others)]) - own
        losses.append((forward + backward) / 2)
    return losses


def objective(encoder: AutoRegEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """What `train_contrast` hands to its stage: collate and step_loss."""
    taken: list[Callable] = []
    monkeypatch.setattr(Stage, "run", lambda _, *parts: taken.extend(parts))
    train_contrast(encoder, ROWS, folder, ContrastArguments(temperature=TAU, bf16=False))
    return taken


@pytest.mark.parametrize("pooling", ["flatten", "mean"])
def test_the_stage_tells_apart_the_embeddings_that_search_will_compare(
    pooling, tiny_checkpoint, tmp_path, monkeypatch
):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", pooling=pooling)
    collate, step_loss = objective(encoder, tmp_path, monkeypatch)
    asked = sorted({row.query for row in ROWS})
    queries = dict(zip(asked, encoder.encode_queries(asked), strict=True))
    texts = sorted({text for row in ROWS for text in (row.pos, *row.neg)})
    documents = dict(zip(texts, encoder.encode_documents(texts), strict=True))
    expected = plain_losses(ROWS, lambda q, d: float(queries[q].astype(float) @ documents[d].astype(float)))
    batch = collate(list(enumerate(ROWS)))
    assert len(batch["prompts"]) == len(ROWS) + len(texts), "each document once"
    with torch.no_grad():
        losses = step_loss(Compressor(encoder), batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert batch["labels"].numel() == len(ROWS)
    assert losses[0] == losses[4], "the same row twice"


def random_units(seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=-1)


def test_loss_values_and_gradients_in_float64():
    queries, documents = random_units(0, 5), random_units(1, 7)
    targets = torch.tensor([0, 3, 3, 5, 6])
    answers = torch.zeros(5, 7, dtype=torch.bool)
    answers[torch.arange(5), targets] = True
    answers[0, 2] = answers[1, 5] = True  # a second answer: one that no row has, one that row 3 has
    scores = (queries @ documents.T / TAU).tolist()
    expected = []
    for i, own in enumerate(targets.tolist()):
        wrong = [scores[i][d] for d in range(7) if d != own and not answers[i, d]]
        others = [scores[j][own] for j in range(5) if j != i and not answers[j, own]]
        score = scores[i][own]
        expected.append((log_sum_exp([score, *wrong]) + log_sum_exp([score, *others])) / 2 - score)
    found = contrast_loss(queries, documents, targets, answers, TAU)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    inputs = (queries.requires_grad_(), documents.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, d: contrast_loss(q, d, targets, answers, TAU), inputs)


def test_another_answer_of_the_query_has_no_say():
    """Neither forwards nor backwards: moving it changes nothing; without the mask it does."""
    queries, documents = random_units(2, 2), random_units(3, 3)
    targets = torch.tensor([0, 1])
    answers = torch.tensor([[True, True, False], [False, True, False]])
    moved = torch.stack([documents[0], documents[2], documents[2]])
    before = contrast_loss(queries, documents, targets, answers, TAU)
    after = contrast_loss(queries, moved, targets, answers, TAU)
    assert before[0] == after[0]
    assert before[1] != after[1]
    # The second document is told apart from no query: the first, which it answers too, is left out.
    assert torch.equal(
        contrast_loss(queries, documents, targets, answers, TAU)[1],
        contrast_loss(queries[1:], documents, targets[1:], answers[1:], TAU)[0],
    )
    unmasked = torch.eye(2, 3, dtype=torch.bool)
    assert contrast_loss(queries, documents, targets, unmasked, TAU)[0] > before[0]


def test_a_batch_without_anything_to_tell_apart_has_no_loss():
    loss = contrast_loss(
        random_units(4, 1), random_units(5, 1), torch.tensor([0]), torch.ones(1, 1).bool(), TAU
    )
    assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([("a", "b")], "query"),
        ([("a", "b"), ("a", "c")], "query"),
        ([("a", "b"), ("c", "b")], "positive"),
    ],
)
def test_rows_with_nothing_to_tell_apart_are_refused(rows, same, encoder, tmp_path):
    with pytest.raises(ValueError, match=f"all rows have the same {same} and none a negative"):
        train_contrast(encoder, [AlignmentRow(*row) for row in rows], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_passage_but_for_a_sentence_is_no_negative_unless_the_row_says_so(
    tiny_checkpoint: Path, tmp_path, monkeypatch
):
    encoder = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    collate, _ = objective(encoder, tmp_path, monkeypatch)
    first, second, third = (
        f"Foxes live near the river bank and {x} at night." for x in ("sleep", "hunt", "rest")
    )
    rows = [
        AlignmentRow("when do foxes sleep", first),
        AlignmentRow("when do foxes hunt", second, (third,)),
        AlignmentRow("what is a lemon", "A lemon is a yellow fruit."),
    ]
    answers = collate(list(enumerate(rows)))["answers"].tolist()
    # Columns: the three positives, then the second row's negative.
    assert answers == [[True, True, False, True], [True, True, False, False], [False, False, True, False]]
