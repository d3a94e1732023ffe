"""Somebody's own corpus: reading, splitting, rows for both stages, and what is held out."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_rag.config import DOCUMENT_INSTRUCTION, QUERY_INSTRUCTION
from autoregembed_rag.finetuning import corpus as corpus_module
from autoregembed_rag.finetuning.corpus import CorpusArguments, prepare, prepare_documents
from autoregembed_rag.finetuning.documents import Document, Section
from autoregembed_rag.finetuning.judged import Judged, read_judged
from autoregembed_rag.finetuning.kinds import corpus_kind
from autoregembed_rag.finetuning.passages import sentence_spans, split_documents
from autoregembed_rag.finetuning.queries import fold
from autoregembed_rag.training.data import AlignmentRow, alignment_rows, compression_rows

BEIR = Path(__file__).parents[2].parent / "shared" / "data" / "beir"


def count_tokens(texts):
    """Four characters to a token."""
    return [(len(text) + 3) // 4 for text in texts]


def arguments(**changes) -> CorpusArguments:
    return CorpusArguments(**{"count_tokens": count_tokens, "max_tokens": 100, **changes})


WORDS = ["river", "stone", "lemon", "orchard", "engine", "pressure", "valve", "harbour", "signal", "copper"]


def made_up(n: int, sentences: int = 4, seed: int = 0) -> list[Document]:
    """Documents of random sentences; no two are alike."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(["The", *rng.choices(WORDS, k=8), f"of number{rng.randrange(10**6)}."])

    return [
        Document(
            f"d{i}",
            f"About the {rng.choice(WORDS)} of place{i:03}",
            (Section((), " ".join(sentence() for _ in range(sentences))),),
        )
        for i in range(n)
    ]


# ---- splitting


def squeezed(text: str) -> str:
    return "".join(text.split())


TEXT = st.text(alphabet="aB1 .\n!?。é-", min_size=1, max_size=400).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), st.text(alphabet="Tt ", max_size=60), st.integers(1, 30))
def test_splitting_loses_nothing_but_white_space_and_every_passage_fits(texts, title, max_tokens):
    title = title.strip()
    documents = [
        Document(f"{i}", title, (Section(("Head",), text), Section((), text))) for i, text in enumerate(texts)
    ]
    passages = split_documents(documents, count_tokens=count_tokens, max_tokens=max_tokens)
    assert max(count_tokens([p.content for p in passages])) <= max_tokens
    assert len({p.id for p in passages}) == len(passages)
    for document, text in zip(documents, texts, strict=True):
        found = [p for p in passages if p.document == document.id]
        assert all(p.text == p.text.strip() != "" for p in found)
        # A title or heading too long to be kept with every passage is the beginning of the text instead.
        for headings, before in ((("Head",), f"{title}Head"), ((), title)):
            kept = "".join(p.text for p in found if (p.title, p.headings) == (title, headings))
            if squeezed(kept) != squeezed(text):
                assert squeezed(f"{before}{text}") in squeezed("".join(p.text for p in found))


def test_a_long_section_is_cut_at_paragraphs_then_sentences_and_keeps_its_title():
    sentences = [f"Sentence number {i} is about as long as all the others." for i in range(8)]
    text = "\n\n".join(" ".join(sentences[i : i + 4]) for i in (0, 4))
    document = Document("d", "Title", (Section(("Part one",), text),))
    for max_tokens, pieces in ((60, 2), (32, 4), (20, 8)):
        passages = split_documents([document], count_tokens=count_tokens, max_tokens=max_tokens)
        size = 8 // pieces
        assert [p.text for p in passages] == [" ".join(sentences[i : i + size]) for i in range(0, 8, size)]
        assert {(p.title, p.headings) for p in passages} == {("Title", ("Part one",))}
    assert [p.id for p in passages] == [f"d#{i}" for i in range(8)]


