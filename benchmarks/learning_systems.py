"""The systems of the learning benchmark: how each is trained, and how it is looked at while it learns.

The baselines are sentence-transformers' own: its modules, losses and trainer over the base LM. Its
MultipleNegativesRankingLoss is InfoNCE with in-batch negatives; with scores of other rows' documents at minus infinity
(`own_documents`, given as its `similarity_fct`) it is InfoNCE over each row's explicit negative alone.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import cos_sim
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.loading import resolve_device, resolve_dtype
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.data import AlignmentRow, Rows
from autoregembed_rag.training.trainer import LengthBatches
from benchmarks.scoring import spearman
from benchmarks.sts import Pairs

SCALE = 20.0  # sentence-transformers' default: a temperature of 0.05
WARMUP = 0.05

Embed = Callable[[list[str]], np.ndarray]
"""Texts -> unit rows, float32 [n, dimension]."""
Evaluate = Callable[[Embed], dict[str, float]]


@dataclass(frozen=True)
class System:
    """One line of the table.

    Attributes:
        title: its name in reports.
        kind: how it is trained.
        paper: the paper's mean over 10 STS sets, Spearman x 100, LLaMA2-7B (tables 1 and 2).
        pooling: sentence-transformers' name of it, for "infonce".
        in_batch: whether other rows' documents are negatives too, for "infonce".
        similarity: of `AlignmentArguments`, for "alignment".
    """

    title: str
    kind: Literal["infonce", "compression", "alignment"]
    paper: float
    pooling: str = ""
    in_batch: bool = False
    similarity: str = ""


SYSTEMS = {
    "last": System("InfoNCE, last token", "infonce", 76.34, pooling="lasttoken"),
    "last-in-batch": System("InfoNCE, last token, in-batch", "infonce", 77.97, "lasttoken", True),
    "mean": System("InfoNCE, mean", "infonce", 79.88, pooling="mean"),
    "mean-in-batch": System("InfoNCE, mean, in-batch", "infonce", 81.53, "mean", True),
    "compression": System("compression only", "compression", 73.90),
    "sigmoid": System("AutoRegEmbed, sigmoid", "alignment", 83.07, similarity="sigmoid"),
    "log-sigmoid": System("AutoRegEmbed, log-sigmoid", "alignment", 82.93, similarity="log_sigmoid"),
    "kl": System("AutoRegEmbed, KL", "alignment", 79.82, similarity="kl"),
    "js": System("AutoRegEmbed, JS", "alignment", 79.02, similarity="js"),
}


@dataclass(frozen=True)
class Course:
    """What one run trains on, and with.

    Attributes:
        base: folder of the base LM.
        rows: a whole number of batches.
        device: as `AutoRegEncoder.from_base` takes it.
        evaluations: how often, evenly spread over the run, the last time at its end.
    """

    base: Path
    rows: Rows[Any]
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    max_tokens: int
    device: str
    evaluations: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.rows) // self.batch_size * self.epochs

    @property
    def bf16(self) -> bool:
        """Whether the passes compute in bfloat16: wherever the hardware does."""
        return resolve_dtype("auto", resolve_device(self.device)) == torch.bfloat16

    def arguments(self) -> dict[str, Any]:
        """What the arguments of either of our stages say."""
        return {
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "warmup_ratio": WARMUP,
            "bf16": self.bf16,
            "seed": self.seed,
            "save_steps": None,
            "logging_steps": self.steps,
        }


class Learned(NamedTuple):
    """A finished run: what was measured on the way, seconds spent training, a name for the weights, and how states
    became embeddings."""

    points: list[dict[str, Any]]
    seconds: float
    fingerprint: str
    pooling: str


def correlations(embed: Embed, sets: Mapping[str, Pairs]) -> dict[str, float]:
    """Spearman x 100 of cosines with human scores, by set; every distinct sentence is embedded once.

    FloatingPointError if an embedding is not finite: training has diverged.
    """
    texts = sorted({text for pairs in sets.values() for text in (*pairs.first, *pairs.second)})
    vectors = embed(texts)
    if not np.isfinite(vectors).all():
        raise FloatingPointError("embeddings are not finite: the learning rate is too high")
    rows = {text: row for row, text in enumerate(texts)}
    found = {}
    for name, pairs in sets.items():
        first, second = (vectors[[rows[text] for text in side]] for side in (pairs.first, pairs.second))
        found[name] = 100 * spearman(pairs.scores, (first * second).sum(axis=1))
    return found


class Watch:
    """Looks at a model after chosen optimizer steps, whoever trains it; the clock stands still meanwhile."""

    def __init__(self, course: Course, model: nn.Module, embed: Embed, evaluate: Evaluate | None) -> None:
        """`evaluate` None: only the clock runs."""
        self.course = course
        self.model = model
        self.embed = embed
        self.evaluate = evaluate
        self.taken = 0
        self.seconds = 0.0
        self.points: list[dict[str, Any]] = []
        parts = range(1, course.evaluations + 1)
        self._at = {round(course.steps * part / course.evaluations) for part in parts}

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the training; RuntimeError if it took another number of steps than the course has."""
        # PyTorch's own hook sees the steps of any trainer alike, without a word in its settings.
        handle = register_optimizer_step_post_hook(lambda *_: self._after_step())
        self._resumed = time.perf_counter()
        try:
            yield
        finally:
            handle.remove()
        self.seconds += time.perf_counter() - self._resumed
        if self.taken != self.course.steps:
            raise RuntimeError(
                f"{self.taken} optimizer steps were taken, {self.course.steps} expected: nothing was measured "
                "where it should have been"
            )

    def look(self, scores: dict[str, float] | None = None) -> None:
        """Evaluate now, or take `scores` that are known."""
        if self.evaluate is None:
            return
        if scores is None:
            learning = self.model.training
            self.model.eval()
            device = next(self.model.parameters()).device.type
            with torch.autocast(device, torch.bfloat16, enabled=self.course.bf16):
                scores = self.evaluate(self.embed)
            self.model.train(learning)
        samples = self.taken * self.course.batch_size
        self.points.append(
            {
                "samples": samples,
                "epochs": samples / len(self.course.rows),
                "seconds": round(self.seconds, 2),
                "scores": scores,
            }
        )

    def _after_step(self) -> None:
        self.taken += 1
        if self.taken in self._at:
            self.seconds += time.perf_counter() - self._resumed
            self.look()
            self._resumed = time.perf_counter()


