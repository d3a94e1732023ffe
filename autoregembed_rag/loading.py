"""Where models come from and how they are placed: names, device, dtype and attention, each with an "auto"."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import CONFIG_NAME, AutoRegConfig
from .prompt import embed_tokens

BUNDLED = Path(__file__).parent / "checkpoints"
# What transformers reads; other files of the kind (adapters, another format's copy) are none of our weights.
WEIGHTS = "model*.safetensors"
# peft's names, for a checkpoint that holds an adapter and needs its base model.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def resolve_folder(model: str | Path, **download: Any) -> Path:  # noqa: ANN401
    """The local folder of a model: a bundled name, a folder, or a hub id (downloaded, safetensors only; `download`
    goes to huggingface_hub's `snapshot_download`).

    FileNotFoundError lists what would work. ValueError: a revision of what is no hub id.
    """
    bundled = sorted(file.parent.name for file in BUNDLED.glob("*/config.json"))
    local = BUNDLED / model if isinstance(model, str) and model in bundled else Path(model)
    if any((local / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        if (revision := download.get("revision")) is not None:
            raise ValueError(
                f"revision={revision!r} is of a hub id, and {str(model)!r} is a folder: leave it out"
            )
        return local
    remedy = (
        f"{str(model)!r} is not a model that can be loaded. "
        f"What works: a bundled name ({', '.join(map(repr, bundled)) or 'none'}), "
        "the path of a folder with config.json, *.safetensors and tokenizer files, "
        "or a Hugging Face hub id such as 'org/name'"
    )
    if not is_hub_id(str(model)):
        raise FileNotFoundError(remedy)
    try:
        patterns = ["*.json", WEIGHTS, f"*/{WEIGHTS}", ADAPTER_WEIGHTS, "*.model", "*.txt", "*.py"]
        return Path(snapshot_download(str(model), allow_patterns=patterns, **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{remedy} (the hub said: {type(error).__name__})") from error


def is_hub_id(name: str) -> bool:
    """Could this be "user/name" on the hub, rather than a path on this machine?"""
    return not Path(name).exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto": CUDA, then Apple's MPS, then the CPU. ValueError for a device that is not there."""
    if device != "auto":
        return _present(device)
    if torch.cuda.is_available():
        # A launcher of several processes, such as torchrun, gives each a GPU of its own.
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _present(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {device!r}: give auto, cpu, cuda, cuda:1 or mps") from None
    remedy = f"the device {str(place)!r} cannot be used here"
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{remedy}, where PyTorch finds no Apple GPU: give auto or cpu")
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(
                f"{remedy}, where PyTorch {torch.__version__} finds no GPU: give auto or cpu, or install the driver "
                "and a PyTorch with CUDA"
            )
        if (place.index or 0) >= count:
            raise ValueError(f"{remedy}: there are {count} GPUs, from cuda:0 to cuda:{count - 1}")
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 where the hardware computes in it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype):
        raise ValueError(f"dtype must be 'auto', a torch.dtype or its name such as 'float32', not {dtype!r}")
    return resolved


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Releases of torch that cannot say fall back to float32.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def resolve_attention(attn_implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "auto": FlashAttention 2 on CUDA in half precision where it can be imported, else PyTorch's sdpa."""
    if attn_implementation != "auto":
        return attn_implementation
    half = dtype in (torch.bfloat16, torch.float16)
    flash = device.type == "cuda" and half and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def decoder_folder(model: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of the base LM that an AutoRegEmbed checkpoint names; any other model is a language model itself.

    A `revision` is the checkpoint's, not that of a decoder elsewhere on the hub.

    FileNotFoundError lists what would work; ValueError if a checkpoint names no decoder.
    """
    folder = resolve_folder(model, revision=revision, token=token)
    file = folder / CONFIG_NAME
    return named_folder(AutoRegConfig.load(file).decoder, folder, token) if file.exists() else folder


def named_folder(decoder: str | None, named_by: object, token: str | bool | None = None) -> Path:
    """The folder of the decoder that `named_by`, a checkpoint, names `decoder`; errors as `decoder_folder` has them."""
    if decoder is None:
        raise ValueError(
            f"{named_by} does not name its decoder: pass the base language model that it was trained with, or write "
            f'its folder or hub id under "decoder" in {CONFIG_NAME}'
        )
    try:
        return resolve_folder(decoder, token=token)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{named_by} names the decoder {decoder!r}, which cannot be loaded: put it back, or write its folder or "
            f'hub id under "decoder" in {CONFIG_NAME}'
        ) from error


def model_arguments(
    device: str | torch.device, dtype: str | torch.dtype, attn_implementation: str, trust_remote_code: bool
) -> tuple[torch.device, dict[str, Any]]:
    """The device, and the keywords that every `from_pretrained` of transformers gets here."""
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    return place, {
        "dtype": kind,
        "attn_implementation": resolve_attention(attn_implementation, place, kind),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }


def load_model(
    auto_class: Any,  # noqa: ANN401
    folder: Path,
    arguments: dict[str, Any],
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, in eval mode, but never with weights that the folder does not hold.

    FileNotFoundError: no safetensors. ValueError: a file is damaged, or some weights are missing, which transformers
    would draw at random.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter, not a whole model: AutoRegEncoder.from_pretrained({str(folder)!r}) merges it "
            "into its base, and save_pretrained writes the whole"
        )
    if not any(folder.glob(WEIGHTS)):
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} (pickled weights are not read): load it where you trust it and call "
            "save_pretrained, which writes safetensors"
        )
    with readable_weights(folder):
        model, report = auto_class.from_pretrained(folder, output_loading_info=True, **arguments)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]!r}: "
            "give the folder of a whole model of this kind"
        )
    return cast(PreTrainedModel, model.eval())


@contextmanager
def readable_weights(folder: Path) -> Iterator[None]:
    """ValueError that names `folder` where one of its safetensors files turns out to be damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} are damaged or cut short ({error}): copy or download them again"
        ) from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; ValueError if one of its files is cut short."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"tokenizer.json or tokenizer_config.json in {folder} is damaged or cut short ({error}): copy or download "
            "them again"
        ) from error
    return tokenizer


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The input embeddings, [vocabulary, hidden], of any architecture; an adapter's own rows are not in it."""
    module = model.get_input_embeddings()
    # peft's wrapper makes a whole new table, with its rows put in, at every look at `weight`.
    return cast(Tensor, getattr(module, "original_module", module).weight)


