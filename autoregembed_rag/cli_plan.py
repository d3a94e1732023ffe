"""`autoregembed plan`: what encoding and keeping so many documents takes, with the arithmetic."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_errors import errors_in_one_line
from .cli_index import human_bytes

if TYPE_CHECKING:
    from autoregembed_indexes.sizes import Documents, IndexSize

    from .sizing import Device, PlannedModel

COUNTS = tuple(10**power for power in range(6, 11))
TEXT_BYTES = 4.8  # of a token; measured for English and mini's tokenizer
METADATA_BYTES, ID_BYTES = 64, 36

_NUMBER = re.compile(r"(-?[\d.,_]+(?:e\d+)?)\s*([kmbgt]?)(i?)b?", re.IGNORECASE)
_THOUSANDS = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3, "t": 4}


def plan(
    documents: Annotated[
        str | None,
        typer.Option(metavar="N", help="How many: 5000000, 5M, 1.5B. Default: a table of 1M to 10B."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="T", min=1, help="Tokens of a document's text, in the mean.")
    ] = 256,
    model: Annotated[
        str,
        typer.Option(
            help="Bundled name, folder, hub id whose config.json is here, or a shape: 58m, qwen2.5-0.5b, llama2-7b. "
            "Weights are never read."
        ),
    ] = "mini",
    gpus: Annotated[
        int, typer.Option(min=1, help="How many encode at once; with --device cpu, how many cores.")
    ] = 1,
    device: Annotated[str, typer.Option(help="h200, h100, a100, l40s, a10, l4, or cpu.")] = "h100",
    utilisation: Annotated[
        float | None,
        typer.Option(help="Share of the device's peak that is reached; default: as the plan says."),
    ] = None,
    documents_per_second: Annotated[
        float | None, typer.Option(help="Of one device, where you have measured it.")
    ] = None,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Keep the first J compressed tokens only; default: all.")
    ] = None,
    text_bytes: Annotated[
        float | None, typer.Option(help=f"Bytes of a document's text; default: {TEXT_BYTES} a token.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory of a machine that serves searches.")] = "64GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan for many documents: operations, GPU hours, bytes of shards and of each kind of index, and the machines.

    Shows the arithmetic. Reads a model's configuration only; docs/scale.md says what was measured and what is assumed.

    Example: autoregembed plan --documents 100M --tokens 300 --model llama2-7b --gpus 8
    """
    with errors_in_one_line():
        counts = COUNTS if documents is None else (_count(documents),)
        machine = _number(memory, "--memory")
        _check_range("--utilisation", utilisation, 0, 1)
        _check_range("--documents-per-second", documents_per_second, 0, 1e12)
        _check_range("--text-bytes", text_bytes, 0, 1e9)
        from .sizing import DEVICES, plan_model

        if device not in DEVICES:
            raise ValueError(f"--device must be one of {', '.join(DEVICES)}, not {device!r}")
        planned = plan_model(model)
        kept = planned.widths[-1] if num_tokens is None else num_tokens
        _check_range(f"--num-tokens of {model}", kept, 0, planned.widths[-1])
        text = TEXT_BYTES * tokens if text_bytes is None else text_bytes
        encoding = _encoding(planned, tokens, DEVICES[device], gpus, utilisation, documents_per_second)
        facts = {
            "model": _model_facts(planned),
            "text_bytes": text,
            "metadata_bytes": METADATA_BYTES,
            "id_bytes": ID_BYTES,
            "memory": machine,
            "encoding": encoding,
            "plans": [_plan_facts(planned, count, text, encoding, machine) for count in counts],
        }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from .plan_text import describe_many, describe_one

    describe = describe_many if documents is None else describe_one
    typer.echo("\n".join(describe(facts, kept)))


def _number(text: str, option: str) -> float:
    """5000000, 5M, 1.5B, 64GB, 64GiB."""
    try:
        digits, unit, binary = _NUMBER.fullmatch(text.strip()).groups()  # type: ignore[union-attr]
        base = 1024 if binary else 1000
        number: float = float(re.sub("[,_]", "", digits)) * base ** _THOUSANDS[unit.lower()]
    except (AttributeError, ValueError, OverflowError):
        raise ValueError(f"{option} {text!r} is not a number such as 5000000, 5M or 64GB") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{option} must be more than 0, not {text}")
    return number


def _count(text: str) -> int:
    number = _number(text, "--documents")
    if number != int(number) or number > 10**13:
        raise ValueError(f"--documents must be a whole number up to 10,000 billion, not {text}")
    return int(number)