def own_documents(queries: Tensor, documents: Tensor) -> Tensor:
    """Cosines [n, m n] of queries with their own documents, and minus infinity for those of other rows.

    As MultipleNegativesRankingLoss calls it: `documents` [m n, dimension] are the n positives, then the n first
    negatives, and so on.
    """
    n = len(queries)
    own = torch.arange(len(documents), device=queries.device) % n
    other = own != torch.arange(n, device=queries.device)[:, None]
    return cos_sim(queries, documents).masked_fill(other, -torch.inf)


class SameOrder(DefaultBatchSampler):
    """Batches of sentence-transformers' trainer, of the rows and in the order in which our stages take them."""

    def __init__(self, dataset: Dataset, course: Course, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(dataset, **settings)
        self._order = LengthBatches(course.rows.lengths, course.batch_size, course.seed)

    def set_epoch(self, epoch: int) -> None:
        """Called as every epoch begins."""
        super().set_epoch(epoch)
        self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._order)
        return (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size))


def sentence_transformer(course: Course, pooling: str) -> SentenceTransformer:
    """The base LM, pooled, in float32."""
    body = Transformer(
        str(course.base), max_seq_length=course.max_tokens, model_kwargs={"dtype": torch.float32}
    )
    if body.tokenizer.pad_token is None:
        body.tokenizer.pad_token = body.tokenizer.eos_token
    modules = [body, Pooling(body.get_embedding_dimension(), pooling)]
    model = SentenceTransformer(modules=modules, device=str(resolve_device(course.device)))
    model.model_card_data.generate_widget_examples = False  # nobody will see the card
    return model


def learn_infonce(system: System, course: Course, evaluate: Evaluate | None) -> Learned:
    """Train a baseline with sentence-transformers on triplets."""
    model = sentence_transformer(course, system.pooling)

    def embed(texts: list[str]) -> np.ndarray:
        found: np.ndarray = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return found

    rows: list[AlignmentRow] = course.rows[:]
    dataset = Dataset.from_dict(
        {
            "anchor": [row.query for row in rows],
            "positive": [row.pos for row in rows],
            "negative": [row.neg[0] for row in rows],
        }
    )
    similarity = cos_sim if system.in_batch else own_documents
    watch = Watch(course, model, embed, evaluate)
    watch.look()
    with tempfile.TemporaryDirectory() as folder, watch.training():
        SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=course.batch_size,
                num_train_epochs=course.epochs,
                learning_rate=course.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=WARMUP,
                bf16=course.bf16,
                use_cpu=model.device.type == "cpu",
                seed=course.seed,
                batch_sampler=lambda data, **settings: SameOrder(data, course, **settings),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
            ),
            train_dataset=dataset,
            loss=MultipleNegativesRankingLoss(model, scale=SCALE, similarity_fct=similarity),
        ).train()
    return Learned(watch.points, watch.seconds, _digest(model), system.pooling)


def learn_compression(course: Course, output: Path, evaluate: Evaluate | None) -> Learned:
    """Train stage 1 from the base LM on `CompressionRow`s and leave the checkpoint in `output`."""
    encoder = AutoRegEncoder.from_base(
        course.base, device=course.device, dtype="float32", max_length=course.max_tokens
    )
    decoder = _decoder(course)
    watch = Watch(course, encoder.model, _embed(encoder), evaluate)
    watch.look()
    with watch.training():
        arguments = CompressionArguments(**course.arguments())
        trained = train_compression(encoder, decoder, course.rows, output, arguments)
    return Learned(watch.points, watch.seconds, trained.fingerprint, trained.config.pooling)


def learn_alignment(
    system: System,
    course: Course,
    start: Path | None,
    start_scores: dict[str, float] | None,
    evaluate: Evaluate | None,
) -> Learned:
    """Train stage 2 on triplets, from stage 1's checkpoint in `start`; None: from the base LM, to time a step."""
    if start is None:
        encoder = AutoRegEncoder.from_base(
            course.base, device=course.device, dtype="float32", max_length=course.max_tokens
        )
    else:
        encoder = AutoRegEncoder.from_pretrained(start, device=course.device, dtype="float32")
    decoder = _decoder(course)
    watch = Watch(course, encoder.model, _embed(encoder), evaluate)
    watch.look(start_scores)
    with tempfile.TemporaryDirectory() as folder, watch.training():
        arguments = AlignmentArguments(**course.arguments(), similarity=system.similarity)  # type: ignore[arg-type]
        trained = train_alignment(encoder, decoder, course.rows, folder, arguments)
        fingerprint = trained.fingerprint  # while its folder is there
    return Learned(watch.points, watch.seconds, fingerprint, trained.config.pooling)


def _embed(encoder: AutoRegEncoder) -> Embed:
    # The same instruction on both sides, as the paper evaluates similarity.
    return lambda texts: encoder.encode(texts, "self")


def _decoder(course: Course) -> FrozenDecoder:
    return FrozenDecoder.from_pretrained(course.base, device=course.device)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
