"""Checkpoints on disk: saving, loading, moving, fingerprints, pickles and forks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tokenizer, tiny_llama
from tokenizers import AddedToken
from transformers import AutoTokenizer

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.fingerprint import weights_digest

TEXTS = ["A quick fox.", "Oranges and lemons."]


def load(folder: str | Path, **arguments) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, **{"device": "cpu", "dtype": "float32", **arguments})


def change_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_an_untrained_encoder_records_its_base_as_decoder(tiny_base: Path, encoder: AutoRegEncoder):
    untrained = AutoRegEncoder.from_base(tiny_base, 2, device="cpu", dtype="float32", max_length=64)
    assert untrained.config.decoder == str(tiny_base.resolve())
    assert untrained.num_compressed_tokens == 2
    assert untrained.config.max_length == 64
    assert AutoRegEncoder.from_base(tiny_base, dtype="float32").config.max_length == 128, "all its positions"
    again = AutoRegEncoder.from_base(tiny_base, 2, device="cpu", dtype="float32", max_length=64)
    np.testing.assert_array_equal(untrained.encode(TEXTS), again.encode(TEXTS))


def test_a_moved_checkpoint_still_finds_its_decoder_inside(checkpoint: Path, tmp_path: Path):
    before = FrozenDecoder.from_pretrained(checkpoint, device="cpu", dtype="float32")
    states = load(checkpoint).compress(TEXTS)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    checkpoint.rename(moved)
    assert load(moved).config.decoder == str((moved / "decoder").resolve())
    after = FrozenDecoder.from_pretrained(moved, device="cpu", dtype="float32")
    np.testing.assert_array_equal(after.log_prob(states, TEXTS), before.log_prob(states, TEXTS))


def test_a_copy_saved_elsewhere_names_the_decoder_where_it_is(checkpoint: Path, tmp_path: Path):
    load(checkpoint).save_pretrained(tmp_path / "copy")
    assert load(tmp_path / "copy").config.decoder == str((checkpoint / "decoder").resolve())
    assert FrozenDecoder.from_pretrained(tmp_path / "copy", device="cpu").hidden_size == 32


def test_a_checkpoint_without_decoder_says_so(checkpoint: Path):
    record = json.loads((checkpoint / "autoregembed.json").read_text())
    (checkpoint / "autoregembed.json").write_text(json.dumps({**record, "decoder": None}))
    with pytest.raises(ValueError, match="does not name its decoder"):
        FrozenDecoder.from_pretrained(checkpoint)
    assert load(checkpoint).encode(TEXTS).shape == (2, 160)


@pytest.mark.parametrize("special", [True, False])
def test_the_papers_kind_of_checkpoint_loads(tmp_path: Path, special):
    """A whole language model with `<EMBEDi>` in its tokenizer and no autoregembed.json."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(f"<EMBED{i}>", special=special) for i in range(3)], special_tokens=special
    )
    model = tiny_llama(tokenizer)
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    assert (encoder.num_compressed_tokens, encoder.config.max_length, encoder.config.decoder) == (
        3,
        512,
        None,
    )
    ids = torch.tensor(encoder.prompts.build([TEXTS[0]], encoder.config.query_instruction).ids)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state[0, -3:]
    np.testing.assert_allclose(encoder.compress(TEXTS, "next")[0], expected, atol=1e-5)
    encoder.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(TEXTS), encoder.encode(TEXTS))


def test_a_plain_language_model_is_pointed_to_from_base(tiny_base: Path):
    with pytest.raises(ValueError, match=r"neither autoregembed\.json nor <EMBEDi> tokens.*from_base"):
        load(tiny_base)


def test_pickled_weights_are_refused(checkpoint: Path):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load(checkpoint)
    decoder = checkpoint / "decoder"
    torch.save(load_file(decoder / "model.safetensors"), decoder / "pytorch_model.bin")
    (decoder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        FrozenDecoder.from_pretrained(decoder)


def test_missing_weights_are_not_drawn_at_random(checkpoint: Path):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of LlamaModel.*layers\.1\.mlp\.up_proj"):
        load(checkpoint)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "base"])
def test_weights_that_are_cut_short_are_named(kind, checkpoint: Path):
    folder = checkpoint if kind == "encoder" else checkpoint / "decoder"
    use = {"encoder": AutoRegEncoder.from_pretrained, "decoder": FrozenDecoder.from_pretrained}
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=f"the weights in {folder} are damaged or cut short"):
        use.get(kind, AutoRegEncoder.from_base)(checkpoint if kind != "base" else folder, device="cpu")


def test_a_tokenizer_that_is_cut_short_is_named(checkpoint: Path):
    file = checkpoint / "decoder" / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match=r"tokenizer\.json or .* in .*decoder is damaged or cut short"):
        FrozenDecoder.from_pretrained(checkpoint, device="cpu")


