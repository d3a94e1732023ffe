import gzip
import json

import pytest
import zstandard

from autoregembed_rag.training.data import (
    AlignmentRow,
    CompressionRow,
    read_alignment_rows,
    read_compression_rows,
)

ROWS = [
    {"context": "A fox jumps.", "instruction": "Say it again.", "output": "A fox jumps.", "extra": 1},
    {"context": "Über Tag", "instruction": "Translate.", "output": "By day"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_rows_read_the_same_from_plain_and_compressed_files(tmp_path, suffix):
    lines = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}[
        suffix
    ]
    (tmp_path / f"rows{suffix}").write_bytes(pack(lines))
    assert read_compression_rows(tmp_path / f"rows{suffix}") == [
        CompressionRow("A fox jumps.", "Say it again.", "A fox jumps."),
        CompressionRow("Über Tag", "Translate.", "By day"),
    ]


def test_negatives_may_be_missing_one_text_or_a_list(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"query": "q", "pos": "p"},
        {"query": "q", "pos": "p", "neg": "n"},
        {"query": "q", "pos": "p", "neg": ["a", "b"]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_alignment_rows(file) == [
        AlignmentRow("q", "p"),
        AlignmentRow("q", "p", ("n",)),
        AlignmentRow("q", "p", ("a", "b")),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a JSON object is needed, not list"),
        ('{"query": "q"}', "field 'pos' is missing"),
        ('{"query": "q", "pos": 3}', "field 'pos' must be a text, not int"),
        ('{"query": " ", "pos": "p"}', "field 'query' is empty"),
        ('{"query": "q", "pos": "p", "neg": 5}', "field 'neg' must be a text or a list of texts, not int"),
        ('{"query": "q", "pos": "p", "neg": ["a", null]}', r"field 'neg\[1\]' is missing"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path, line, complaint):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{{"query": "q", "pos": "p"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 3: {complaint}"):
        read_alignment_rows(file)