def _check_range(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least < value <= most:
        raise ValueError(f"{name} must be more than {least:g} and at most {most:g}, not {value:g}")


def _model_facts(planned: PlannedModel) -> dict[str, Any]:
    work = planned.workload
    return {
        "name": planned.name,
        "parameters": work.parameters,
        "matrices": work.matrices,
        "last": work.last,
        "layers": work.layers,
        "hidden": work.hidden,
        "attention_width": work.attention_width,
        "k": planned.k,
        "pooling": planned.config.pooling,
        "max_length": planned.config.max_length,
        "dimensions": {str(width): planned.dimension(width) for width in planned.widths},
        "notes": list(planned.notes),
    }


def _encoding(
    planned: PlannedModel,
    tokens: int,
    device: Device,
    devices: int,
    utilisation: float | None,
    documents_per_second: float | None,
) -> dict[str, Any]:
    """What one document asks for, and how many of them one device encodes in a second."""
    from .sizing import CORES_PER_GPU, TOKENS_PER_CORE

    work, kept = planned.workload, min(tokens, planned.room)
    prompt = kept + planned.around
    share = work.utilisation(device) if utilisation is None else utilisation
    by_operations = device.peak * share / work.operations(prompt, planned.k)
    by_tokenising = CORES_PER_GPU * TOKENS_PER_CORE / tokens if device.name != "cpu" else math.inf
    return {
        "tokens": tokens,
        "text_tokens": kept,
        "around": planned.around,
        "prompt": prompt,
        "products": work.products(prompt, planned.k),
        "attention": work.attention(prompt, planned.k),
        "operations": work.operations(prompt, planned.k),
        "device": device.name,
        "devices": devices,
        "peak": device.peak,
        "peak_source": device.source,
        "device_memory": device.memory,
        "utilisation": share,
        "utilisation_given": utilisation is not None,
        "by_operations": by_operations,
        "by_tokenising": None if math.isinf(by_tokenising) else by_tokenising,
        "given": documents_per_second is not None,
        "documents_per_second": documents_per_second or min(by_operations, by_tokenising),
    }


def _plan_facts(
    planned: PlannedModel, count: int, text: float, encoding: dict[str, Any], machine: float
) -> dict[str, Any]:
    from autoregembed_indexes.sizes import Documents

    seconds = count / encoding["documents_per_second"]
    indexes, shards = [], {}
    for width in planned.widths:
        stored = Documents(count, planned.dimension(width), text, METADATA_BYTES, ID_BYTES)
        shards[str(width)] = count * (2 * stored.dimension + text + METADATA_BYTES + ID_BYTES)
        indexes += [{"num_tokens": width, **row} for row in _indexes(stored, machine)]
    return {
        "documents": count,
        "operations": count * encoding["operations"],
        "device_seconds": seconds,
        "wall_seconds": seconds / encoding["devices"],
        "shards": shards,
        "indexes": indexes,
    }


def _indexes(stored: Documents, machine: float) -> list[dict[str, Any]]:
    from autoregembed_indexes.sizes import (
        FACTORIES,
        MILVUS_DIMENSIONS,
        MILVUS_KINDS,
        MOST_DATABASE,
        database_bytes,
        document_index_size,
        milvus_size,
    )

    too_large = sum(database_bytes(stored).values()) > MOST_DATABASE
    too_wide = stored.dimension > MILVUS_DIMENSIONS
    why_not = (
        f"the database of one DocumentIndex ends at {human_bytes(MOST_DATABASE)}" if too_large else None,
        f"Milvus ends at {MILVUS_DIMENSIONS:,} dimensions: keep fewer compressed tokens (--num-tokens)"
        if too_wide
        else None,
    )
    rows = [
        _index_facts("DocumentIndex", factory, document_index_size(stored, factory), machine, why_not[0])
        for factory in FACTORIES
    ]
    for kind in MILVUS_KINDS:
        size = None if too_wide else milvus_size(stored, kind)
        rows.append(_index_facts("Milvus", kind, size, machine, why_not[1]))
    return rows


def _index_facts(
    engine: str, factory: str, size: IndexSize | None, machine: float, why_not: str | None
) -> dict[str, Any]:
    from .sizing import USABLE

    return {
        "engine": engine,
        "factory": factory,
        "kind": size and size.kind,
        "disk": size and size.disk,
        "memory": size and size.memory,
        "read_per_query": size and size.read,
        "machines": size and math.ceil(size.memory / (USABLE * machine)),
        "why_not": why_not,
    }