def add_embed_tokens(tokenizer: PreTrainedTokenizerBase, k: int) -> list[int]:
    """Add `<EMBED0>` ... `<EMBEDk-1>` to a base model's tokenizer, beside its other special tokens; their ids.

    ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"num_compressed_tokens must be at least 1, not {k}")
    names = embed_tokens(k)
    tokenizer.add_special_tokens({"additional_special_tokens": names}, False)
    return [tokenizer.get_vocab()[name] for name in names]


@torch.no_grad()
def initial_rows(table: Tensor, count: int) -> Tensor:
    """Embeddings for `count` new tokens, in the table's dtype: the mean of its rows, each moved a little in a
    direction of its own (fixed seed), so that they differ and are at a scale that the model knows."""
    mean = table.float().mean(dim=0)
    spread = table.float().std(dim=0)
    noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0))
    return (mean + spread * noise.to(mean.device)).to(table.dtype)


def untrained_config(
    base: str | Path, folder: Path, model: PreTrainedModel, k: int, max_length: int
) -> AutoRegConfig:
    """The settings of an encoder made from the model `base` in `folder`, which becomes its decoder."""
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    return AutoRegConfig(
        num_compressed_tokens=k,
        max_length=min(max_length, longest),
        decoder=str(folder.resolve()) if Path(base).is_dir() else str(base),
    )


def check_positions(model: PreTrainedModel, max_length: int) -> None:
    """ValueError for prompts of more tokens than the model has positions."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(
            f"max_length={max_length} exceeds the {longest} positions of the model; lower max_length"
        )


@torch.inference_mode()
def check_causal(model: PreTrainedModel) -> None:
    """ValueError for a model that looks to the right: it would see padding, and its vectors the batch; and for one
    whose states are not finite."""
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first = model(input_ids=ids, use_cache=False).last_hidden_state[:, 0].float()
    if not torch.isfinite(first).all():
        raise ValueError(
            f"the states of this {type(model).__name__} are not finite: its weights are damaged, or their training has "
            "diverged; train again at a lower learning rate"
        )
    if not torch.allclose(first[0], first[1], rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{type(model).__name__} is not causal: a token's state depends on the tokens after it. "
            "Use a decoder-only language model, such as Llama, Mistral, Qwen or GPT-2"
        )
