"""Weights in folders and in memory: whole models, and peft adapters that need the base model beside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_imports

from .config import CONFIG_NAME, AutoRegConfig, recorded_config
from .loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WEIGHTS,
    embedding_table,
    load_model,
    readable_weights,
    resolve_folder,
)

# What says whether a folder holds a whole model or an adapter.
KINDS = ("config.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def require_peft() -> ModuleType:
    """peft; ImportError names the extra that holds it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA adapters need peft: pip install "autoregembed-rag[train]"') from error
    return peft


def is_adapted(model: nn.Module) -> bool:
    """Is this a peft model, base weights with an adapter around them?"""
    return hasattr(model, "peft_type")


def is_adapter(folder: Path) -> bool:
    """Does the folder hold an adapter, rather than a whole model?"""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """Folder or hub id of the base model of the adapter in `folder`: the decoder that `autoregembed.json` names, else
    what peft recorded.

    ValueError if neither names one.
    """
    recorded = folder / CONFIG_NAME
    decoder = AutoRegConfig.load(recorded).decoder if recorded.is_file() else None
    base = decoder or json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not base:
        raise ValueError(
            f"{folder} holds an adapter and names no base model: "
            f'write the folder or hub id of the base under "decoder" in {recorded}'
        )
    return str(base)


def adapter_base_folder(folder: Path, token: str | bool | None = None) -> Path:
    """The local folder of that base model; FileNotFoundError says where to write its new place."""
    base = adapter_base(folder)
    try:
        return resolve_folder(base, token=token)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds an adapter over the base model {base!r}, which cannot be loaded: put the base back, or "
            f'write its folder or hub id under "decoder" in {folder / CONFIG_NAME}'
        ) from error


def checkpoint_config(folder: Path, vocabulary: Mapping[str, int]) -> AutoRegConfig:
    """What the checkpoint in `folder` records (`config.recorded_config`); an adapter's decoder is its base."""
    config = recorded_config(folder, vocabulary)
    return replace(config, decoder=adapter_base(folder)) if is_adapter(folder) else config


def load_body(
    folder: Path, place: torch.device, arguments: dict[str, Any], *, token: str | bool | None = None
) -> PreTrainedModel:
    """The causal body in `folder`, on its device and in eval mode; an adapter is merged into its base, for which
    `token` is.

    Raises:
        FileNotFoundError: no safetensors, or an adapter's base is missing.
        ImportError: an adapter, and peft is not installed.
        ValueError: weights are missing.
    """
    if not is_adapter(folder):
        return cast(PreTrainedModel, load_model(AutoModel, folder, arguments).to(place))  # type: ignore[arg-type]
    require_peft()
    body = load_model(AutoModel, adapter_base_folder(folder, token), arguments).to(place)  # type: ignore[arg-type]
    wrapped = attach_adapter(body, folder)
    # peft froze the base; a merged body can be trained like any other.
    return cast(PreTrainedModel, wrapped.merge_and_unload().eval().requires_grad_(True))


def quantize_body(body: PreTrainedModel, quantize: str) -> None:
    """Keep the weights of all linear layers in 8 bits, with a scale for each row, by torchao; they still compute in the
    body's dtype.

    ImportError: torchao is missing. ValueError: `quantize` is not "int8".
    """
    if quantize != "int8":
        raise ValueError(f'quantize must be "int8" or None, not {quantize!r}')
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError('quantize="int8" needs torchao: pip install "autoregembed-rag[int8]"') from error
    quantize_(body, Int8WeightOnlyConfig())


