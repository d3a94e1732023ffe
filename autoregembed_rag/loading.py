"""Where models come from and how they are placed: names, device, dtype and attention, each with an "auto"."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

BUNDLED = Path(__file__).parent / "checkpoints"
# What transformers reads; other files of the kind (adapters, another format's copy) are none of our weights.
WEIGHTS = "model*.safetensors"


def resolve_folder(model: str | Path) -> Path:
    """The local folder of a model: a bundled name, a folder, or a hub id (downloaded, safetensors only).

    FileNotFoundError lists what would work.
    """
    bundled = sorted(file.parent.name for file in BUNDLED.glob("*/config.json"))
    if isinstance(model, str) and model in bundled:
        return BUNDLED / model
    if Path(model, "config.json").is_file():
        return Path(model)
    remedy = (
        f"{str(model)!r} is not a model that can be loaded. "
        f"What works: a bundled name ({', '.join(map(repr, bundled)) or 'none'}), "
        "the path of a folder with config.json, *.safetensors and tokenizer files, "
        "or a Hugging Face hub id such as 'org/name'"
    )
    if Path(model).exists() or str(model).count("/") != 1:
        raise FileNotFoundError(remedy)
    try:
        return Path(
            snapshot_download(
                str(model), allow_patterns=["*.json", WEIGHTS, f"*/{WEIGHTS}", "*.model", "*.txt", "*.py"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{remedy} (the hub said: {type(error).__name__})") from error


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto": CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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

    FileNotFoundError: no safetensors. ValueError: some weights are missing, which transformers would draw at
    random.
    """
    if not any(folder.glob(WEIGHTS)):
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} (pickled weights are not read): load it where you trust it and call "
            "save_pretrained, which writes safetensors"
        )
    model, report = auto_class.from_pretrained(folder, output_loading_info=True, **arguments)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]!r}: "
            "give the folder of a whole model of this kind"
        )
    return cast(PreTrainedModel, model.eval())


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The input embeddings, [vocabulary, hidden], of any architecture."""
    return cast(Tensor, model.get_input_embeddings().weight)


@torch.no_grad()
def add_rows(body: PreTrainedModel, ids: list[int], *, known: int) -> None:
    """Start the embeddings of new tokens at the mean of the first `known` rows, each moved a little in a direction
    of its own (fixed seed); the table grows if it must."""
    table = embedding_table(body)
    mean = table[:known].float().mean(dim=0)
    spread = table[:known].float().std(dim=0)
    # The ids decide, not len(tokenizer): a vocabulary may have holes.
    if max(ids) >= len(table):
        body.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = embedding_table(body)
    noise = torch.randn(len(ids), len(mean), generator=torch.Generator().manual_seed(0))
    rows = mean + spread * noise.to(mean.device)
    table[ids] = rows.to(table.dtype)


@torch.inference_mode()
def check_causal(model: PreTrainedModel) -> None:
    """ValueError for a model that looks to the right: it would see padding, and its vectors the batch."""
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first = model(input_ids=ids, use_cache=False).last_hidden_state[:, 0].float()
    if not torch.allclose(first[0], first[1], rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{type(model).__name__} is not causal: a token's state depends on the tokens after it. "
            "Use a decoder-only language model, such as Llama, Mistral, Qwen or GPT-2"
        )
