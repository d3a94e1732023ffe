"""To the hub and back, by huggingface_hub's own client and a hub played on this machine."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from played_hub import READ_TOKEN, TOKEN, Hub, RefusedError, serving
from typer.testing import CliRunner

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.cli import app
from autoregembed_rag.cli_push import push

TEXTS = ["A quick fox.", "Oranges and lemons."]
REPO = "ann/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client talks to, logged in as one who may write."""
    with serving() as hub:
        talk_to(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Git LFS, which is played
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        huggingface_hub.close_session()


def talk_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def load(model: str | Path, **arguments) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(model, **{"device": "cpu", "dtype": "float32", **arguments})


def change(encoder: AutoRegEncoder) -> None:
    """As training does."""
    with torch.no_grad():
        encoder.trainable().norm.weight[:16] += 1


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_what_is_pushed_loads_from_the_hub_with_the_same_vectors_and_decoder(checkpoint: Path, hub: Hub):
    pushed = load(checkpoint)
    url = pushed.push_to_hub(REPO, commit_message="First of all")
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.messages == ["First of all"]
    fingerprint = pushed.fingerprint
    shutil.rmtree(checkpoint)

    encoder = load(REPO)
    np.testing.assert_array_equal(encoder.encode(TEXTS), pushed.encode(TEXTS))
    assert encoder.fingerprint == fingerprint
    decoder = FrozenDecoder.from_pretrained(REPO, device="cpu", dtype="float32")
    assert np.isfinite(decoder.log_prob(encoder.compress(TEXTS), TEXTS)).all()
    assert json.loads(hub.files(REPO)["autoregembed.json"])["decoder"] == "decoder"


def test_stored_weights_are_pushed_as_they_are_whatever_they_run_in(checkpoint: Path, hub: Hub):
    rounded = load(checkpoint, dtype="bfloat16", query_instruction="Name the topic.")
    rounded.push_to_hub(REPO)
    assert hub.files(REPO)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert load(REPO).fingerprint == rounded.fingerprint
    assert load(REPO).config.query_instruction == "Name the topic."


def test_trained_weights_are_pushed_as_they_are_in_memory(checkpoint: Path, hub: Hub):
    trained = load(checkpoint)
    change(trained)
    trained.push_to_hub(REPO)
    assert hub.files(REPO)["model.safetensors"] != (checkpoint / "model.safetensors").read_bytes()
    np.testing.assert_array_equal(load(REPO).encode(TEXTS), trained.encode(TEXTS))


def test_a_decoder_on_the_hub_goes_along_by_name_alone(checkpoint: Path, hub: Hub):
    record = json.loads((checkpoint / "autoregembed.json").read_text())
    (checkpoint / "autoregembed.json").write_text(json.dumps({**record, "decoder": "someone/base"}))
    load(checkpoint).push_to_hub(REPO)
    assert not any(path.startswith("decoder/") for path in hub.files(REPO))
    assert json.loads(hub.files(REPO)["autoregembed.json"])["decoder"] == "someone/base"
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.base_model == "someone/base"


def test_only_weights_tokenizer_settings_and_card_leave_the_machine(checkpoint: Path, hub: Hub):
    for name in ("notes.txt", "secrets.json", "report.json", "pytorch_model.bin", "decoder/optimizer.pt"):
        (checkpoint / name).write_text("{}")
    load(checkpoint).push_to_hub(REPO)
    assert {path.rpartition("/")[2] for path in hub.files(REPO)} <= {
        ".gitattributes",
        "README.md",
        "autoregembed.json",
        "config.json",
        "config_sentence_transformers.json",
        "generation_config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_no_pickle_is_ever_downloaded(checkpoint: Path, hub: Hub):
    load(checkpoint).push_to_hub(REPO)
    pickles = {"pytorch_model.bin": b"x", "optimizer.pt": b"x", "decoder/model.pkl": b"x", "a.pth": b"x"}
    hub.commit(REPO, "main", {**hub.files(REPO), **pickles})
    hub.downloads.clear()
    load(REPO)
    assert "decoder/model.safetensors" in hub.downloads
    assert not pickles.keys() & set(hub.downloads)


def test_a_second_push_leaves_nothing_of_the_first_that_would_be_read(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO)
    stale = {"model-00001-of-00002.safetensors": b"x", "decoder/model-00001-of-00002.safetensors": b"x"}
    hub.commit(REPO, "main", {**hub.files(REPO), **stale, "notes.md": b"mine"})
    encoder.push_to_hub(REPO)
    assert not stale.keys() & hub.files(REPO).keys()
    assert "notes.md" in hub.files(REPO)
    assert load(REPO).fingerprint == encoder.fingerprint


def test_a_push_removes_no_file_that_no_save_writes(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO)
    theirs = {
        "adapter_x/notes.md": b"theirs",
        "adapter_notes.md": b"theirs",
        "decoder/README.md": b"theirs",
        "model-big/model.safetensors": b"theirs",
        "decoder/old/config.json": b"theirs",
    }
    stale = {
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"x",
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"x",
        "decoder/model.safetensors.index.json": b"{}",
        "decoder/added_tokens.json": b"{}",
    }
    hub.commit(REPO, "main", {**hub.files(REPO), **theirs, **stale})
    encoder.push_to_hub(REPO)
    assert not stale.keys() & hub.files(REPO).keys()
    assert theirs.items() <= hub.files(REPO).items()
    assert load(REPO).fingerprint == encoder.fingerprint


def test_a_revision_is_a_branch_to_push_to_and_to_load_from(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO)
    change(encoder)
    encoder.push_to_hub(REPO, revision="louder")
    encoder.push_to_hub(REPO, revision="louder")  # which is there now
    np.testing.assert_array_equal(load(REPO, revision="louder").encode(TEXTS), encoder.encode(TEXTS))
    assert np.abs(load(REPO).encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3
    decoder = FrozenDecoder.from_pretrained(REPO, device="cpu", revision="louder")
    assert decoder.hidden_size == encoder.hidden_size
    with pytest.raises(FileNotFoundError, match="RevisionNotFound"):
        load(REPO, revision="softer")
    with pytest.raises(ValueError, match=r"revision='louder' is of a hub id, and .*checkpoint' is a folder"):
        load(checkpoint, revision="louder")


def test_a_pull_request_leaves_the_main_branch_as_it_is(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO)
    before = dict(hub.files(REPO))
    change(encoder)
    url = encoder.push_to_hub(REPO, create_pr=True)
    assert url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.files(REPO) == before
    assert hub.files(REPO, "refs/pr/1")["model.safetensors"] != before["model.safetensors"]


def test_a_private_repository_is_made_and_read_with_a_token(checkpoint: Path, hub: Hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    load(checkpoint).push_to_hub(REPO, private=True, token=TOKEN)
    assert hub.private == {REPO}
    with pytest.raises(FileNotFoundError, match="'ann/tiny' is not a model that can be loaded"):
        load(REPO)
    assert load(REPO, token=TOKEN).dimension == 160
    assert FrozenDecoder.from_pretrained(REPO, device="cpu", token=TOKEN).hidden_size == 32


def test_the_base_of_an_adapter_is_asked_for_with_the_token_and_not_at_its_revision(
    tiny_base: Path, hub: Hub, tmp_path: Path, monkeypatch
):
    pytest.importorskip("peft")
    from autoregembed_rag.training.lora import LoraArguments, lora_pair

    live, _ = lora_pair(tiny_base, LoraArguments(rank=2), device="cpu", dtype="float32")
    live.config = replace(live.config, decoder="ann/base")
    live.save_pretrained(tmp_path / "adapter")
    for repo, branch, folder in ((REPO, "second", tmp_path / "adapter"), ("ann/base", "main", tiny_base)):
        hub.commit(repo, branch, {file.name: file.read_bytes() for file in folder.iterdir()})
        hub.private.add(repo)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="over the base model 'ann/base', which cannot be loaded"):
        load(tmp_path / "adapter")
    encoder = load(REPO, revision="second", token=TOKEN)
    np.testing.assert_allclose(encoder.encode(TEXTS), live.encode(TEXTS), atol=1e-5)
    assert len(encoder.fingerprint) == 16
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="names the decoder 'ann/base', which cannot be loaded"):
        FrozenDecoder.for_encoder(encoder, device="cpu")
    assert FrozenDecoder.for_encoder(encoder, device="cpu", token=TOKEN).hidden_size == 32


def test_what_was_downloaded_loads_again_offline(checkpoint: Path, hub: Hub, monkeypatch):
    expected = load(checkpoint).encode(TEXTS)
    load(checkpoint).push_to_hub(REPO)
    load(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(load(REPO).encode(TEXTS), expected)


def test_a_card_that_somebody_wrote_is_kept_here_and_there(checkpoint: Path, hub: Hub, caplog):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO)
    assert encoder.fingerprint in hub.files(REPO)["README.md"].decode()
    hub.commit(REPO, "main", {**hub.files(REPO), "README.md": b"# theirs\n"})
    with caplog.at_level(logging.INFO):
        encoder.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == b"# theirs\n"
    assert "ann/tiny keeps its own README.md" in caplog.text
    (checkpoint / "README.md").write_text("# mine\n")
    encoder.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == b"# mine\n"
    encoder.push_to_hub(REPO, card="# given\n")
    assert hub.files(REPO)["README.md"] == b"# given\n"


def test_facts_for_a_card_replace_none_that_somebody_wrote(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO, card={"license": "mit"})
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"
    encoder.push_to_hub(REPO, card={"license": "apache-2.0"})  # over a generated one
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "apache-2.0"
    hub.commit(REPO, "main", {**hub.files(REPO), "README.md": b"# theirs\n"})
    with pytest.raises(ValueError, match=r"ann/tiny has a README.md that somebody has written"):
        encoder.push_to_hub(REPO, card={"license": "mit"})
    assert hub.files(REPO)["README.md"] == b"# theirs\n"


def test_a_generated_card_is_replaced(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    encoder.push_to_hub(REPO)
    load(checkpoint, query_instruction="Name the topic.").push_to_hub(REPO)
    assert '"Name the topic."' in hub.files(REPO)["README.md"].decode()


def refused(error: type[Exception], words: str, checkpoint: Path, repo: str = REPO, **arguments) -> None:
    """The push ends in one line that says what to do."""
    with pytest.raises(error, match=words) as raised:
        load(checkpoint).push_to_hub(repo, **arguments)
    assert "\n" not in str(raised.value)


def test_refusals_say_in_one_line_what_to_do(checkpoint: Path, hub: Hub, monkeypatch):
    refused(ValueError, r"'a/b/c' is no name of a repository: write \"user/name\"", checkpoint, "a/b/c")
    refused(PermissionError, "you may not write to bob/tiny: push to a repository", checkpoint, "bob/tiny")
    refused(PermissionError, "you may not write to ann/tiny", checkpoint, token=READ_TOKEN)
    refused(PermissionError, "run `hf auth login`, set HF_TOKEN", checkpoint, token="hf_of_nobody")  # noqa: S106
    hub.refusal = RefusedError(507, "", "Your storage is full")
    refused(OSError, r"the hub refuses ann/tiny \(507: .*Your storage is full", checkpoint)
    assert not hub.branches
    hub.refusal = None
    monkeypatch.delenv("HF_TOKEN")
    refused(PermissionError, "run `hf auth login`, set HF_TOKEN", checkpoint)
    refused(PermissionError, "run `hf auth login`, set HF_TOKEN", checkpoint, token=True)


def test_a_hub_that_cannot_be_reached_is_said_so(checkpoint: Path, hub: Hub, monkeypatch):
    talk_to("http://127.0.0.1:9", monkeypatch)  # where nothing listens
    refused(ConnectionError, "the hub cannot be reached .*: look after the network", checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(ConnectionError, "because HF_HUB_OFFLINE is set", checkpoint)


def test_a_decoder_that_is_gone_is_named_before_anything_is_made(checkpoint: Path, hub: Hub):
    encoder = load(checkpoint)
    shutil.rmtree(checkpoint / "decoder")
    with pytest.raises(
        ValueError, match=r"the decoder .*decoder' is neither a folder nor a hub id: put it back"
    ):
        encoder.push_to_hub(REPO)
    assert not hub.branches


def test_a_live_adapter_is_refused_and_a_loaded_one_is_pushed_merged(
    tiny_base: Path, hub: Hub, tmp_path: Path
):
    pytest.importorskip("peft")
    from autoregembed_rag.training.lora import LoraArguments, lora_pair

    live, _ = lora_pair(tiny_base, LoraArguments(rank=2), device="cpu", dtype="float32")
    with pytest.raises(
        ValueError, match=r"live adapter cannot be pushed: save_pretrained\(folder\), load that"
    ):
        live.push_to_hub(REPO)
    assert not hub.branches
    with torch.no_grad():
        for name, weight in live.model.named_parameters():
            weight += 0.01 * ("lora_B" in name)
    live.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "README.md").exists()
    load(tmp_path / "adapter").push_to_hub(REPO)
    assert not any("adapter" in path for path in hub.files(REPO))
    np.testing.assert_allclose(load(REPO).encode(TEXTS), live.encode(TEXTS), atol=1e-5)


def test_quantized_weights_are_refused(checkpoint: Path, hub: Hub):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="nor pushed: load it without quantize"):
        load(checkpoint, quantize="int8").push_to_hub(REPO)
    assert not hub.branches


def test_the_command_has_every_option_of_the_method():
    method = signature(AutoRegEncoder.push_to_hub).parameters.keys() - {"self"}
    assert method <= signature(push).parameters.keys()


def test_the_command_pushes_with_what_the_card_is_to_say(
    checkpoint: Path, hub: Hub, tmp_path: Path, monkeypatch
):
    arguments = ["push", str(checkpoint), REPO, "--license", "mit", "--language", "en,de", "--private"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1].startswith(f"{hub.url}/{REPO}/commit/")
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert (data.license, data.language) == ("mit", ["en", "de"])
    assert hub.private == {REPO}

    (checkpoint / "README.md").write_text("# mine\n")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "README.md is your own" in result.stderr
    (tmp_path / "card.md").write_text("# another\n")
    given = ["push", str(checkpoint), REPO, "--card", str(tmp_path / "card.md"), "--commit-message", "Again"]
    monkeypatch.delenv("HF_TOKEN")
    result = CliRunner().invoke(app, [*given, "--token", TOKEN])
    assert result.exit_code == 0, result.output
    assert (hub.files(REPO)["README.md"], hub.messages[-1]) == (b"# another\n", "Again")
    result = CliRunner().invoke(app, [*given, "--token", TOKEN, "--license", "mit"])
    assert result.exit_code == 2
    assert "--license cannot change the card that --card gives" in result.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = CliRunner().invoke(app, ["push", str(checkpoint), "bob/tiny"])
    assert result.exit_code == 2
    assert "error: you may not write to bob/tiny" in result.stderr
    assert "autoregembed push ./fitted" in CliRunner().invoke(app, ["push", "--help"]).output


def test_what_the_docs_show_runs_as_written(checkpoint: Path, hub: Hub, tmp_path: Path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    hub.user = "my-name"
    checkpoint.rename(tmp_path / "fitted")
    monkeypatch.chdir(tmp_path)
    measured = {"use": "", "fingerprint": load("fitted").fingerprint}
    results = [{"system": "fitted", "measures": {"nDCG@10": 0.25}, "details": measured}]
    Path("results.json").write_text(json.dumps({"dataset": "manuals", "split": "test", "results": results}))
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", docs, flags=re.DOTALL):
        exec(compile(snippet, "hub.md", "exec"), names)  # noqa: S102
    card = hub.files("my-name/fitted")["README.md"].decode()
    assert "Our manuals, 2019 to 2024." in card
    assert "| manuals | test |  | nDCG@10 | 0.2500 |" in card
    assert hub.private == {"my-name/fitted"}
    (command,) = re.findall(r"^autoregembed (push .*)$", docs, flags=re.MULTILINE)
    result = CliRunner().invoke(app, command.replace("my-name/fitted", "my-name/again").split())
    assert result.exit_code == 0, result.output
