"""LlamaIndex's MetadataFilters as filters of a DocumentIndex.

They mean what they mean for LlamaIndex's own SimpleVectorStore, with these differences:

- groups nest, to any depth that the index takes; SimpleVectorStore raises;
- values compare by JSON type: true is not 1;
- where it raises for a value of another type (order between a text and a number, a text in a number), such a
  value does not match;
- `== None` matches a null that is there and `!= None` the rest; there they match nothing and everything;
- "a.b" is also the key b of the object a;
- text_match_insensitive folds case, so that "STRASSE" is in "Straße", where SimpleVectorStore lowers it;
- in, nin, any and all take lists, the other operators do not: there "a" is in "abc", and lists can be equal.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

_ONE_VALUE = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.CONTAINS: "$contains",
    FilterOperator.TEXT_MATCH: "$text_match",
    FilterOperator.TEXT_MATCH_INSENSITIVE: "$text_match_insensitive",
}
_LISTS = (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)


def compile_filters(filters: MetadataFilters | None) -> dict[str, Any]:
    """The index's filter for `filters`; {} for None and for no filters at all, which match everything.

    Raises TypeError, naming operator and key, for a list where a value is needed and the reverse; what the index
    refuses is refused at the search.
    """
    if filters is None or not filters.filters:
        return {}
    parts = [
        compile_filters(item) if isinstance(item, MetadataFilters) else _compile_one(item)
        for item in filters.filters
    ]
    if filters.condition is FilterCondition.OR:
        return {"$or": parts}
    if filters.condition is FilterCondition.NOT:
        return {"$not": {"$or": parts}}
    return parts[0] if len(parts) == 1 else {"$and": parts}


def _compile_one(item: MetadataFilter) -> dict[str, Any]:
    if item.operator is FilterOperator.IS_EMPTY:
        return {item.key: {"$empty": True}}
    if isinstance(item.value, list) != (item.operator in _LISTS):
        wanted = "a list" if item.operator in _LISTS else "one value; for a list use 'in', 'any' or 'all'"
        raise TypeError(
            f"filter on {item.key!r}: {item.operator.value!r} takes {wanted}, got {type(item.value).__name__}"
        )
    if item.operator in _ONE_VALUE:
        return {item.key: {_ONE_VALUE[item.operator]: item.value}}
    return _compile_list(item.key, item.operator, item.value)


def _compile_list(key: str, operator: FilterOperator, values: Any) -> dict[str, Any]:
    if operator in (FilterOperator.IN, FilterOperator.NIN):
        return {key: {f"${operator.value}": values}}
    # As in SimpleVectorStore, a text has its parts, as a list its items; the index's own $any and $all want a list.
    has = [{key: {"$contains": value}} for value in values]
    if operator is FilterOperator.ANY:
        return {"$or": has} if has else {key: {"$in": []}}
    return {"$and": has} if has else {key: {"$exists": True, "$ne": None}}