def test_halves_are_as_alike_as_the_sentences_allow():
    sentences = [f"Sentence number {i} is about as long as all the others." for i in range(8)]
    document = Document("d", "", (Section((), " ".join(sentences)),))
    passages = split_documents([document], count_tokens=count_tokens, max_tokens=100)
    assert [p.text for p in passages] == [" ".join(sentences[:4]), " ".join(sentences[4:])]


def test_passages_fit_a_real_tokenizer(encoder):
    documents = made_up(3, sentences=30)
    limit = encoder.max_text_tokens
    passages = split_documents(documents, count_tokens=encoder.count_tokens, max_tokens=limit)
    assert limit // 3 < max(encoder.count_tokens([p.content for p in passages])) <= limit


def test_sentences_end_at_stops_and_not_at_abbreviations():
    text = "The flow . a method, see Fig. 3 of Smith et al. in print. J. Smith (e.g. here) said so! 1.5 is it? Yes"
    assert [text[a:b] for a, b in sentence_spans(text)] == [
        "The flow .",
        "a method, see Fig. 3 of Smith et al. in print.",
        "J. Smith (e.g. here) said so!",
        "1.5 is it?",
        "Yes",
    ]
    assert [text[a:b] for text in ["今日は。明日も。"] for a, b in sentence_spans(text)] == [
        "今日は。",
        "明日も。",
    ]


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"held_out": 0}, {"held_out": 1.0}])
def test_settings_are_checked_where_they_are_made(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        arguments(**changes)


# ---- rows without labels


def test_no_query_stands_in_its_row_and_each_kind_is_made():
    documents = [
        *made_up(20),
        Document(
            "m",
            "Pods",
            (
                Section(
                    ("Restart policy",),
                    "A container that ends is started again. The wait doubles every time.",
                ),
                Section(
                    ("Limits",),
                    "A container may not use more memory than it is allowed. It is ended if it does.",
                ),
            ),
        ),
    ]
    prepared = prepare_documents(documents, arguments(held_out=0.01))
    rows = {row.query: row.pos for row in prepared.alignment}
    assert rows["Restart policy"].startswith("Pods\nA container that ends")
    assert rows["Pods: Limits"].startswith("A container may not use")
    title = next(d.title for d in documents if d.title in rows)
    first = next(d for d in documents if d.title == title)
    assert rows[title] == first.sections[0].text
    sentence = next(query for query in rows if query in first.sections[0].text)
    assert rows[sentence].startswith(f"{title}\n")
    assert all(fold(row.query) not in fold(row.pos) for row in prepared.alignment)
    assert prepared.counts["title pairs"] == 20
    assert max(sum(r.pos == pos for r in prepared.alignment) for pos in rows.values()) <= 3


def test_a_heading_asks_for_the_beginning_of_its_section_and_finds_all_of_it():
    documents = [
        Document(
            d.id,
            f"Work {d.id}",
            (
                Section((f"Heading of {d.id}",), d.sections[0].text),
                Section(("See also",), other.sections[0].text),
            ),
        )
        for d, other in zip(made_up(20, sentences=12), made_up(20, seed=1), strict=True)
    ]
    prepared = prepare_documents(documents, arguments())
    own = [row for row in prepared.alignment if row.query.startswith("Heading of")]
    # A heading that many documents share needs the title beside it, which then is not in the text.
    shared = [row for row in prepared.alignment if row.query.endswith(": See also")]
    assert len(own) == len(shared) == 18
    assert prepared.counts["heading pairs"] == 36
    assert all(row.pos.startswith("Work d") for row in own)
    assert all(row.query.startswith("Work d") and row.pos.startswith("The ") for row in shared)
    passages = split_documents(documents, count_tokens=count_tokens, max_tokens=100)
    sections = [name for name in prepared.evaluation.queries if name.startswith("heading of ")]
    assert len(sections) == 2
    for name in sections:
        heading = prepared.evaluation.queries[name].split(": ")[-1]
        document = name.removeprefix("heading of ")
        section = {p.id for p in passages if (p.document, p.headings) == (document, (heading,))}
        assert prepared.evaluation.qrels[name].keys() == section


def test_stage_one_reconstructs_each_passage_and_writes_it_from_a_query():
    prepared = prepare_documents(made_up(10), arguments(held_out=0.1))
    itself = [row for row in prepared.compression if row.instruction == DOCUMENT_INSTRUCTION]
    answers = [row for row in prepared.compression if row.instruction == QUERY_INSTRUCTION]
    assert len(itself) == len(answers) == 9
    assert all(row.context == row.output for row in itself)
    assert {(row.context, row.output) for row in answers} <= {(r.query, r.pos) for r in prepared.alignment}
    other = prepare_documents(made_up(10), arguments(query_instruction="next", document_instruction="self"))
    assert {row.instruction for row in other.compression} == {"next", "self"}


def test_rows_pass_the_checks_of_training(tmp_path):
    prepared = prepare_documents(made_up(10), arguments())
    assert len(alignment_rows(prepared.alignment)) == len(prepared.alignment)
    assert len(compression_rows(prepared.compression)) == len(prepared.compression)


def test_what_could_answer_for_two_documents_is_no_query():
    shared = "The authors declare that they have no competing interests whatsoever."
    documents = [
        Document(
            d.id, "A shared title" if i < 3 else d.title, (Section((), f"{d.sections[0].text} {shared}"),)
        )
        for i, d in enumerate(made_up(10))
    ]
    prepared = prepare_documents(documents, arguments(max_tokens=200))
    queries = {row.query for row in prepared.alignment} | {*prepared.evaluation.queries.values()}
    assert queries
    assert queries.isdisjoint({shared, "A shared title"})


def test_short_endless_linked_and_numeric_sentences_are_not_asked_for():
    poor = [
        "Tail{i} it is.",
        f"Tail{{i}} is {'one of those sentences that never come to an end ' * 7}.",
        "Tail{i} is at https://example.org/a-long-enough-link for all of the rest.",
        "Tail{i} 1.0 2.0 3.0 (0.5 0.6) is a table of numbers and of many more of them, p = 7 8 9 10 11 12 13 14 15.",
    ]
    documents = [
        Document(
            d.id, "", (Section((), " ".join([d.sections[0].text, *(text.format(i=i) for text in poor)])),)
        )
        for i, d in enumerate(made_up(30, sentences=6))
    ]
    queries = [row.query for row in prepare_documents(documents, arguments(max_tokens=400)).alignment]
    assert queries
    assert not [query for query in queries if query.startswith("Tail")]


def test_repeated_and_near_empty_passages_are_left_out():
    documents = made_up(6)
    again = Document("again", "Another title", documents[0].sections)
    short = Document("short", "A fine title", (Section((), "Too short."),))
    prepared = prepare_documents([*documents, again, short], arguments())
    assert (
        prepared.counts["repeated passages left out"] == prepared.counts["near-empty passages left out"] == 1
    )
    assert prepared.counts["passages"] == 6
    texts = " ".join(row.context for row in prepared.compression)
    assert "Another title" not in texts
    assert "Too short" not in texts


# ---- what is held out


def trained_texts(prepared) -> list[str]:
    """Every text of every row, folded."""
    rows = [(row.context, row.output) for row in prepared.compression]
    rows += [(row.query, row.pos, *row.neg) for row in prepared.alignment]
    return [fold(text) for row in rows for text in row]


@pytest.mark.parametrize("seed", range(3))
def test_no_text_of_a_held_out_document_is_trained_on(seed):
    documents = made_up(30, sentences=12)
    prepared = prepare_documents(documents, arguments(seed=seed, held_out=0.3))
    held_out = {query.removeprefix("title of ") for query in prepared.evaluation.queries if "title" in query}
    assert len(held_out) == prepared.counts["documents held out"] == 9
    trained = "\n".join(trained_texts(prepared))
    for document in documents:
        text = document.sections[0].text
        pieces = [fold(document.title), *(fold(text[a:b]) for a, b in sentence_spans(text))]
        assert any(piece in trained for piece in pieces) == (document.id not in held_out)


def test_every_passage_is_searched_without_title_and_held_out_sentence():
    documents = made_up(30, sentences=12)
    evaluation = prepare_documents(documents, arguments(held_out=0.3)).evaluation
    passages = split_documents(documents, count_tokens=count_tokens, max_tokens=100)
    assert list(evaluation.corpus) == [p.id for p in passages]
    kinds = {name.split(" of ")[0] for name in evaluation.queries}
    assert kinds == {"title", "sentence"}
    for name, query in evaluation.queries.items():
        relevant = evaluation.qrels[name]
        assert not any(fold(query) in fold(evaluation.corpus[text]) for text in relevant)
        document = name.split(" of ")[1]
        of_document = {p.id for p in passages if p.document == document}
        assert relevant.keys() == of_document if name.startswith("title") else relevant.keys() < of_document
    untouched = [p for p in passages if evaluation.corpus[p.id] == p.text]
    assert len(passages) - len(untouched) == 9


def test_the_same_seed_gives_the_same_and_another_seed_another_choice():
    first, again, other = (prepare_documents(made_up(30), arguments(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.evaluation.queries != other.evaluation.queries
    assert first.alignment != other.alignment


def test_a_large_corpus_is_held_out_and_searched_only_so_far(monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_HELD_OUT", 2)
    monkeypatch.setattr(corpus_module, "MAX_SEARCHED", 10)
    prepared = prepare_documents(made_up(40), arguments(held_out=0.5))
    assert prepared.counts["documents held out"] == 2
    assert len(prepared.evaluation.corpus) == prepared.counts["texts searched"] == 10


def test_one_document_cannot_be_both_trained_on_and_held_out():
    with pytest.raises(ValueError, match="made of 1 of 1 documents, training and holding out need two"):
        prepare_documents(made_up(1), arguments())
    two = prepare_documents(made_up(2), arguments(held_out=0.9))
    assert two.alignment
    assert two.evaluation.queries


def test_an_evaluation_without_a_single_query_says_what_to_do():
    """Titles stand in the second passage of their documents, and there are no sentences."""
    documents = [
        Document(name, f"Gizmo of {name}", (Section((), f"{f'{name} ' * 80} Gizmo of {name} in all"),))
        for name in ("first", "second", "third")
    ]
    with pytest.raises(
        ValueError, match=r"nothing can be asked about the 1 held-out documents .* --held-out"
    ):
        prepare_documents(documents, arguments(max_tokens=60))


def test_an_id_that_is_not_unicode_is_refused_by_name():
    for make in (lambda: Document("a\ud800", "", ()), lambda: Judged({"d": "x"}, {"a\ud800": "y"}, {}, {})):
        with pytest.raises(ValueError, match=r"the id 'a\\ud800' holds a lone surrogate"):
            make()


# ---- labels


def write_pairs(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_pairs_keep_their_rows_but_for_every_text_of_a_held_out_query(tmp_path):
    rows = [{"query": f"question {i // 2}", "pos": f"answer {i}", "neg": [f"wrong {i}"]} for i in range(40)]
    rows.append({"query": "question 99", "pos": "Question 3.", "neg": [f"question {i}" for i in range(4, 8)]})
    file = write_pairs(tmp_path / "pairs.jsonl", rows)
    assert corpus_kind(file) == "pairs"
    for seed in range(5):
        prepared = prepare(file, arguments(held_out=0.2, seed=seed))
        evaluation = prepared.evaluation
        assert prepared.kind == "pairs"
        assert len(evaluation.queries) == 4
        assert len(evaluation.corpus) == 40 + 40 + 5
        held_out = {fold(text) for text in evaluation.queries.values()}
        assert held_out.isdisjoint(trained_texts(prepared))
        kept = {row.pos for row in prepared.alignment}
        expected = [
            row for row in rows if held_out.isdisjoint(map(fold, (row["query"], row["pos"], *row["neg"])))
        ]
        assert prepared.alignment == [AlignmentRow(r["query"], r["pos"], tuple(r["neg"])) for r in expected]
        answers = {evaluation.corpus[text] for grades in evaluation.qrels.values() for text in grades}
        assert answers.isdisjoint(kept)
        assert {row.output for row in prepared.compression} == kept


def write_beir(folder: Path, *, dev: bool) -> Path:
    (folder / "qrels").mkdir(parents=True)
    write_pairs(
        folder / "corpus.jsonl",
        [
            {"_id": f"d{i}", "title": f"Title {i}", "text": f"Text of scientific paper {i}."}
            for i in range(30)
        ],
    )
    write_pairs(
        folder / "queries.jsonl",
        [{"_id": f"q{i}", "text": f"query number {i % 9}"} for i in range(12)]
        + [{"_id": "t", "text": "a test query"}],
    )
    head = "query-id\tcorpus-id\tscore\n"
    train = "".join(f"q{i}\td{d}\t{1 + (d == i)}\n" for i in range(10) for d in range(i, i + 12))
    (folder / "qrels" / "train.tsv").write_text(f"{head}{train}q0\td20\t0\nq0\tgone\t2\nq11\td3\t0\n")
    (folder / "qrels" / "test.tsv").write_text(f"{head}t\td29\t1\n")
    if dev:
        (folder / "qrels" / "dev.tsv").write_text(f"{head}q10\td5\t1\nq11\td6\t2\nq11\td7\t0\n")
    return folder


def test_a_judged_corpus_trains_on_train_and_holds_out_dev(tmp_path, caplog):
    folder = write_beir(tmp_path / "set", dev=True)
    assert corpus_kind(folder) == "beir"
    prepared = prepare(folder, arguments())
    assert prepared.evaluation.queries == {"q10": "query number 1", "q11": "query number 2"}
    assert prepared.evaluation.qrels == {"q10": {"d5": 1}, "q11": {"d6": 2, "d7": 0}}
    assert len(prepared.evaluation.corpus) == 30
    queries = {row.query for row in prepared.alignment}
    assert queries == {f"query number {i}" for i in (0, 3, 4, 5, 6, 7, 8)}
    assert "a test query" not in str(prepared.compression)
    of_first = [row for row in prepared.alignment if row.query == "query number 0"]
    # Ten of q0's twelve positives, the best graded first, and ten of q9's, which has the same text.
    assert len(of_first) == 20
    assert of_first[0].pos == "Title 0\nText of scientific paper 0."
    assert of_first[0].neg == ("Title 20\nText of scientific paper 20.",)
    assert "judges 1 documents that are not in corpus.jsonl" in caplog.text
    itself = [row for row in prepared.compression if row.instruction == DOCUMENT_INSTRUCTION]
    assert len(itself) == 30


def test_a_judged_corpus_without_dev_holds_out_queries_by_their_text(tmp_path):
    folder = write_beir(tmp_path / "set", dev=False)
    for seed in range(6):
        prepared = prepare(folder, arguments(held_out=0.4, seed=seed))
        held_out = {*prepared.evaluation.queries.values()}
        assert "q11" not in prepared.evaluation.queries  # nothing is relevant for it
        assert len(prepared.evaluation.queries) == 4
        assert held_out.isdisjoint(row.query for row in prepared.alignment)
        assert held_out.isdisjoint(row.context for row in prepared.compression)


def test_a_corpus_without_train_judgements_is_documents_alone(tmp_path):
    folder = write_beir(tmp_path / "set", dev=True)
    unlabelled = prepare(folder, arguments(max_tokens=50), use_labels=False)
    (folder / "qrels" / "train.tsv").unlink()
    assert corpus_kind(folder) == "beir without labels"
    prepared = prepare(folder, arguments(max_tokens=50))
    assert prepared == unlabelled
    assert prepared.counts["documents"] == 30
    assert "query number" not in str(prepared)


@pytest.mark.parametrize(
    ("start", "first"),
    [
        ("query-id\tcorpus-id\tscore\n", ""),
        ("\ufeffquery-id\tcorpus-id\tscore\r\n", ""),
        ("qid\tdocid\trel\n", ""),
        ("", "query-id-0"),
        ("\ufeff", "query-id-0"),
    ],
)
def test_only_a_line_without_a_grade_is_the_header_of_judgements(tmp_path, start, first):
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    names = [first or "q0", "q1"]
    write_pairs(folder / "corpus.jsonl", [{"_id": "d", "text": "A text."}])
    write_pairs(folder / "queries.jsonl", [{"_id": name, "text": f"about {name}"} for name in names])
    judgements = "".join(f"{name}\td\t1\n" for name in names)
    (folder / "qrels" / "train.tsv").write_text(start + judgements, encoding="utf-8")
    assert read_judged(folder).train == {name: {"d": 1} for name in names}


def test_queries_that_equal_all_their_documents_are_no_rows_and_the_error_says_so(tmp_path):
    folder = write_beir(tmp_path / "set", dev=False)
    texts = [{"_id": f"q{i}", "text": f"Title {i}\nText of scientific paper {i}."} for i in range(12)]
    write_pairs(folder / "queries.jsonl", texts)
    (folder / "qrels" / "train.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(10)))
    with pytest.raises(ValueError, match=r"9 training queries has the very text .* --no-labels"):
        prepare(folder, arguments())


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        (
            "qrels/train.tsv",
            "caf\udce9\td1\t1\n",
            r"train\.tsv, line 125: broken UTF-8; save the file as UTF-8",
        ),
        ("qrels/train.tsv", "q1\td1\n", r"train\.tsv, line 125: expected query-id, corpus-id"),
        ("qrels/train.tsv", "nobody\td1\t1\n", r"line 125: query 'nobody' is not in queries\.jsonl"),
        (
            "queries.jsonl",
            '\n{"_id": "q1", "text": "x"}',
            r"queries\.jsonl, line 14: the _id 'q1' occurs twice",
        ),
        ("queries.jsonl", '\n{"_id": "q99"}', r"queries\.jsonl, line 14: field 'text' must be a text"),
    ],
)
def test_a_broken_judged_corpus_is_named_by_file_and_line(tmp_path, file, line, complaint):
    folder = write_beir(tmp_path / "set", dev=False)
    with (folder / file).open("a", encoding="utf-8", errors="surrogateescape") as out:
        out.write(line)
    with pytest.raises(ValueError, match=complaint):
        prepare(folder, arguments())


def test_a_path_of_no_known_kind_is_told_what_it_may_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; a path to fine-tune on is one of"):
        prepare(tmp_path / "none", arguments())
    with pytest.raises(ValueError, match="holds no documents; a path to fine-tune on is one of"):
        prepare(tmp_path, arguments())
    odd = write_pairs(tmp_path / "odd.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(
        ValueError, match=r"fields \['answer', 'question'\]; a path to fine-tune on is one of"
    ):
        prepare(odd, arguments())
    (tmp_path / "model.bin").write_bytes(b"0")
    with pytest.raises(ValueError, match="of an unknown kind; a path to fine-tune on is one of"):
        prepare(tmp_path / "model.bin", arguments())


@pytest.mark.parametrize("name", ["nfcorpus", "cranfield"])
def test_real_documents_give_rows_of_both_kinds_and_leak_nothing(name, tmp_path):
    source = BEIR / name / "corpus.jsonl"
    if not source.is_file():
        pytest.skip(f"{source} is not here")
    with source.open(encoding="utf-8") as lines:
        (tmp_path / "corpus.jsonl").write_text("".join(islice(lines, 300)), encoding="utf-8")
    prepared = prepare(tmp_path, arguments(max_tokens=400))
    counts = prepared.counts
    assert counts["documents"] == 300
    assert counts["title pairs"] > 0.8 * (counts["documents"] - counts["documents held out"])
    assert counts["sentence pairs"] > counts["documents"]
    assert {*trained_texts(prepared)}.isdisjoint(map(fold, prepared.evaluation.queries.values()))
    assert all(fold(row.query) not in fold(row.pos) for row in prepared.alignment)
