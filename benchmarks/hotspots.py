"""Where the time of encoding goes: `python -m benchmarks.hotspots --model mini`, a picture."""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from autoregembed_rag import AutoRegEncoder
from benchmarks.beir import BenchmarkDataError
from benchmarks.encode import TEXTS, draw
from benchmarks.report import environment, print_table, write_json
from benchmarks.shapes import SHAPES

app = typer.Typer(add_completion=False)

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "norms, rotary, gates": ("aten::mul", "aten::pow", "aten::silu", "aten::add", "aten::neg", "aten::cat"),
    "other operations": ("aten::",),
}
TOKENS = "tokenising"


def shares(encoder: AutoRegEncoder, texts: list[str]) -> dict[str, float]:
    """Of the operations that encode `texts`, and tokenising them: what each part takes."""
    encoder.encode(texts[:32])
    with profile(activities=[ProfilerActivity.CPU]) as found:
        encoder.encode(texts)
    parts = dict.fromkeys((*PARTS, TOKENS), 0.0)
    for event in found.key_averages():
        part = next((name for name, starts in PARTS.items() if event.key.startswith(starts)), None)
        if part is not None:
            parts[part] += event.self_cpu_time_total / 1e6
    start = time.perf_counter()
    encoder.prompts.build(texts, encoder.config.document_instruction)
    parts[TOKENS] = time.perf_counter() - start
    return {name: part / sum(parts.values()) for name, part in parts.items()}


@app.command()
def main(
    model: Annotated[list[str], typer.Option(help="A checkpoint; may be given again.")] = ["mini"],  # noqa: B006
    shape: Annotated[list[str] | None, typer.Option(help=f"Random weights too: {', '.join(SHAPES)}.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of texts of each kind.")] = 30_000,
    out: Annotated[Path, typer.Option(help="Where JSON and PNG go.")] = Path("results/hotspots"),
) -> None:
    """Draw the share of each part of encoding, for short, mixed and long texts."""
    texts = {}
    for kind, read in TEXTS.items():
        try:
            texts[kind] = read()
        except BenchmarkDataError as error:
            print(f"{kind}: left out, {error}")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, str | Path] = {Path(name).name: name for name in model}
        for name in shape or []:
            sources[f"random {name}"] = SHAPES[name].write_checkpoint(Path(folder, name))
        for name, source in sources.items():
            encoder = AutoRegEncoder.from_pretrained(source, device="cpu")
            for kind, drawn in texts.items():
                found[f"{name}, {kind}"] = shares(encoder, draw(encoder, drawn, tokens, 0))
    print_table(
        ["share of time", *PARTS, TOKENS],
        [[name, *(f"{share:.0%}" for share in parts.values())] for name, parts in found.items()],
    )
    write_json(out / "results.json", {"shares": found, **environment()})
    figure = Figure(figsize=(8, 1 + 0.45 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(found)
    for part in (*PARTS, TOKENS):
        widths = [parts[part] for parts in found.values()]
        axes.barh(list(found), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("share of time")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(out / "results.png", dpi=130)
    print(f"written: {out / 'results.json'}, {out / 'results.png'}")


if __name__ == "__main__":
    app()
