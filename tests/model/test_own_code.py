"""Models of Python code of their own, which runs only where the caller trusts it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.hub import write_for_hub

TEXTS = ["A quick fox.", "Oranges and lemons."]
CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_own import OwnConfig

class OwnModel(LlamaModel):
    config_class = OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
TRUSTED = {"device": "cpu", "dtype": "float32", "trust_remote_code": True}


@pytest.fixture(autouse=True)
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where transformers keeps the code that it runs: here, and for this test alone."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose model, and whose decoder, is Python code beside the weights."""
    whole = Path(shutil.copytree(tiny_checkpoint, tmp_path / "own"))
    for folder in (whole, whole / "decoder"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": AUTO_MAP}))
        for name, code in {**CODE, "notes.py": "secret = 1"}.items():
            (folder / name).write_text(code)
    return whole


def saved(checkpoint: Path, folder: Path) -> None:
    AutoRegEncoder.from_pretrained(checkpoint, **TRUSTED).save_pretrained(folder)


def made_of_a_base(checkpoint: Path, folder: Path) -> None:
    AutoRegEncoder.from_base(checkpoint / "decoder", **TRUSTED).save_pretrained(folder)


def uploaded(checkpoint: Path, folder: Path) -> None:
    """What goes to the hub, its links followed; the checkpoint is gone."""
    links = folder.with_name("links")
    links.mkdir()
    encoder = AutoRegEncoder.from_pretrained(checkpoint, **TRUSTED)
    write_for_hub(encoder, links, checkpoint / "decoder", "ann/own")
    shutil.copytree(links, folder)
    shutil.rmtree(checkpoint)


@pytest.mark.parametrize("take", [saved, made_of_a_base, uploaded])
def test_the_code_goes_along_and_runs_only_where_it_is_trusted(take, checkpoint: Path, tmp_path: Path):
    expected = AutoRegEncoder.from_pretrained(checkpoint, **TRUSTED).encode(TEXTS)
    there = tmp_path / "there"
    take(checkpoint, there)
    assert {file.name for file in there.rglob("*.py")} == CODE.keys()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoRegEncoder.from_pretrained(there, device="cpu")
    encoder = AutoRegEncoder.from_pretrained(there, **TRUSTED)
    assert type(encoder.model).__name__ == "OwnModel"
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        FrozenDecoder.for_encoder(encoder, device="cpu")
    decoder = FrozenDecoder.for_encoder(encoder, device="cpu", trust_remote_code=True)
    assert type(decoder.model).__name__ == "OwnForCausalLM"


def test_no_other_code_than_the_folders_own_leaves_the_machine(tiny_checkpoint: Path, tmp_path: Path):
    """config.json is another's word: it may name any file, or one that is not there."""
    (tmp_path / "secret.py").write_text("secret = 1")
    whole = Path(shutil.copytree(tiny_checkpoint, tmp_path / "whole"))
    config = json.loads((whole / "config.json").read_text())
    named = {"AutoModel": f"{tmp_path}/secret.Own", "AutoConfig": "gone.Own", "AutoModelForCausalLM": "a.Own"}
    (whole / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    (whole / "a.py").write_text("from ./../secret import secret\nfrom .b import c\n")
    (tmp_path / "there").mkdir()
    encoder = AutoRegEncoder.from_pretrained(whole, device="cpu", dtype="float32")
    write_for_hub(encoder, tmp_path / "there", None, "ann/own")
    assert [file.name for file in (tmp_path / "there").rglob("*.py")] == ["a.py"]