def test_a_decoder_that_has_moved_away_says_where_to_write_its_place(checkpoint: Path):
    (checkpoint / "decoder").rename(checkpoint.with_name("elsewhere"))
    with pytest.raises(
        FileNotFoundError, match=r'names the decoder .*under "decoder" in .*autoregembed\.json'
    ):
        FrozenDecoder.from_pretrained(checkpoint)


def test_a_body_without_head_is_no_decoder(kin, tmp_path: Path):
    kin.encoder.save_pretrained(tmp_path)
    (tmp_path / "autoregembed.json").unlink()
    if kin.decoder.model.config.tie_word_embeddings:
        assert FrozenDecoder.from_pretrained(tmp_path, device="cpu").hidden_size == 32
    else:
        with pytest.raises(ValueError, match=r"lacks 1 of the weights of .*lm_head"):
            FrozenDecoder.from_pretrained(tmp_path, device="cpu")


def test_the_fingerprint_ignores_how_the_encoder_runs(encoder: AutoRegEncoder, tiny_checkpoint: Path):
    same = [
        {"dtype": "bfloat16"},
        {"dtype": torch.float64},
        {"attn_implementation": "eager"},
        {"num_tokens": 2},
    ]
    assert {load(tiny_checkpoint, **how).fingerprint for how in same} == {encoder.fingerprint}


@pytest.mark.parametrize(
    "what",
    [
        {"query_instruction": "Name the topic."},
        {"document_instruction": "Name the topic."},
        {"pooling": "mean"},
        {"max_length": 100},
    ],
)
def test_the_fingerprint_changes_with_a_setting(encoder: AutoRegEncoder, tiny_checkpoint: Path, what):
    assert load(tiny_checkpoint, **what).fingerprint != encoder.fingerprint


def test_the_fingerprint_changes_with_weights_k_and_tokenizer(
    checkpoint: Path, encoder: AutoRegEncoder, tiny_base: Path
):
    assert load(checkpoint).fingerprint == encoder.fingerprint
    fewer = AutoRegEncoder.from_base(tiny_base, 4, dtype="float32").fingerprint
    assert fewer != encoder.fingerprint
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    before = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load(checkpoint).fingerprint != encoder.fingerprint
    (checkpoint / "tokenizer.json").write_text(before)
    change_one_weight(checkpoint)
    assert load(checkpoint).fingerprint != encoder.fingerprint


def test_the_fingerprint_does_not_depend_on_how_weights_are_split_into_files(
    checkpoint: Path, encoder: AutoRegEncoder, tmp_path: Path
):
    encoder.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    (checkpoint / "model.safetensors").unlink()
    for file in (tmp_path / "shards").iterdir():
        shutil.copy(file, checkpoint)
    (checkpoint / "adapter.safetensors").write_bytes(b"none of ours")
    assert load(checkpoint).fingerprint == encoder.fingerprint


def test_a_trained_encoder_has_a_fingerprint_of_its_own(checkpoint: Path, tmp_path: Path):
    encoder = load(checkpoint)
    before = encoder.fingerprint
    body = encoder.trainable()
    with torch.no_grad():
        body.norm.weight[0] += 1e-3
    assert encoder.fingerprint != before
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(encoder)
    encoder.save_pretrained(tmp_path / "trained")
    assert load(tmp_path / "trained").fingerprint == encoder.fingerprint


def test_weights_that_are_gone_have_no_fingerprint(checkpoint: Path, encoder: AutoRegEncoder):
    known, unknown = load(checkpoint), load(checkpoint)
    assert known.fingerprint == encoder.fingerprint
    shutil.rmtree(checkpoint)
    assert known.fingerprint == encoder.fingerprint
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint holds no weights .* put model\*\.safetensors back"
    ):
        _ = unknown.fingerprint


def test_saving_over_a_checkpoint_replaces_it(checkpoint: Path, tiny_base: Path):
    other = AutoRegEncoder.from_base(tiny_base, 3, device="cpu", dtype="float32")
    other.save_pretrained(checkpoint)
    loaded = load(checkpoint)
    assert loaded.fingerprint == other.fingerprint
    np.testing.assert_array_equal(loaded.encode(TEXTS), other.encode(TEXTS))
    assert (checkpoint / "decoder" / "model.safetensors").exists()


def test_no_shard_of_an_earlier_save_survives(checkpoint: Path, encoder: AutoRegEncoder):
    encoder.model.save_pretrained(checkpoint, max_shard_size="20KB")
    assert len([*checkpoint.glob("model-*.safetensors")]) > 2
    encoder.save_pretrained(checkpoint)
    assert [file.name for file in checkpoint.glob("*.safetensors*")] == ["model.safetensors"]
    assert load(checkpoint).fingerprint == encoder.fingerprint


