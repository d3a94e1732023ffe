"""One base model and one untrained encoder for each family."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_models import FAMILIES, write_base

from autoregembed_rag import AutoRegEncoder, FrozenDecoder


class Kin(NamedTuple):
    """A family's name, its base folder, an encoder made from it and its decoder, on the CPU in float32."""

    name: str
    base: Path
    encoder: AutoRegEncoder
    decoder: FrozenDecoder


@pytest.fixture(scope="session", params=FAMILIES)
def kin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kin:
    base = write_base(tmp_path_factory.mktemp("families") / request.param, request.param)
    encoder = AutoRegEncoder.from_base(base, 3, device="cpu", dtype="float32")
    decoder = FrozenDecoder.from_pretrained(base, device="cpu", dtype="float32", max_target_tokens=40)
    return Kin(request.param, base, encoder, decoder)