def attach_adapter(body: PreTrainedModel, folder: Path, *, config: Any = None) -> Any:  # noqa: ANN401
    """A peft model of `body` and the adapter in `folder`: trainable under a peft `config` of its own, if given.

    The adapter brings the rows of its tokens, so a table too small for them grows by rows of zeros.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_WEIGHTS} (pickled weights are not read): save the adapter as safetensors"
        )
    peft = require_peft()
    settings = config or peft.PeftConfig.from_pretrained(folder)
    grow_table(body, 1 + max(getattr(settings, "trainable_token_indices", None) or [-1]))
    with readable_weights(folder):
        return peft.PeftModel.from_pretrained(
            body, folder, config=settings, is_trainable=config is not None, torch_device=str(body.device)
        )


@torch.no_grad()
def blend_weights(model: nn.Module, before: Mapping[str, Tensor], share: float) -> None:
    """Put `model` between the weights `before` training and its own: `share` of its own, the rest of the others.

    The average of both forgets less, and often finds more than either (Wortsman et al. 2022, Robust fine-tuning of
    zero-shot models).
    """
    for name, weights in model.state_dict().items():
        weights.lerp_(before[name].to(weights), 1 - share)


@torch.no_grad()
def grow_table(body: PreTrainedModel, size: int) -> None:
    """Give the input embeddings at least `size` rows; new ones are zeros."""
    known = len(embedding_table(body))
    if size > known:
        body.resize_token_embeddings(size, mean_resizing=False)
        embedding_table(body)[known:] = 0


def write_checkpoint(
    folder: Path,
    model: nn.Module | Path,
    tokenizer: PreTrainedTokenizerBase,
    config: AutoRegConfig,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, tokenizer and settings into `folder`, each file whole or not at all; where `model` is a folder,
    links to the weights that are stored there.

    ValueError if `folder` is the decoder, which would be lost.
    """
    if config.decoder is not None and Path(config.decoder).resolve() == folder.resolve():
        raise ValueError(f"{folder} is the base model, which the decoder needs: save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        if isinstance(model, Path):
            link_weights(model, Path(beside))
        else:
            _save_weights(model, Path(beside), state_dict)
        tokenizer.save_pretrained(beside)
        config.relative_to(folder).save(beside)
        written = sorted(Path(beside).iterdir(), key=lambda file: file.name == CONFIG_NAME)
        for file in written:
            file.replace(folder / file.name)
    # Weights that an earlier save left under other names would be read before, or hashed with, these.
    earlier = {*folder.glob(f"{WEIGHTS}*"), *(folder / name for name in KINDS)}
    # An adapter's settings first: they would have weights looked for that are gone.
    stale = earlier - {folder / file.name for file in written}
    for file in sorted(stale, key=lambda file: file.name != ADAPTER_CONFIG):
        file.unlink(missing_ok=True)


def link_weights(source: Path, folder: Path) -> None:
    """Put links to the model that is stored in `source` into `folder`: weights and architecture, with the code of one
    that transformers does not have.

    FileNotFoundError: no safetensors.
    """
    if not any(source.glob(WEIGHTS)):
        raise FileNotFoundError(
            f"{source} has no {WEIGHTS} (pickled weights are not read): load it where you trust it and call "
            "save_pretrained, which writes safetensors"
        )
    settings = source / "config.json", source / "generation_config.json"
    for file in (*source.glob(f"{WEIGHTS}*"), *settings, *_code_files(source)):
        if file.is_file():
            (folder / file.name).symlink_to(file.resolve())


def _code_files(folder: Path) -> set[Path]:
    """The Python files in `folder` that its model is made of: those that config.json names, and what they import."""
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    modules = [str(reference).partition(".")[0] for reference in auto_map.values()]
    found: set[Path] = set()
    while modules:
        file = folder / f"{modules.pop()}.py"
        if file.parent == folder and file.is_file() and file not in found:
            found.add(file)
            modules += get_relative_imports(file)
    return found


def _save_weights(model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a body as a Hugging Face model, a peft model as its adapter alone; `state_dict`, named as in
    `model.state_dict()`, is written instead of the live weights."""
    keywords: dict[str, Any] = {} if state_dict is None else {"state_dict": dict(state_dict)}
    if is_adapted(model):
        # The token rows are the adapter's own; "auto" would ask the hub whether to save the whole table with them.
        keywords["save_embedding_layers"] = False
    cast(Any, model).save_pretrained(folder, **keywords)
    # peft's model card: the folder's README is the user's.
    (folder / "README.md").unlink(missing_ok=True)


def read_weights(model: nn.Module, folder: Path) -> None:
    """Put what `write_checkpoint` wrote into the live model, on its device; a model of a narrower dtype than what was
    saved takes the wider one, so that nothing is rounded.

    FileNotFoundError: nothing of the model's kind is there. ValueError: it is of another shape.
    """
    if is_adapted(model):
        _read_adapter(model, folder)
        return
    saved = load_model(AutoModel, folder, {"dtype": "auto"})
    _check_same(folder, model.state_dict(), saved.state_dict())
    model.to(torch.promote_types(cast(PreTrainedModel, model).dtype, saved.dtype))
    model.load_state_dict(saved.state_dict())


def _read_adapter(model: nn.Module, folder: Path) -> None:
    peft = require_peft()
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_WEIGHTS}, and the encoder has an adapter")
    with readable_weights(folder):
        saved = load_file(file)
    _check_same(folder, peft.get_peft_model_state_dict(model, save_embedding_layers=False), saved)
    peft.set_peft_model_state_dict(model, saved)


def _check_same(folder: Path, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    shapes = [{name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (live, saved)]
    odd = sorted(
        name for name in {*live, *saved} if name not in live or shapes[0].get(name) != shapes[1].get(name)
    )
    if odd:
        raise ValueError(
            f"the weights in {folder} are not those of this encoder: {len(odd)} differ in name or shape, such as "
            f"{odd[0]!r} ({shapes[0].get(odd[0], 'not')} here, {shapes[1].get(odd[0], 'not')} there)"
        )
