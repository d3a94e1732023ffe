"""What every framework's embedding class needs; imports no PyTorch until an encoder is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoder import AutoRegEncoder

LOADING_OPTIONS = (
    "device",
    "dtype",
    "attn_implementation",
    "query_instruction",
    "document_instruction",
    "num_tokens",
    "pooling",
    "quantize",
)
"""The keywords of `AutoRegEncoder.from_pretrained` that an embedding class offers under the same names."""


def load_encoder(model: object, settings: object) -> AutoRegEncoder:
    """The encoder behind an embedding class.

    Args:
        model: a bundled name, a folder or a hub id, or a ready encoder, which is taken as it is.
        settings: an object with the LOADING_OPTIONS as attributes.

    Raises:
        TypeError: `model` is something else.
        ValueError: an option is set although the encoder is already loaded.
    """
    options: dict[str, Any] = {name: getattr(settings, name) for name in LOADING_OPTIONS}
    if isinstance(model, str | Path):
        from .encoder import AutoRegEncoder

        return AutoRegEncoder.from_pretrained(model, **options)
    if not hasattr(model, "encode_queries"):
        raise TypeError(
            f"model must be a name, a folder or an AutoRegEncoder, not {type(model).__name__}: "
            'model="mini" is the bundled checkpoint'
        )
    if given := [name for name, value in options.items() if value not in (None, "auto")]:
        raise ValueError(
            f"{', '.join(given)} cannot change an encoder that is already loaded: "
            "give them to AutoRegEncoder.from_pretrained"
        )
    encoder: AutoRegEncoder = model  # type: ignore[assignment]
    return encoder
