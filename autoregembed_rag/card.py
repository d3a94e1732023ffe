"""The model card of a checkpoint: what it is, how it was trained, what it scores, how it is loaded. What is not known
is left out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from .config import CONFIG_NAME, AutoRegConfig
from .fingerprint import encoder_fingerprint
from .history import History, StageHistory, read_history
from .loading import WEIGHTS, is_hub_id
from .scores import Score, read_scores
from .weights import is_adapter

if TYPE_CHECKING:
    from .encoder import AutoRegEncoder

CARD_NAME = "README.md"

# The digest is of the rest of the card: one that somebody has changed is theirs.
_MARK = "<!-- autoregembed-rag wrote this card ({digest}) and replaces it at the next save, unless it was changed. -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{digest\}", "([0-9a-f]{16})") + r"\s*\Z")

OBJECTIVES = {
    "compression": "information compression (L_IC)",
    "alignment": "conditional distribution alignment (L_CDA)",
    "contrast": "in-batch softmax over the cosines, which the paper does not have",
}


def model_card(
    encoder: AutoRegEncoder,
    name: str,
    *,
    scores: Iterable[Mapping[str, Any]] = (),
    about: str | None = None,
    license: str | None = None,  # noqa: A002
    language: str | Sequence[str] | None = None,
) -> str:
    """The card of the checkpoint that `encoder` was loaded from, as Markdown with the hub's YAML in front.

    Args:
        encoder: loaded by `AutoRegEncoder.from_pretrained`, its weights unchanged.
        name: by which it is to be loaded: a hub id ("user/name"), a bundled name or a folder.
        scores: reports of `benchmarks.retrieval` and `benchmarks.sts`, as `results.json` has them; what is in them with
            this encoder's fingerprint is taken.
        about: Markdown of your own, such as what it was trained on and what it is for.
        license, language: for the hub, such as "apache-2.0" and "en" or ["en", "de"]; None: not said.

    Raises:
        ValueError: the encoder was never saved, or its folder holds an adapter; no score is of this encoder.
    """
    folder = encoder._source
    if folder is None:
        raise ValueError(
            "an encoder that was never saved has no card: save_pretrained(folder) and load it from there"
        )
    if is_adapter(folder):
        raise ValueError(
            f"{folder} holds an adapter, which has no card: save_pretrained(another_folder) writes the whole model, "
            "merged; load that"
        )
    fingerprint = encoder.fingerprint
    found = read_scores(scores, fingerprint)
    decoder = encoder.config.decoder
    facts = Facts(encoder, folder, fingerprint, read_history(folder), found, decoder)
    return facts.card(name, about, license, language)


def write_card(
    encoder: AutoRegEncoder,
    folder: Path,
    history: History,
    name: str | None = None,
    *,
    scores: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,  # noqa: A002
    language: str | Sequence[str] | None = None,
) -> None:
    """Write the card of the checkpoint that `encoder` was just saved as into its `folder`, unless the README.md there
    is somebody's own. The folder of an adapter has none.

    Args:
        encoder: whose settings they are; the weights that count are those in `folder`.
        history: of these weights.
        name: by which it is to be loaded; None: the folder's.
        scores, license, language: as `model_card` takes them.
    """
    file = folder / CARD_NAME
    if is_adapter(folder):
        remove_card(folder)
        return
    if file.exists() and not is_generated(file):
        return
    vocabulary = encoder.tokenizer.get_vocab()
    fingerprint = encoder_fingerprint(folder, vocabulary, encoder.prompts, encoder.config)
    decoder = AutoRegConfig.load(folder / CONFIG_NAME).decoder
    if decoder is not None and Path(decoder).is_dir() and not Path(decoder).is_relative_to(folder.resolve()):
        decoder = None  # a path on this machine says nothing to others
    facts = Facts(encoder, folder, fingerprint, history, read_scores(scores, fingerprint), decoder)
    text = facts.card(name or folder.resolve().name, license=license, language=language)
    beside = file.with_name(f".{CARD_NAME}.tmp")
    beside.write_text(f"{text}\n{_MARK.format(digest=_digest(text))}\n", encoding="utf-8")
    beside.replace(file)


def remove_card(folder: Path) -> None:
    """Remove the card that `write_card` wrote for what was in `folder` before; somebody's own stays."""
    file = folder / CARD_NAME
    if file.exists() and is_generated(file):
        file.unlink()


