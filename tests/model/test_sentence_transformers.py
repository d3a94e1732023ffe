"""Checkpoints opened by sentence-transformers."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.card import is_generated

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from autoregembed_rag.sentence_transformers import AutoRegModule

TEXTS = [
    "A quick fox.",
    "Oranges and lemons.\nAnd green peppers.",
    "",
    "</s> <EMBED0> are plain characters here <pad>",
    "a lone surrogate: \ud800",
    "far too long " * 200,
]
FILES = ["modules.json", "config_sentence_transformers.json"]


def open_model(folder: Path | str, **arguments) -> SentenceTransformer:
    arguments = {"device": "cpu", "model_kwargs": {"dtype": "float32"}, **arguments}
    return SentenceTransformer(str(folder), trust_remote_code=True, **arguments)


def load(folder: Path | str, **arguments) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, device="cpu", dtype="float32", **arguments)


def assert_same(vectors, expected):
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> SentenceTransformer:
    return open_model(tiny_checkpoint)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_queries_and_documents_have_the_encoders_vectors(model, encoder):
    assert_same(model.encode_query(TEXTS), encoder.encode_queries(TEXTS))
    assert_same(model.encode_document(TEXTS), encoder.encode_documents(TEXTS))
    assert_same(model.encode(TEXTS, prompt_name="query"), encoder.encode_queries(TEXTS))
    assert_same(model.encode(TEXTS, batch_size=2), encoder.encode_documents(TEXTS))
    assert not np.allclose(model.encode_query(TEXTS), model.encode_document(TEXTS), atol=1e-2)


def test_a_prompt_is_an_instruction_after_the_text(model, encoder):
    topic = "Name the topic."
    assert_same(model.encode(TEXTS, prompt=topic), encoder.encode(TEXTS, topic))
    rows = model.preprocess(TEXTS, prompt=topic)
    expected = encoder.prompts.build(TEXTS, topic).ids
    assert rows["attention_mask"].sum(1).tolist() == [*map(len, expected)]
    for row, ids in zip(rows["input_ids"].tolist(), expected, strict=True):
        assert row[: len(ids)] == ids


def test_an_empty_prompt_is_the_document_instruction(model, encoder):
    assert_same(model.encode(TEXTS, prompt=""), encoder.encode_documents(TEXTS))


def test_it_says_what_the_encoder_is(model, encoder):
    assert model.get_embedding_dimension() == encoder.dimension == 160
    assert model.max_seq_length == encoder.config.max_length
    assert model.similarity_fn_name == "cosine"
    queries, documents = encoder.encode_queries(TEXTS), encoder.encode_documents(TEXTS)
    assert_same(model.similarity(queries, documents), queries @ documents.T)


def test_truncated_to_whole_vectors_it_is_the_encoder_with_fewer_tokens(model, tiny_checkpoint):
    short = load(tiny_checkpoint, num_tokens=2)
    vectors = model.encode_query(TEXTS, truncate_dim=2 * 32, normalize_embeddings=True)
    assert_same(vectors, short.encode_queries(TEXTS))


def test_max_seq_length_is_max_length(tiny_checkpoint):
    model = open_model(tiny_checkpoint)
    model.max_seq_length = 60
    assert_same(model.encode_query(TEXTS), load(tiny_checkpoint, max_length=60).encode_queries(TEXTS))
    with pytest.raises(ValueError, match="exceeds the 128 positions"):
        model.max_seq_length = 1000
    assert model.max_seq_length == 60


def test_max_seq_length_leaves_the_model_as_it_is(checkpoint):
    """In training too, where dropout makes every pass another."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = open_model(checkpoint).train()
    state = torch.get_rng_state()
    model.max_seq_length = 60
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn, for no pass is made"
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="leaves no room for text within max_length=12"):
        model.max_seq_length = 12
    assert model.max_seq_length == 60


def test_cut_texts_are_reported_once(tiny_checkpoint, caplog):
    model = open_model(tiny_checkpoint)
    for _ in range(2):
        model.encode(TEXTS)
    (said,) = [line for line in caplog.messages if "were cut" in line]
    assert said.startswith("1 of 6 texts of a batch were cut to ")
    assert "max_seq_length" in said


def test_a_text_that_is_no_string_is_refused(model):
    for wrong in (7, ("two", "texts")):
        with pytest.raises((TypeError, ValueError), match=r"must be str|not support"):
            model.encode(["fine", wrong])


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])  # noqa: S301
def test_pickles_and_copies_embed_the_same(model, clone):
    """Processes of a pool get the model as a pickle."""
    np.testing.assert_array_equal(clone(model).encode_query(TEXTS), model.encode_query(TEXTS))


def test_a_device_map_of_one_device_places_the_model(tiny_checkpoint, encoder):
    where = {"device": None, "model_kwargs": {"dtype": "float32", "device_map": "cpu"}}
    model = open_model(tiny_checkpoint, **where)
    assert model.device.type == "cpu"
    assert_same(model.encode_query(TEXTS), encoder.encode_queries(TEXTS))


def test_another_dtype_is_loaded_on_request(tiny_checkpoint, encoder):
    model = open_model(
        tiny_checkpoint, model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"}
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    vectors = model.encode_query(TEXTS)
    assert vectors.dtype == np.float32
    assert ((vectors * encoder.encode_queries(TEXTS)).sum(1) > 0.99).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_kwargs": {"dtyp": "float32"}}, "takes no dtyp: model_kwargs may hold dtype"),
        ({"config_kwargs": {"hidden_size": 3}}, "takes no config_kwargs"),
        ({"model_kwargs": {"device_map": {"": 0}}}, "names one device here, such as 'cuda:1'"),
        ({"backend": "onnx"}, "backend=\"torch\" alone, not 'onnx'"),
    ],
)
def test_an_option_that_is_not_taken_is_named(wrong, message, tiny_checkpoint):
    with pytest.raises(ValueError, match=message):
        open_model(tiny_checkpoint, **wrong)