def test_an_encoder_may_be_saved_over_itself(checkpoint: Path):
    encoder = load(checkpoint)
    expected = encoder.encode(TEXTS)
    encoder.save_pretrained(checkpoint)
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    np.testing.assert_array_equal(load(checkpoint).encode(TEXTS), expected)


def test_the_base_is_never_saved_over(checkpoint: Path):
    before = weights_digest(checkpoint / "decoder")
    with pytest.raises(ValueError, match="is the base model, which the decoder needs"):
        load(checkpoint).save_pretrained(checkpoint / "decoder")
    assert weights_digest(checkpoint / "decoder") == before


def test_gathered_weights_are_written_instead_of_the_live_ones(checkpoint: Path, tmp_path: Path):
    encoder = load(checkpoint)
    gathered = {name: weight + 1e-2 for name, weight in encoder.model.state_dict().items()}
    encoder.save_pretrained(tmp_path / "saved", state_dict=gathered)
    saved = load(tmp_path / "saved").model.state_dict()
    assert saved.keys() == gathered.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in gathered.items())
    np.testing.assert_array_equal(encoder.encode(TEXTS), load(checkpoint).encode(TEXTS))


def test_saved_weights_are_put_back_in_place(checkpoint: Path, encoder: AutoRegEncoder):
    live = load(checkpoint)
    where = [weight.data_ptr() for weight in live.trainable().parameters()]
    with torch.no_grad():
        for weight in live.model.parameters():
            weight += 1
    assert live.fingerprint != encoder.fingerprint
    live.load_weights(checkpoint)
    np.testing.assert_array_equal(live.encode(TEXTS), encoder.encode(TEXTS))
    assert [weight.data_ptr() for weight in live.model.parameters()] == where
    assert live.fingerprint == encoder.fingerprint


def test_weights_that_are_put_back_are_not_rounded(checkpoint: Path, encoder: AutoRegEncoder):
    live = load(checkpoint, dtype="bfloat16")
    parameters = [*live.model.parameters()]
    live.load_weights(checkpoint)
    assert all(one is other for one, other in zip(parameters, live.model.parameters(), strict=True))
    assert all(torch.equal(live.model.state_dict()[n], w) for n, w in encoder.model.state_dict().items())


def test_weights_of_another_model_are_not_taken(tiny_base: Path, checkpoint: Path, tmp_path: Path):
    live = load(checkpoint)
    AutoRegEncoder.from_base(tiny_base, 2, dtype="float32").save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"not those of this encoder: 1 differ.*embed_tokens"):
        live.load_weights(tmp_path / "two")
    change_one_weight(checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no model"):
        live.load_weights(tmp_path / "empty")


def test_the_digest_of_a_folder_is_of_its_weights_alone(tiny_base: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    assert weights_digest(copy) == weights_digest(str(tiny_base))
    assert len(weights_digest(copy)) == 64
    model = tiny_llama(build_tokenizer())
    before = weights_digest(model)
    assert before == weights_digest(tiny_llama(build_tokenizer()))
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert weights_digest(model) != before


def test_nothing_temporary_stays_behind(encoder: AutoRegEncoder, tmp_path: Path):
    encoder.save_pretrained(tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_the_saved_tokenizer_keeps_the_bases_special_tokens(tmp_path: Path):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    AutoRegEncoder.from_base(tmp_path / "base", 2, dtype="float32").save_pretrained(tmp_path / "saved")
    assert {"<|turn|>", "<EMBED0>", "<EMBED1>"} <= {
        *AutoTokenizer.from_pretrained(tmp_path / "saved").all_special_tokens
    }


def test_a_pickled_encoder_opens_again_as_it_was(tiny_checkpoint: Path):
    encoder = load(tiny_checkpoint, num_tokens=3, query_instruction="Name the topic.", max_length=100)
    again = pickle.loads(pickle.dumps(encoder))  # noqa: S301
    assert again.config == encoder.config
    assert (again.num_tokens, again.model.dtype, again.fingerprint) == (3, torch.float32, encoder.fingerprint)
    np.testing.assert_array_equal(again.encode_queries(TEXTS), encoder.encode_queries(TEXTS))


def test_an_encoder_that_was_never_saved_refuses_to_pickle(tiny_base: Path):
    with pytest.raises(TypeError, match="never saved cannot be pickled: save_pretrained"):
        pickle.dumps(AutoRegEncoder.from_base(tiny_base, 2, dtype="float32"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_fork_is_refused(encoder: AutoRegEncoder):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            encoder.encode(TEXTS)
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "made before a fork" in pipe.read()
    assert encoder.encode(TEXTS).shape == (2, 160), "the parent goes on"
