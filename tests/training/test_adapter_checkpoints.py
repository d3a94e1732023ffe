"""Checkpoints that hold an adapter alone: saving, merging, going on, fingerprints, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_models import BASES, TEXTS, K, adapter_weights, disturb, load, pair
from safetensors.torch import load_file, save_file
from tiny_models import write_base
from transformers import AutoTokenizer

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.fingerprint import weights_digest
from autoregembed_rag.passes import compressed_states
from autoregembed_rag.prompt import pad_right
from autoregembed_rag.training.lora import LoraArguments

pytest.importorskip("peft")


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> tuple[AutoRegEncoder, Path]:
    """An encoder whose adapter has moved, and the folder it is saved in; the base lies inside."""
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_base, folder / "decoder")
    encoder, _ = pair(folder / "decoder")
    disturb(encoder)
    encoder.save_pretrained(folder)
    return encoder, folder


def test_a_saved_adapter_is_small_and_loads_merged(trained):
    encoder, folder = trained
    files = {file.name for file in folder.iterdir() if file.is_file()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "autoregembed.json",
        "tokenizer.json",
    } <= files
    assert not files & {"config.json", "model.safetensors", "README.md"}
    assert not any("base_layer" in name for name in load_file(folder / "adapter_model.safetensors"))
    loaded = load(folder)
    np.testing.assert_allclose(loaded.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert not loaded.has_adapter
    assert FrozenDecoder.from_pretrained(folder, device="cpu").hidden_size == encoder.hidden_size


def test_an_adapter_saved_over_a_whole_checkpoint_takes_its_generated_card_away(trained, tmp_path: Path):
    encoder, folder = trained
    load(folder).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").exists()
    encoder.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
    (tmp_path / "out" / "README.md").write_text("mine")
    encoder.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_saved_adapter_opens_in_sentence_transformers(trained):
    library = pytest.importorskip("sentence_transformers")
    encoder, folder = trained
    arguments = {"device": "cpu", "model_kwargs": {"dtype": "float32"}}
    model = library.SentenceTransformer(str(folder), trust_remote_code=True, **arguments)
    np.testing.assert_allclose(model.encode_query(TEXTS), encoder.encode_queries(TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode_document(TEXTS), encoder.encode_documents(TEXTS), atol=1e-5)


@pytest.mark.parametrize("family", BASES)
def test_merge_on_save_writes_a_plain_checkpoint(family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder, _ = pair(write_base(tmp_path / "base", family))
    disturb(encoder)
    encoder.save_pretrained(tmp_path / "adapter")
    load(tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = load(tmp_path / "merged")
    np.testing.assert_allclose(merged.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert not [*(tmp_path / "merged").glob("adapter*")]
    assert merged.config == encoder.config


def test_peft_alone_can_load_what_was_saved(trained):
    from peft import AutoPeftModelForFeatureExtraction

    encoder, folder = trained
    model = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    ids, lengths = pad_right(encoder.prompts.build(TEXTS, encoder.config.document_instruction).ids)
    with torch.no_grad():
        found = compressed_states(model, ids, lengths, K)
    np.testing.assert_allclose(found, encoder.compress(TEXTS), atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(folder)) == max(ids.flatten()) + 1


def test_a_checkpoint_with_an_adapter_goes_on(trained, tmp_path: Path):
    encoder, folder = trained
    again, decoder = pair(folder, None)
    np.testing.assert_allclose(again.compress(TEXTS), encoder.compress(TEXTS), atol=1e-6)
    alone = FrozenDecoder.from_pretrained(folder / "decoder", device="cpu", dtype="float32")
    vectors = encoder.compress(TEXTS)
    np.testing.assert_array_equal(decoder.log_prob(vectors, TEXTS), alone.log_prob(vectors, TEXTS))
    assert again.config == encoder.config
    assert adapter_weights(again).keys() == adapter_weights(encoder).keys()
    disturb(again, seed=2)
    again.save_pretrained(folder)
    np.testing.assert_allclose(load(folder).encode(TEXTS), again.encode(TEXTS), atol=1e-5)


def test_an_adapter_goes_on_with_its_own_rank_and_another_dropout(trained):
    _, folder = trained
    again, _ = pair(folder, LoraArguments(rank=4, alpha=8, dropout=0.5))
    assert {m.p for m in again.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    with pytest.raises(ValueError, match=r"\(LORA, rank 4, alpha 8\), not with rank 16, alpha 8"):
        pair(folder, LoraArguments(rank=16, alpha=8))


def test_an_adapter_that_moved_with_its_base_records_where_it_is_now(trained, tmp_path: Path):
    encoder, folder = trained
    moved = folder.rename(tmp_path / "moved")
    again, _ = pair(moved, None)
    again.save_pretrained(moved)
    assert json.loads((moved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        moved / "decoder"
    )
    np.testing.assert_allclose(load(moved).encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_whole_weights_are_refused(tiny_checkpoint: Path, tmp_path: Path):
    for remedy in ("keep_adapter", "without LoRA"):
        with pytest.raises(ValueError, match=remedy):
            pair(tiny_checkpoint)
    shutil.copytree(
        tiny_checkpoint, tmp_path / "published", ignore=shutil.ignore_patterns("autoregembed.json")
    )
    with pytest.raises(ValueError, match="keep_adapter"):
        pair(tmp_path / "published")


@pytest.mark.parametrize("what", ["adapter", "base", "scale"])
def test_the_fingerprint_changes_with(what, trained):
    _, folder = trained
    first, digest = load(folder).fingerprint, weights_digest(folder)
    if what == "scale":
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 9}))
    else:
        change_a_weight(
            folder / ("adapter_model.safetensors" if what == "adapter" else "decoder/model.safetensors")
        )
    assert load(folder).fingerprint != first
    assert weights_digest(folder) != digest


def test_the_fingerprint_does_not_change_with_how_and_where_an_adapter_is_loaded(trained, tmp_path: Path):
    _, folder = trained
    first = load(folder).fingerprint
    assert load(folder, dtype="bfloat16").fingerprint == first
    assert load(shutil.copytree(folder, tmp_path / "moved")).fingerprint == first
    file = folder / "adapter_config.json"
    record = json.loads(file.read_text())
    record.update(
        base_model_name_or_path="elsewhere", peft_version="0", target_modules=record["target_modules"][::-1]
    )
    file.write_text(json.dumps(record))
    assert load(folder).fingerprint == first


def change_a_weight(file: Path) -> None:
    weights = load_file(file)
    weights[min(weights)].view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


def test_a_loaded_adapter_pickles_by_its_folder(trained):
    _, folder = trained
    loaded = load(folder)
    again = pickle.loads(pickle.dumps(loaded))  # noqa: S301
    assert again.fingerprint == loaded.fingerprint
    np.testing.assert_array_equal(again.encode(TEXTS), loaded.encode(TEXTS))


def test_an_adapter_without_its_base_says_what_to_do(trained, tiny_base: Path):
    encoder, folder = trained
    shutil.rmtree(folder / "decoder")
    for use in (load, pair):
        with pytest.raises(
            FileNotFoundError, match=r'adapter over the base model .*decoder.*under "decoder" in'
        ):
            use(folder)
    record = json.loads((folder / "autoregembed.json").read_text())
    (folder / "autoregembed.json").write_text(json.dumps({**record, "decoder": str(tiny_base)}))
    np.testing.assert_allclose(load(folder).encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_an_adapter_of_peft_alone_loads_by_the_base_that_it_records(trained):
    encoder, folder = trained
    (folder / "autoregembed.json").unlink()
    loaded = load(folder, max_length=encoder.config.max_length)
    np.testing.assert_allclose(loaded.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert loaded.config.decoder == str(folder / "decoder")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load(folder, max_length=encoder.config.max_length)


def test_without_peft_the_extra_is_named(trained, tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    _, folder = trained
    monkeypatch.setitem(sys.modules, "peft", None)
    for use in (load, pair):
        with pytest.raises(ImportError, match=r'pip install "autoregembed-rag\[train\]"'):
            use(folder)
    with pytest.raises(ImportError, match="train"):
        pair(tiny_base)


def test_an_adapter_is_no_base(trained):
    _, folder = trained
    with pytest.raises(FileNotFoundError, match="holds an adapter, not a whole model"):
        AutoRegEncoder.from_base(folder)


def test_an_adapters_weights_are_put_back_in_place(trained, tiny_base: Path):
    encoder, folder = trained
    live, _ = pair(tiny_base)
    where = {name: weight.data_ptr() for name, weight in live.model.named_parameters()}
    before = live.fingerprint
    live.load_weights(folder)
    np.testing.assert_array_equal(live.compress(TEXTS), encoder.compress(TEXTS))
    assert {name: weight.data_ptr() for name, weight in live.model.named_parameters()} == where
    assert live.fingerprint != before
    assert all(weight.requires_grad for weight in adapter_weights(live).values())
    assert len(adapter_weights(live)) == len(adapter_weights(encoder))


def test_weights_of_another_adapter_or_kind_are_not_taken(
    trained, tiny_base: Path, tiny_checkpoint: Path, tmp_path: Path
):
    encoder, folder = trained
    wide, _ = pair(tiny_base, LoraArguments(rank=8, alpha=8))
    kept = wide.compress(TEXTS)
    with pytest.raises(ValueError, match=r"not those of this encoder: \d+ differ.*lora_A"):
        wide.load_weights(folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        wide.load_weights(tiny_checkpoint)
    with pytest.raises(FileNotFoundError, match="holds an adapter"):
        load(tiny_checkpoint).load_weights(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[max(weights)]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 differ"):
        encoder.load_weights(folder)
    np.testing.assert_array_equal(wide.compress(TEXTS), kept)


def test_gathered_weights_are_written_instead_of_the_live_ones(trained, tiny_base: Path, tmp_path: Path):
    encoder, _ = trained
    live, _ = pair(tiny_base)
    live.save_pretrained(tmp_path / "gathered", state_dict=encoder.model.state_dict())
    np.testing.assert_allclose(load(tmp_path / "gathered").encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_whole_and_adapter_replace_one_another_in_a_folder(trained, tmp_path: Path):
    encoder, folder = trained
    whole = AutoRegEncoder.from_base(folder / "decoder", 2, device="cpu", dtype="float32")
    whole.save_pretrained(folder)
    np.testing.assert_array_equal(load(folder).encode(TEXTS), whole.encode(TEXTS))
    assert not [*folder.glob("adapter*")]
    encoder.save_pretrained(folder)
    np.testing.assert_allclose(load(folder).encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert not (folder / "model.safetensors").exists()


def test_a_kill_among_an_adapters_stale_files_leaves_a_whole_model(trained, monkeypatch):
    """What the whole model replaces is removed one by one, and whoever reads in between finds the model."""
    _, folder = trained
    whole = AutoRegEncoder.from_base(folder / "decoder", 2, device="cpu", dtype="float32")
    unlink = Path.unlink

    def unlink_and_die(file: Path, **keywords: bool) -> None:
        unlink(file, **keywords)
        if file.parent == folder:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink_and_die)
        whole.save_pretrained(folder)
    np.testing.assert_array_equal(load(folder).encode(TEXTS), whole.encode(TEXTS))


def test_a_damaged_adapter_is_named(trained, tiny_base: Path):
    encoder, folder = trained
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for use in (load, encoder.load_weights):
        with pytest.raises(ValueError, match=r"the weights in .*adapter are damaged or cut short"):
            use(folder)


def test_the_base_is_never_saved_over(trained, tiny_base: Path):
    encoder, folder = trained
    before = weights_digest(folder / "decoder")
    with pytest.raises(ValueError, match="base model, which the decoder needs"):
        encoder.save_pretrained(folder / "decoder")
    assert weights_digest(folder / "decoder") == before
    assert not (folder / "decoder" / "adapter_config.json").exists()
