"""Nodes as rows of a DocumentIndex, and rows as nodes.

A row's text and metadata are the node's own, so LangChain reads them as they are. What else a node has
(relationships, templates, offsets) goes under NODE_KEY, and its source document's id under REF_DOC_KEY,
where a filter can find it; readers of other frameworks drop both. A row without them, one that LangChain
wrote, becomes a plain TextNode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

# Keys with this prefix are the store's in every framework (see langchain_autoregembed.vectorstores).
RESERVED_PREFIX = "_llama_index_"
NODE_KEY = RESERVED_PREFIX + "node"
REF_DOC_KEY = RESERVED_PREFIX + "ref_doc_id"

# What the row holds already; TextNode has its text in `text`, Node in `text_resource`.
_ELSEWHERE: dict[str, Any] = {
    "id_": True,
    "embedding": True,
    "metadata": True,
    "text": True,
    "text_resource": {"text": True},
}


def node_to_row(node: BaseNode) -> tuple[str, dict[str, Any]]:
    """The text and the metadata to store; ValueError names a metadata key that the store needs itself."""
    if reserved := [key for key in node.metadata if key.startswith(RESERVED_PREFIX)]:
        raise ValueError(
            f"node {node.node_id!r} has metadata {', '.join(reserved)}: "
            f"keys that start with {RESERVED_PREFIX!r} belong to the store; rename them"
        )
    fields = node.model_dump(mode="json", exclude=_ELSEWHERE)
    row = {**node.metadata, NODE_KEY: {"type": node.class_name(), "fields": fields}}
    if node.ref_doc_id is not None:
        row[REF_DOC_KEY] = node.ref_doc_id
    return node.get_content(metadata_mode=MetadataMode.NONE), row


def row_to_node(id_: str, text: str, row: Mapping[str, Any]) -> BaseNode:
    """The node that was stored, without its embedding."""
    metadata = {key: value for key, value in row.items() if not key.startswith(RESERVED_PREFIX)}
    stored = row.get(NODE_KEY)
    if stored is None:
        return TextNode(id_=id_, text=text, metadata=metadata)
    fields = {**stored["fields"], "id_": id_, "metadata": metadata}
    if resource := fields.get("text_resource"):
        fields["text_resource"] = {**resource, "text": text}
    else:
        fields["text"] = text
    return metadata_dict_to_node({"_node_type": stored["type"], "_node_content": json.dumps(fields)})
