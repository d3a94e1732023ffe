"""What a machine can do at most, and how much a model asks of it at least."""

import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.sizing import Workload


def encode_operations(encoder: AutoRegEncoder, lengths: Iterable[int]) -> float:
    """Floating-point operations without which prompts of these lengths cannot be encoded: nothing padded, and of the
    last layer keys and values of all tokens and the rest at the compressed ones."""
    workload = Workload.of(encoder.model, encoder.model.config)
    return float(sum(workload.operations(tokens, encoder.num_compressed_tokens) for tokens in lengths))


def attention(config: PretrainedConfig, tokens: int, layers: int) -> int:
    """Operations of scores and their sums, over what stands to the left."""
    return 2 * layers * int(config.hidden_size) * tokens**2


def matrix_entries(model: nn.Module) -> int:
    """Of all linear layers: a token takes a multiplication and an addition for each."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Operations per second of the fastest square matrix product, of 1024 rows, or 8192 on CUDA."""
    n = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(n, n).to(device, dtype) for _ in range(2))
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n**3 / fastest


def circumstances(device: torch.device, dtype: torch.dtype, peak: float, start: float) -> dict[str, Any]:
    """What a report says of the machine as it was used since `start`, in seconds of `time.perf_counter`."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matmul peak": peak,
        "load": os.getloadavg()[0],
        "seconds": time.perf_counter() - start,
    }
