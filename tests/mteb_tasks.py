"""Two tasks of mteb that need no download."""

from __future__ import annotations

from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

QUERIES = {
    "q1": "Which fruit holds vitamin C?",
    "q2": "Who jumps over the dog?",
    "q3": "What can be read back?",
    "q4": "Who writes the answer?",
}
DOCUMENTS = {
    "d1": "Vitamin C is found in oranges.",
    "d2": "The quick brown fox jumps over the lazy dog.",
    "d3": "A compressed vector can be read back.",
    "d4": "A reader writes the answer.",
    "d5": "Green peppers near the river bank.",
}
RELEVANT = {f"q{i}": {f"d{i}": 1} for i in range(1, 5)}
PAIRS = [
    ("The fox jumps.", "A fox is jumping.", 5.0),
    ("Oranges and lemons.", "Lemons and oranges.", 4.5),
    ("A reader writes.", "A question is answered.", 2.0),
    ("The river bank.", "Vitamin C.", 0.5),
    ("Green peppers.", "A language model.", 0.0),
]


def metadata(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="made on the spot",
        reference=None,
        type=kind,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
        dataset={"path": f"local/{name}", "revision": "1"},
    )


class Finding(AbsTaskRetrieval):
    metadata = metadata("Finding", "Retrieval", "ndcg_at_1")

    def load_data(self, **_) -> None:
        corpus = [{"id": key, "text": text, "title": ""} for key, text in DOCUMENTS.items()]
        queries = [{"id": key, "text": text} for key, text in QUERIES.items()]
        split = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": RELEVANT,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Likeness(AbsTaskSTS):
    metadata = metadata("Likeness", "STS", "cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, **_) -> None:
        one, two, scores = zip(*PAIRS, strict=True)
        rows = Dataset.from_dict({"sentence1": one, "sentence2": two, "score": scores})
        self.dataset = {"test": rows}
        self.data_loaded = True
