"""GenerativeReranker: its scores from separate log-probabilities, its priors, and where they are kept."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregembed_rag import AutoRegEncoder, FrozenDecoder, GenerativeReranker, reranking

QUERY = "what protects sailors?"
DOCUMENTS = [
    "Vitamin C is found in oranges.",
    "",
    "the quick brown fox 🙂",
    "A reader writes the answer. " * 3,
]


class Notes:
    """A cache in memory that counts."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self.kept: dict[tuple[str, str], float] = {}

    def cached(self, name, texts):
        return np.array([self.kept.get((name, text), np.nan) for text in texts], dtype=np.float32)

    def cache(self, name, texts, numbers):
        assert not self.read_only
        self.kept |= {(name, text): number for text, number in zip(texts, numbers, strict=True)}


@pytest.fixture
def make(encoder: AutoRegEncoder, decoder: FrozenDecoder):
    return lambda **options: GenerativeReranker(encoder, decoder, **options)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("prior", ["none", "document", "unconditional"])
def test_a_score_is_the_log_probability_less_the_prior(make, encoder, decoder, prior, per_token):
    found = make(prior=prior, per_token=per_token).scores(QUERY, DOCUMENTS)
    assert found.dtype == np.float32
    for score, document in zip(found, DOCUMENTS, strict=True):
        expected = decoder.log_prob(encoder.compress([QUERY], "next"), [document])[0]
        if prior == "document":
            expected -= decoder.log_prob(encoder.compress([document], "self"), [document])[0]
        if prior == "unconditional":
            expected -= decoder.log_prob(None, [document])[0]
        if per_token:
            expected /= len(decoder.target_ids([document])[0])
        assert score == pytest.approx(expected, abs=2e-4)


