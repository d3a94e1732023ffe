"""What `autoregembed plan` prints: the arithmetic, line by line, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .cli_index import human_bytes
from .sizing import CORES_PER_GPU, TOKENS_PER_CORE, USABLE


def describe_one(facts: dict[str, Any], kept: int) -> list[str]:
    """The plan of one number of documents, line by line."""
    (found,) = facts["plans"]
    rows = [row for row in found["indexes"] if row["num_tokens"] == kept]
    return [
        *_head(facts, kept),
        *_encoding_lines(facts),
        f"  all of them    x {found['documents']:,} = {_operations(found['operations'])}",
        *_hours(facts, found),
        "",
        *_shard_lines(facts, found, kept),
        "",
        f"index of {_width(facts, kept)}",
        *_table(
            ["", "on disk", "in memory", "read a query", f"machines of {human_bytes(facts['memory'])}"],
            [
                [
                    _name(row),
                    *(_bytes(row[key]) for key in ("disk", "memory", "read_per_query")),
                    _machines(row),
                ]
                for row in rows
            ],
        ),
        "",
        "memory by how many compressed tokens are kept (--num-tokens)",
        *_table(
            ["", *facts["model"]["dimensions"]],
            [[_name(row), *_across(found["indexes"], row)] for row in rows],
        ),
        "",
        *_notes(facts),
    ]


def describe_many(facts: dict[str, Any], kept: int) -> list[str]:
    """A table over numbers of documents, with the arithmetic of one document."""
    plans, encoding = facts["plans"], facts["encoding"]
    counts = [_short(found["documents"]) for found in plans]
    width = str(kept)
    tables = []
    for title, cell in (
        ("on disk", lambda row: _bytes(row["disk"])),
        ("in memory", lambda row: _bytes(row["memory"])),
        (f"machines of {human_bytes(facts['memory'])}", _machines),
    ):
        by_count = [[row for row in found["indexes"] if row["num_tokens"] == kept] for found in plans]
        rows = [
            [_name(row), *(cell(found[place]) for found in by_count)] for place, row in enumerate(by_count[0])
        ]
        tables += ["", f"index of {_width(facts, kept)}, {title}", *_table(["documents", *counts], rows)]
    return [
        *_head(facts, kept),
        *_encoding_lines(facts),
        "",
        *_table(
            ["documents", *counts],
            [
                ["operations", *(_operations(found["operations"]) for found in plans)],
                [_hour_name(encoding), *(_rate(found["device_seconds"] / 3600) for found in plans)],
                [f"on {_devices(encoding)}", *(_span(found["wall_seconds"]) for found in plans)],
                ["shards", *(human_bytes(found["shards"][width]) for found in plans)],
            ],
        ),
        *tables,
        "",
        *_notes(facts),
    ]


def _head(facts: dict[str, Any], kept: int) -> list[str]:
    model, encoding = facts["model"], facts["encoding"]
    (first, *_), number = facts["plans"], len(facts["plans"])
    count = f"{first['documents']:,} documents" if number == 1 else "documents"
    size = (
        f"{model['parameters'] / 1e9:.1f}B"
        if model["parameters"] > 1e9
        else f"{model['parameters'] / 1e6:.1f}M"
    )
    return [
        f"{count} of {encoding['tokens']} tokens, {model['name']} ({size} parameters), {_width(facts, kept)}",
        "",
    ]


def _width(facts: dict[str, Any], kept: int) -> str:
    model = facts["model"]
    dimension = model["dimensions"][str(kept)]
    if model["pooling"] == "mean":
        return f"{dimension:,} dimensions (the mean of {model['k']} compressed tokens)"
    which = f"all {kept}" if kept == model["k"] else f"{kept} of {model['k']}"
    return f"{dimension:,} dimensions ({which} compressed tokens of {model['hidden']:,})"


def _encoding_lines(facts: dict[str, Any]) -> list[str]:
    model, found = facts["model"], facts["encoding"]
    n, k, width, layers = found["prompt"], model["k"], model["attention_width"], model["layers"]
    cut = "" if found["text_tokens"] == found["tokens"] else f" (cut from {found['tokens']:,})"
    products = f"2 x {model['matrices']:,} x {n}"
    attention = f"2 x {layers} x {width} x {n}^2"
    if model["last"]:  # the last layer's rest is for compressed tokens alone
        products = f"2 x ({model['matrices']:,} x {n} - {model['last']:,} x {n - k})"
        attention = f"2 x {layers - 1} x {width} x {n}^2 + 4 x {width} x {k} x {n}"
    lines = [
        "encoding",
        f"  a prompt       {found['text_tokens']:,} of text{cut} + {found['around']} of bos, instruction and "
        f"compressed tokens = {n} tokens",
        f"  products       {products} = {_operations(found['products'])}",
        f"  attention      {attention} = {_operations(found['attention'])}",
        f"  a document     {_operations(found['operations'])}",
    ]
    if found["given"]:
        return [
            *lines,
            f"  one {found['device']:11}{_rate(found['documents_per_second'])} documents/s, as given",
        ]
    share = "given" if found["utilisation_given"] else "measured" if found["device"] == "cpu" else "assumed"
    lines.append(
        f"  one {found['device']:11}{_operations(found['peak'])}/s ({found['peak_source']}) x {found['utilisation']:g} "
        f"({share}) = {_rate(found['by_operations'])} documents/s"
    )
    if found["by_tokenising"]:
        lines.append(
            f"  its CPU        {CORES_PER_GPU} cores (assumed) x {TOKENS_PER_CORE:,} tokens/s (measured) / "
            f"{found['tokens']} = {_rate(found['by_tokenising'])} documents/s tokenised"
        )
    return lines


def _hours(facts: dict[str, Any], found: dict[str, Any]) -> list[str]:
    encoding = facts["encoding"]
    return [
        f"  {_hour_name(encoding):15}"
        f"{found['documents']:,} / {_rate(encoding['documents_per_second'])} / 3,600 = "
        f"{_rate(found['device_seconds'] / 3600)}",
        f"  wall time      on {_devices(encoding)}: {_span(found['wall_seconds'])}",
    ]


def _shard_lines(facts: dict[str, Any], found: dict[str, Any], kept: int) -> list[str]:
    dimension = facts["model"]["dimensions"][str(kept)]
    each = found["shards"][str(kept)] / found["documents"]
    parts = f"2 x {dimension:,} of vector (float16) + {facts['text_bytes']:,.0f} of text"
    return [
        "shards, before compression",
        f"  a document     {parts} + {facts['metadata_bytes'] + facts['id_bytes']} of metadata and id = "
        f"{human_bytes(each)}",
        f"  all of them    {human_bytes(found['shards'][str(kept)])}",
    ]


def _notes(facts: dict[str, Any]) -> list[str]:
    model, encoding = facts["model"], facts["encoding"]
    notes = list(model["notes"])
    if encoding["text_tokens"] < encoding["tokens"]:
        room = encoding["text_tokens"]
        notes.append(
            f"texts are cut: the model reads {room} tokens of a text (max_length {model['max_length']}); to encode all "
            f"of {encoding['tokens']:,}, split documents into parts of {room} and count each as one"
        )
    weights = 2 * model["parameters"]
    if encoding["device_memory"] and weights > USABLE * encoding["device_memory"]:
        notes.append(
            f"the weights, {human_bytes(weights)} in bfloat16, do not fit into one {encoding['device']} of "
            f"{human_bytes(encoding['device_memory'])}"
        )
    if not encoding["given"] and (encoding["by_tokenising"] or math.inf) < encoding["by_operations"]:
        notes.append("tokenising, not the GPU, is what limits such a small model: a cheaper GPU does as well")
    if encoding["device"] != "cpu" and not encoding["given"]:
        notes.append(
            "no GPU was measured: measure yours by `python -m benchmarks.encode`, and give --documents-per-second"
        )
    rows = [row for found in facts["plans"] for row in found["indexes"]]
    notes += dict.fromkeys(f"no: {row['why_not']}" for row in rows if row["why_not"])
    notes += [
        f"{USABLE:.0%} of a machine's memory is used; filling a flat DocumentIndex takes twice its memory for a while, "
        "one with lists 1 GB more than its own",
        "Milvus spreads over machines, and takes as much again for each replica; a DocumentIndex is one machine's, and "
        "more than one means several indexes, searched side by side",
    ]
    return [f"note: {note}" for note in notes]


def _name(row: dict[str, Any]) -> str:
    return f"{row['engine']} {row['factory']}"


def _bytes(count: float | None) -> str:
    return human_bytes(count) if count else "-"


def _machines(row: dict[str, Any]) -> str:
    return "no" if row["why_not"] else f"{row['machines']:,}"


def _across(indexes: Sequence[dict[str, Any]], like: dict[str, Any]) -> list[str]:
    """The memory of the same kind by each number of tokens."""
    same = [row for row in indexes if _name(row) == _name(like)]
    return [_bytes(row["memory"]) for row in same]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in (header, *rows)
    ]


def _hour_name(encoding: dict[str, Any]) -> str:
    return "core hours" if encoding["device"] == "cpu" else "GPU hours"


def _devices(encoding: dict[str, Any]) -> str:
    count, device = encoding["devices"], encoding["device"]
    if device == "cpu":
        return f"{count:,} core{'s' if count > 1 else ''}"
    return f"{count:,} x {device}"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _operations(number: float) -> str:
    """12.3 GFLOP and the like."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:,.3g} ZFLOP"


def _short(count: int) -> str:
    """1M, 10B."""
    for base, unit in ((10**9, "B"), (10**6, "M")):
        if count >= base:
            return f"{count / base:g}{unit}"
    return f"{count:,}"


def _span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, base, most in (
        ("s", 1, 100),
        ("min", 60, 6000),
        ("h", 3600, 48 * 3600),
        ("days", 86400, 730 * 86400),
    ):
        if seconds < most:
            return f"{seconds / base:.3g} {unit}"
    return f"{seconds / 365 / 86400:,.1f} years"
