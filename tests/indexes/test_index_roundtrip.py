"""Whatever goes in comes out equal: ids, texts and metadata, from a fresh connection."""

import json
import tempfile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed_indexes import Document, DocumentIndex

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NASTY = st.sampled_from(
    ["\0", "a\0b", "\x00\x01", '"', "\\", "'", "\ufeff", "\uffff", "\U0001f600", "e\u0301", "é"]
)
STRINGS = TEXT | NASTY
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=10,
)
DOCUMENTS = st.lists(
    st.tuples(STRINGS, STRINGS, st.dictionaries(STRINGS, JSON, max_size=4)),
    max_size=6,
    unique_by=lambda item: item[0],
)


def strict(value):
    """A form in which true, 1 and 1.0 differ, and so do 0.0 and -0.0."""
    return json.dumps(value)


@settings(max_examples=30, deadline=None)
@given(DOCUMENTS)
def test_documents_come_back_equal_after_reopening(documents):
    ids, texts, metadatas = ([item[part] for item in documents] for part in range(3))
    vectors = np.ones((len(documents), 3), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        with DocumentIndex.create(f"{folder}/index", dimension=3) as index:
            assert index.add(vectors, texts, ids, metadatas) == ids
        with DocumentIndex.open(f"{folder}/index") as index:
            expected = [Document(*document) for document in documents]
            assert index.ids() == ids
            assert strict(index.get(ids)) == strict(expected)
            if documents:
                hits = index.search(np.ones((1, 3)), k=10)[0]
                assert strict([(hit.id, hit.text, hit.metadata) for hit in hits]) == strict(expected)
            assert index.delete(ids) == len(ids) and len(index) == 0


def test_tuples_come_back_as_lists_and_inputs_are_not_changed():
    metadata = {"pair": (1, (2, "x")), "none": None}
    with DocumentIndex.create(dimension=3) as index:
        index.add(np.ones((1, 3)), ["text"], ["a"], [metadata])
        [found] = index.get(["a"])
        assert found.metadata == {"pair": [1, [2, "x"]], "none": None}
        found.metadata["pair"].append("changed by the caller")
        assert index.get(["a"])[0].metadata == {"pair": [1, [2, "x"]], "none": None}
    assert metadata == {"pair": (1, (2, "x")), "none": None}


def test_a_very_long_text_comes_back_equal():
    text = "0123456789\0é" * 500_000
    with DocumentIndex.create(dimension=3) as index:
        index.add(np.ones((1, 3)), [text], ["a"])
        assert index.get(["a"])[0].text == text


def test_a_path_may_hold_spaces_and_other_signs(tmp_path):
    path = tmp_path / "a b?c=d#e%20 é😀"
    with DocumentIndex.create(path, dimension=3) as index:
        index.add(np.ones((1, 3)), ["text"], ["a"])
    for read_only in (False, True):
        with DocumentIndex.open(path, read_only=read_only) as index:
            assert index.ids() == ["a"]
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