def test_ranking_is_best_first_and_keeps_the_order_of_equals(make):
    reranker = make(weight=None)
    twice = [*DOCUMENTS, DOCUMENTS[0]]
    ranked = reranker.rank(QUERY, twice)
    scores = reranker.scores(QUERY, twice)
    assert [place for place, _ in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert [score for _, score in ranked] == sorted(scores.tolist(), reverse=True)
    assert reranker.rank(QUERY, twice, top_n=2) == ranked[:2]
    assert reranker.rank(QUERY, twice, score_threshold=ranked[2][1]) == ranked[:3]


@pytest.mark.parametrize("weight", [0, 0.25, 1, 100])
def test_a_weight_fuses_the_ranking_with_the_order_of_the_documents(make, weight):
    alone = [place for place, _ in make(weight=None).rank(QUERY, DOCUMENTS)]
    expected = [1 / (61 + place) + weight / (61 + alone.index(place)) for place in range(len(DOCUMENTS))]
    ranked = make(weight=weight).rank(QUERY, DOCUMENTS)
    assert {place: pytest.approx(score) for place, score in enumerate(expected)} == dict(ranked)
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    if weight in (0, 100):
        assert [place for place, _ in ranked] == (alone if weight else [*range(len(DOCUMENTS))])
    threshold = make().scores(QUERY, DOCUMENTS)[alone[1]]
    kept = make(weight=weight).rank(QUERY, DOCUMENTS, score_threshold=threshold)
    assert {place for place, _ in kept} == {*alone[:2]}


def test_nothing_to_rank_is_nothing_ranked(make):
    for prior in ("none", "document", "unconditional"):
        assert make(prior=prior).scores(QUERY, []).shape == (0,)
        assert make(prior=prior).rank(QUERY, []) == []


def test_batches_change_no_score(make):
    np.testing.assert_allclose(
        make(batch_size=1).scores(QUERY, DOCUMENTS), make().scores(QUERY, DOCUMENTS), atol=1e-5
    )


def test_documents_longer_than_the_context_are_cut_and_reported(make, caplog):
    with caplog.at_level(logging.WARNING, "autoregembed_rag"):
        found = make(prior="none").scores(QUERY, ["fox " * 3000, "fox"])
    assert np.isfinite(found).all()
    assert "1 of 2 documents were cut" in caplog.text


@pytest.mark.parametrize("prior", ["document", "unconditional"])
def test_one_warning_counts_what_is_cut_however_many_steps_cut_it(make, prior, caplog, monkeypatch):
    monkeypatch.setattr(reranking, "CHUNK", 1)
    documents = ["fox " * 3000, "fox", "dog " * 3000]
    with caplog.at_level(logging.WARNING, "autoregembed_rag"):
        make(prior=prior).rank("who? " * 3000, documents)
        make(prior=prior).priors(documents)
        make(prior=prior).rank("who? " * 3000, documents[1:2])
        make(prior=prior).rank(QUERY, documents[1:2])
    messages = [record.message for record in caplog.records]
    assert [message.partition(" (")[0] for message in messages] == [
        "2 of 3 documents and the query were cut",
        "2 of 3 documents were cut",
        "the query was cut",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "autoregembed_rag"):
        make().encoder.compress(documents)
    assert "2 of 3 texts were cut to" in caplog.text, "without a reranker each step warns as before"


@pytest.mark.parametrize("prior", ["document", "unconditional"])
def test_a_prior_is_computed_once_where_there_is_a_cache(make, prior, monkeypatch):
    notes = Notes()
    reranker = make(prior=prior, cache=notes)
    first = reranker.scores(QUERY, DOCUMENTS[:2])
    assert len(notes.kept) == 2
    np.testing.assert_array_equal(reranker.scores(QUERY, DOCUMENTS)[:2], first)
    assert len(notes.kept) == 4
    monkeypatch.setattr(reranker, "_compute_priors", None)  # whoever calls it fails
    np.testing.assert_allclose(reranker.priors(DOCUMENTS), make(prior=prior).priors(DOCUMENTS), atol=1e-5)


def test_priors_of_other_settings_are_other_priors(make):
    notes = Notes()
    for prior in ("document", "unconditional"):
        for per_token in (True, False):
            make(prior=prior, per_token=per_token, cache=notes).priors(["fox"])
    assert len({*notes.kept.values()}) == len(notes.kept) == 4


def test_whatever_changes_a_prior_changes_the_name_under_which_it_is_kept(
    tiny_checkpoint, encoder, tiny_base, monkeypatch
):
    decoder = FrozenDecoder.from_pretrained(tiny_base, device="cpu", dtype="float32")
    half = AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert half.fingerprint == encoder.fingerprint
    notes = Notes()

    def names(with_encoder=encoder) -> int:
        GenerativeReranker(with_encoder, decoder, prior="document", cache=notes).priors(["fox"])
        GenerativeReranker(with_encoder, decoder, prior="unconditional", cache=notes).priors(["fox"])
        return len(notes.kept)

    assert names() == names() == 2
    assert names(half) == 3, "the encoder's precision decides the prior of a document given itself alone"
    monkeypatch.setattr(encoder, "_load_arguments", {**encoder._load_arguments, "quantize": "int8"})
    assert names() == 4
    monkeypatch.undo()
    decoder.tokenizer.bos_token = "fox"  # noqa: S105
    assert names() == 6
    decoder.tokenizer.eos_token = decoder.tokenizer.pad_token
    assert names() == 8
    monkeypatch.setattr(decoder, "max_target_tokens", 7)
    assert names() == 10
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight.mul_(1.5)
    assert names() == 12


def test_a_pickle_opens_encoder_and_decoder_again(make, monkeypatch):
    reranker = make(prior="document", per_token=False, weight=None)
    pickled = pickle.dumps(reranker)
    assert len(pickled) < 3_000
    twin = pickle.loads(pickled)  # noqa: S301
    assert twin.rank(QUERY, DOCUMENTS) == reranker.rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prior": "self"}, "prior must be one of none, document, unconditional, not 'self'"),
        ({"weight": "much"}, "weight must be a number of at least 0, or None, not 'much'"),
        ({"weight": -1}, "weight must be a number of at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"cache": "index"}, "priors are kept in a DocumentIndex, or with None nowhere, not in 'index'"),
        ({"model": 3}, "model must be a name, a folder or a ready AutoRegEncoder, not int"),
        ({"model": None}, "model must be a name, a folder or a ready AutoRegEncoder, not NoneType"),
        ({"decoder": 3}, "decoder must be a name, a folder or a ready FrozenDecoder, not int"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(wrong, message, monkeypatch):
    monkeypatch.setattr(AutoRegEncoder, "from_pretrained", None)  # whoever calls it fails
    monkeypatch.setattr(FrozenDecoder, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        GenerativeReranker.from_pretrained(**{"model": "mini", **wrong})


def test_a_cache_that_is_read_only_is_left_alone(make):
    reranker = make(cache=Notes(read_only=True))
    np.testing.assert_allclose(reranker.priors(DOCUMENTS), make().priors(DOCUMENTS), atol=1e-6)


def test_a_checkpoint_without_a_decoder_says_how_to_get_one(tiny_checkpoint: Path, tiny_base, tmp_path):
    orphan = tmp_path / "orphan"
    AutoRegEncoder.from_base(tiny_base, device="cpu").save_pretrained(orphan)
    record = (orphan / "autoregembed.json").read_text(encoding="utf-8")
    (orphan / "autoregembed.json").write_text(
        "\n".join(line for line in record.splitlines() if '"decoder"' not in line).replace(
            'text.",\n}', 'text."\n}'
        ),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r'does not name its decoder: pass the base.*under "decoder"'):
        GenerativeReranker.from_pretrained(orphan, device="cpu")
    named = GenerativeReranker.from_pretrained(orphan, tiny_base, device="cpu", dtype="float32")
    assert named.scores(QUERY, ["fox"]).shape == (1,)


def test_a_decoder_that_is_gone_is_named(tiny_base, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    AutoRegEncoder.from_base(base, device="cpu").save_pretrained(tmp_path / "model")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"names the decoder .*base.*put it back"):
        GenerativeReranker.from_pretrained(tmp_path / "model", device="cpu")


def test_a_decoder_of_another_width_is_refused(encoder, decoder, monkeypatch):
    monkeypatch.setattr(type(decoder), "hidden_size", 48)
    with pytest.raises(ValueError, match="have 32 entries and the decoder reads 48"):
        GenerativeReranker(encoder, decoder)


def test_an_unknown_prior_is_refused(make):
    with pytest.raises(ValueError, match="prior must be one of none, document, unconditional, not 'self'"):
        make(prior="self")


def test_a_weight_that_makes_no_sense_is_refused(make):
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight must be a number of at least 0, or None, not {weight}"):
            make(weight=weight)


def test_priors_are_kept_as_they_are_computed(make, monkeypatch):
    monkeypatch.setattr(reranking, "CHUNK", 2)
    notes = Notes()
    reranker = make(cache=notes)
    expected = make().priors(DOCUMENTS)
    compute = reranker._compute_priors
    monkeypatch.setattr(
        reranker, "_compute_priors", lambda texts, show: None if notes.kept else compute(texts, show)
    )
    with pytest.raises(TypeError):
        reranker.priors(DOCUMENTS)
    assert list(notes.kept.values()) == pytest.approx(expected[:2])
    monkeypatch.undo()
    np.testing.assert_allclose(make(cache=notes).priors(DOCUMENTS), expected, atol=1e-5)


def test_log_probabilities_that_are_not_finite_are_an_error(make, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "log_prob", lambda _, texts, **__: np.full(len(texts), np.nan))
    with pytest.raises(ValueError, match=r"not finite in torch.float32: load it in another dtype"):
        make().scores(QUERY, DOCUMENTS)
