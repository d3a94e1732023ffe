"""What every framework's embedding class and reranker needs; imports no PyTorch until an encoder is loaded."""

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


def name_of(model: object) -> str | None:
    """A model as a dump of a framework's object holds it: its name or folder, None where none was given.

    ValueError: it is loaded, and no text opens it again.
    """
    if model is None or isinstance(model, str):
        return model
    if isinstance(model, Path):
        return str(model)
    raise ValueError(
        f"a ready {type(model).__name__} cannot be written down: give the model by name or folder, or pickle"
    )


def made_again(instance: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """For `__reduce__` of a framework's pydantic object: its class and the arguments that it was given, so that weights
    are opened again by path, and what cannot be is an error."""
    return _make, (type(instance), {name: getattr(instance, name) for name in instance.model_fields_set})


def _make(kind: Any, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
    return kind(**arguments)