def is_generated(file: Path) -> bool:
    """Did `write_card` write this file, and has nobody changed it since?"""
    text = file.read_text(encoding="utf-8", errors="replace")
    found = _MARKED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Facts:
    """What a card says of a checkpoint in `folder`."""

    encoder: AutoRegEncoder
    folder: Path
    fingerprint: str
    history: History
    scores: list[Score]
    decoder: str | None

    def card(
        self,
        name: str,
        about: str | None = None,
        license: str | None = None,  # noqa: A002
        language: str | Sequence[str] | None = None,
    ) -> str:
        """All of it."""
        title = name.rpartition("/")[2]
        parts = [
            f"---\n{self._front(title, license, language)}\n---\n# {title}",
            self._what(),
            about and about.strip(),
            self._loading(name),
            self._training(),
            self._scores(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    @property
    def _base(self) -> str | None:
        """The hub id of the decoder, which the encoder was made from."""
        return self.decoder if self.decoder is not None and is_hub_id(self.decoder) else None

    @property
    def _has_decoder(self) -> bool:
        return self.decoder is not None and (self._base is not None or Path(self.decoder).is_dir())

    @property
    def _hidden_size(self) -> int:
        # Of a model that is split over devices, the settings alone know it.
        return getattr(self.encoder.model.config, "hidden_size", None) or self.encoder.hidden_size

    @property
    def _dimension(self) -> int:
        config = self.encoder.config
        return self._hidden_size * (config.num_compressed_tokens if config.pooling == "flatten" else 1)

    @property
    def _comparison(self) -> Mapping[str, Any] | None:
        """Of the fine-tuning run, if it measured this encoder: these weights under these settings."""
        finetuned = self.history.finetuned
        return finetuned["comparison"] if finetuned.get("fingerprint") == self.fingerprint else None

    def _front(self, title: str, license: str | None, language: str | Sequence[str] | None) -> str:  # noqa: A002
        from huggingface_hub import ModelCardData

        results = list(self._results())
        data: Any = ModelCardData(
            library_name="autoregembed-rag",
            pipeline_tag="feature-extraction",
            tags=[
                "autoregembed",
                "sentence-similarity",
                "feature-extraction",
                "sentence-transformers",
            ],
            base_model=self._base,
            license=license,
            language=language if language is None or isinstance(language, str) else list(language),
            model_name=title if results else None,
            eval_results=results or None,
        )
        return str(data.to_yaml())

    def _results(self) -> Iterator[Any]:
        """For the hub's table of results: the checkpoint as it is."""
        from huggingface_hub import EvalResult

        scores = [*self.scores]
        if comparison := self._comparison:
            scores.insert(
                0, Score("information-retrieval", HELD_OUT, None, "", "nDCG@10", comparison["after"])
            )
        for score in scores:
            if not score.use:
                yield EvalResult(
                    task_type=score.task,
                    dataset_type=score.dataset,
                    dataset_name=score.dataset,
                    dataset_split=score.split,
                    metric_type=re.sub(r"\W+", "_", score.metric.replace("@", "_at_")).lower(),
                    metric_name=score.metric,
                    metric_value=round(score.value, 4),
                )

    def _what(self) -> str:
        encoder, config = self.encoder, self.encoder.config
        shape = encoder.model.config
        layers = getattr(shape, "num_hidden_layers", None)
        pooled = (
            "the k vectors one after the other"
            if config.pooling == "flatten"
            else "the mean of the k vectors"
        )
        decoder = f"`{self._base}`" if self._base else "a folder beside it, `decoder`"
        return WHAT.format(
            k=config.num_compressed_tokens,
            dimension=f"{self._dimension:,}",
            pooling=config.pooling,
            pooled=pooled,
            max_length=config.max_length,
            query_instruction=_quoted(config.query_instruction),
            document_instruction=_quoted(config.document_instruction),
            parameters=_parameters(self.folder),
            architecture=f"{shape.model_type}, hidden size {self._hidden_size:,}"
            + (f", {layers} layers" if layers else ""),
            decoder=f"\n- decoder, the language model that reads the vectors: {decoder}"
            if self._has_decoder
            else "",
            fingerprint=self.fingerprint,
        )

    def _loading(self, name: str) -> str:
        parts = [LOADING]
        if self._has_decoder:
            parts.append(DECODING)
        parts += [LANGCHAIN, LLAMA_INDEX, SENTENCE_TRANSFORMERS]
        return "\n\n".join(parts).replace("NAME", _quoted(name)).replace("DIMENSION", str(self._dimension))

    def _training(self) -> str | None:
        stages, finetuned = self.history.stages, self.history.finetuned
        if not stages:
            return None
        lines = ["## Training", ""]
        if finetuned:
            counts = ", ".join(f"{name}: {count:,}" for name, count in finetuned["counts"].items())
            settings = _listed(finetuned["settings"])
            lines += [
                f"Fine-tuned by `autoregembed finetune` from the model with fingerprint `{finetuned['from']}` on "
                f"{finetuned['kind']} ({counts}); {settings}.",
                "",
            ]
        return "\n".join([*lines, _stage_table(stages)])

    def _scores(self) -> str | None:
        lines = []
        if comparison := self._comparison:
            lines += [
                f"{comparison['queries']:,} {HELD_OUT}, before and after fine-tuning: "
                f"nDCG@10 {comparison['before']:.4f} and {comparison['after']:.4f} (95% interval of the difference "
                f"{comparison['low']:+.4f} to {comparison['high']:+.4f}, p = {comparison['p_value']:.4f}): "
                f"{self.history.finetuned['verdict']}.",
                "",
            ]
        if self.scores:
            rows = [
                (
                    s.dataset,
                    s.split or "",
                    s.use,
                    s.metric,
                    f"{s.value:.2f}" if "x 100" in s.metric else f"{s.value:.4f}",
                )
                for s in self.scores
            ]
            lines.append(_table([("data", "split", "use", "measure", "value"), *rows]))
        return "\n".join(["## Scores", "", *lines]).rstrip() if lines else None


HELD_OUT = "held-out queries of the corpus it was fine-tuned on"


def _quoted(text: str) -> str:
    """In one line, as Python and JSON write a string."""
    return json.dumps(text, ensure_ascii=False)


def _parameters(folder: Path) -> str:
    """How many numbers the weights in `folder` are, in words."""
    count = 0
    for file in folder.glob(WEIGHTS):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                count += prod(weights.get_slice(name).get_shape())
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _stage_table(stages: Sequence[StageHistory]) -> str:
    """A column for each stage, a row for everything that is known of one."""
    columns = [
        {
            "minimised": OBJECTIVES.get(stage.name, stage.name),
            "rows": f"{stage.rows:,}",
            **{
                name: value
                for name, value in stage.settings.items()
                if value is not None and value is not False
            },
            "loss, first and last": " and ".join(f"{loss:.4g}" for loss in stage.losses) or None,
            "seconds": None if stage.seconds is None else f"{stage.seconds:,.0f}",
        }
        for stage in stages
    ]
    names = dict.fromkeys(name for column in columns for name, value in column.items() if value is not None)
    rows = [
        (name, *("" if column.get(name) is None else str(column[name]) for column in columns))
        for name in names
    ]
    return _table([("", *(stage.name for stage in stages)), *rows])


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


WHAT = """\
A text embedder by the method of *Following the Autoregressive Nature of LLM Embeddings via Compression and Alignment*
(AutoRegEmbed, Deng et al., EMNLP 2025): a causal language model compresses a text into k vectors, queries and documents
each under an instruction of their own, so that a query is near the documents that answer it.

- k = {k} compressed tokens, {dimension} dimensions (pooling `{pooling}`: {pooled}), {max_length} tokens of context
- I_next, for queries: {query_instruction}
- I_self, for documents: {document_instruction}
- {parameters} parameters: {architecture}{decoder}
- fingerprint `{fingerprint}`"""

LOADING = """## How to load it

```python
from autoregembed_rag import AutoRegEncoder  # pip install autoregembed-rag

encoder = AutoRegEncoder.from_pretrained(NAME)
queries = encoder.encode_queries(["Who wrote Faust?"])  # under I_next, float32 [1, DIMENSION]
documents = encoder.encode_documents(["Goethe wrote Faust."])  # under I_self, float32 [1, DIMENSION]
print(queries @ documents.T)  # cosines
```"""

DECODING = """```python
from autoregembed_rag import FrozenDecoder

decoder = FrozenDecoder.from_pretrained(NAME)  # the language model that reads the vectors
print(decoder.log_prob(encoder.compress(["Who wrote Faust?"], "next"), ["Goethe wrote Faust."]))
```"""

LANGCHAIN = """LangChain (`pip install "autoregembed-rag[langchain,faiss]"`):

```python
from langchain_autoregembed import AutoRegEmbeddings, AutoRegVectorStore

store = AutoRegVectorStore(AutoRegEmbeddings(model=NAME))
store.add_texts(["Goethe wrote Faust.", "Basalt is a volcanic rock."])
print(store.similarity_search("Who wrote Faust?", k=1))
```"""

LLAMA_INDEX = """LlamaIndex (`pip install "autoregembed-rag[llama-index,faiss]"`):

```python
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.embeddings.autoregembed import AutoRegEmbedding
from llama_index.vector_stores.autoregembed import AutoRegVectorStore

index = VectorStoreIndex.from_documents(
    [Document(text="Goethe wrote Faust."), Document(text="Basalt is a volcanic rock.")],
    storage_context=StorageContext.from_defaults(vector_store=AutoRegVectorStore()),
    embed_model=AutoRegEmbedding(model=NAME),
)
print(index.as_retriever(similarity_top_k=1).retrieve("Who wrote Faust?"))
```"""

SENTENCE_TRANSFORMERS = """sentence-transformers:

```python
from sentence_transformers import SentenceTransformer
from autoregembed_rag.sentence_transformers import AutoRegModule

model = SentenceTransformer(modules=[AutoRegModule.load(NAME)])
queries = model.encode_query(["Who wrote Faust?"])
documents = model.encode_document(["Goethe wrote Faust."])
print(model.similarity(queries, documents))
```"""
