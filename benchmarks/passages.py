"""A BEIR folder of any number of passages as long as MS MARCO's, made from the training corpus:
`python -m benchmarks.passages --count 100000 --out build/passages`.

For runs that must last or must not hold their documents; its judgements are the corpus' own pairs, on which models may
have been trained, so what is found says nothing of how good a model is.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from autoregembed_rag.training.sources import read_jsonl

WORDS = 56  # of a passage of MS MARCO, in the mean
SOURCE = "abachaa/MedQuAD"


def passages(corpus: Path) -> Iterator[str]:
    """Documents of the corpus, cut."""
    for shard in sorted(corpus.glob("pretrain-*.jsonl*")):
        for row in read_jsonl(shard):
            words = row["text"].split()
            for start in range(0, len(words) - WORDS // 2, WORDS):
                yield " ".join(words[start : start + WORDS])


def judged(corpus: Path) -> Iterator[tuple[str, str]]:
    """Questions and a passage that answers each, no question twice."""
    seen: set[str] = set()
    for row in read_jsonl(next(corpus.glob("pairs.jsonl*"))):
        if row["source"] == SOURCE and row["query"] not in seen:
            seen.add(row["query"])
            yield row["query"], " ".join(row["pos"].split()[:WORDS])


def main(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    count: Annotated[int, typer.Option(min=1, help="Passages.")] = 100_000,
    questions: Annotated[int, typer.Option(min=1, help="Of them, that answer a question each.")] = 500,
    corpus: Annotated[Path, typer.Option(help="Folder of pretrain-* and pairs JSONL.")] = Path(
        "../shared/data/corpus"
    ),
) -> None:
    """Write corpus.jsonl, queries.jsonl and qrels/test.tsv."""
    asked = list(islice(judged(corpus), questions))
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    every = max(1, count // len(asked))
    rest = passages(corpus)
    with (
        (out / "corpus.jsonl").open("w", encoding="utf-8") as documents,
        (out / "queries.jsonl").open("w", encoding="utf-8") as queries,
        (out / "qrels" / "test.tsv").open("w", encoding="utf-8") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for number in tqdm(range(count), desc="passages", unit="doc"):
            place, judged_here = divmod(number, every)
            if judged_here == 0 and place < len(asked):
                question, text = asked[place]
                queries.write(json.dumps({"_id": f"q{place}", "text": question}) + "\n")
                qrels.write(f"q{place}\td{number}\t1\n")
            else:
                text = next(rest)
            documents.write(json.dumps({"_id": f"d{number}", "title": "", "text": text}) + "\n")


if __name__ == "__main__":
    typer.run(main)