def test_without_the_flag_the_library_asks_for_it(tiny_checkpoint):
    """Since release 6, of every class that is not its own; a module alone needs no flag."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tiny_checkpoint), device="cpu")


def test_a_module_alone_brings_its_prompts(tiny_checkpoint, encoder):
    module = AutoRegModule.load(str(tiny_checkpoint), model_kwargs={"dtype": "float32"})
    model = SentenceTransformer(modules=[module], device="cpu")
    assert_same(model.encode_query(TEXTS), encoder.encode_queries(TEXTS))
    assert_same(model.encode(TEXTS, prompt_name="query"), encoder.encode_queries(TEXTS))
    assert_same(model.encode_document(TEXTS), encoder.encode_documents(TEXTS))


def test_the_callers_prompts_come_first(tiny_checkpoint, encoder):
    model = open_model(tiny_checkpoint, prompts={"query": "Name the topic."})
    assert_same(model.encode_query(TEXTS), encoder.encode(TEXTS, "Name the topic."))
    assert_same(model.encode_document(TEXTS), encoder.encode_documents(TEXTS))


def test_training_reaches_every_weight_and_lowers_the_loss(tiny_checkpoint):
    model = open_model(tiny_checkpoint).train()
    loss = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        sides = [model.preprocess(TEXTS[:3], prompt=model.prompts[name]) for name in ("query", "document")]
        value = loss(sides, torch.arange(3))
        optimizer.zero_grad()
        value.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_a_model_saved_by_the_library_is_a_whole_checkpoint(checkpoint, tmp_path):
    model = open_model(checkpoint, prompts={"query": "Name the topic."}, truncate_dim=64)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    model.save_pretrained(str(tmp_path / "saved"))
    encoder = load(tmp_path / "saved")
    assert_same(encoder.encode_queries(TEXTS)[:, :64], model.encode_query(TEXTS))
    assert_same(encoder.encode_documents(TEXTS)[:, :64], model.encode_document(TEXTS))
    assert encoder.config.decoder == str((checkpoint / "decoder").resolve())
    again = open_model(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode_query(TEXTS), model.encode_query(TEXTS))
    assert again.truncate_dim == 64
    card = tmp_path / "saved" / "README.md"
    assert is_generated(card), (
        "what is said of the weights that were loaded is replaced, and not taken for somebody's"
    )
    encoder.save_pretrained(tmp_path / "saved")
    assert encoder.fingerprint in card.read_text()


def test_weights_are_never_pickled(model, tmp_path):
    with pytest.raises(ValueError, match="safetensors, never pickled"):
        model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert not [*tmp_path.rglob("*.bin")]


def test_an_adapter_added_to_the_model_is_not_saved_as_the_checkpoints(tiny_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = open_model(tiny_checkpoint)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="--lora"):
        model.save_pretrained(str(tmp_path))


def test_an_older_checkpoint_gets_the_librarys_files_when_saved_again(checkpoint, tmp_path):
    before = load(checkpoint)
    for name in FILES:
        (checkpoint / name).unlink()
    assert load(checkpoint).fingerprint == before.fingerprint
    load(checkpoint).save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").fingerprint == before.fingerprint
    assert_same(open_model(tmp_path / "again").encode_query(TEXTS), before.encode_queries(TEXTS))


def test_other_instructions_are_the_saved_prompts(checkpoint, tmp_path):
    load(checkpoint, query_instruction="Où?").save_pretrained(tmp_path / "other")
    record = json.loads((tmp_path / "other" / FILES[1]).read_text())
    assert record["prompts"]["query"] == "Où?"
    model = open_model(tmp_path / "other")
    assert_same(model.encode_query(TEXTS), load(checkpoint).encode(TEXTS, "Où?"))


def test_a_hub_id_is_opened_at_its_revision_from_the_cache(tiny_checkpoint, encoder, tmp_path):
    """Two commits of a repository as the hub's client keeps them: the newer one has other weights."""
    repository = tmp_path / "models--org--tiny"
    commits = {"main": "b" * 40, "old": "a" * 40}
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
    load(tiny_checkpoint, pooling="mean").save_pretrained(repository / "snapshots" / commits["main"])
    where = {"cache_folder": str(tmp_path), "local_files_only": True}
    assert_same(
        open_model("org/tiny", revision="old", **where).encode_query(TEXTS), encoder.encode_queries(TEXTS)
    )
    assert open_model("org/tiny", **where).get_embedding_dimension() == 32


def test_mini_opens_from_its_folder():
    folder = Path(sys.modules["autoregembed_rag"].__file__).parent / "checkpoints" / "mini"
    encoder, model = load("mini"), open_model(folder)
    for ours, theirs in (
        (encoder.encode_queries(TEXTS), model.encode_query(TEXTS)),
        (encoder.encode_documents(TEXTS), model.encode_document(TEXTS)),
    ):
        assert ((ours * theirs).sum(axis=1) > 0.9999).all()


def test_a_missing_library_is_an_error_that_names_the_extra():
    check = "import sys; sys.modules['sentence_transformers'] = None; import autoregembed_rag.sentence_transformers"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)  # noqa: S603
    assert 'pip install "autoregembed-rag[sentence-transformers]"' in done.stderr
