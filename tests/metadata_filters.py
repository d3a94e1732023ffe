"""Metadata and filters that hypothesis draws, and what a filter means in plain Python."""

import math
import operator

from hypothesis import strategies as st

PLAIN_KEYS = ["a", "b", "a.b", "a.b.c", "é", "[0]", "a b", "it's", "a.0", "x.$y"]
ODD_KEYS = ['q"uote', "back\\slash", "", ".", "a.", "a..b", "new\nline", "nul\0", "a.new\nline"]
KEYS = st.sampled_from([*PLAIN_KEYS, *ODD_KEYS])
PARTS = st.sampled_from(
    ["a", "b", "c", "a.b", "b.c", "", "0", "$y", "x", "new\nline", 'q"uote', "nul\0", "é"]
)
NUMBERS = [0, 1, -1, 2, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**64 + 1, -(2**63), -(2**63) - 1]
NUMBERS += [2**1023, 10**400, -(10**400), 0.0, -0.0, 1.0, 1.5, 0.1, 0.1 + 0.2, 0.3, 1e16, 1e22, 1e23, 1e300]
NUMBERS += [2.0**63, 2.0**64, 2.0**1023, -1e300, 5e-324, 1.7976931348623157e308]
NUMBERS += [math.nextafter(0.1, 1), math.nextafter(1e23, 0)]
TEXTS = ["", "1", "true", "null", "a", "A", "ab", "a\0", "a\0b", "a\0c", "\0", "é", "e\u0301", "ß", "SS"]
TEXTS += ["\uffff", "\U0001f600", 'x"y', "x\\y", "[1,1]", "[1,null]", "[]", "{}", "\x7f", "\x1f"]
VALUES = st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.floats(
    allow_nan=False, allow_infinity=False
)
NESTED = st.recursive(
    VALUES | st.lists(VALUES, max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(PARTS, inner, max_size=3),
    max_leaves=4,
)
METADATA = st.dictionaries(KEYS | PARTS, NESTED, max_size=4)
ORDERED = st.sampled_from([*NUMBERS, *TEXTS])
BY_VALUE = {
    "$eq": VALUES,
    "$ne": VALUES,
    **dict.fromkeys(["$gt", "$gte", "$lt", "$lte"], ORDERED),
    **dict.fromkeys(["$in", "$nin", "$any", "$all"], st.lists(VALUES, max_size=5)),
    **dict.fromkeys(["$exists", "$empty"], st.booleans()),
    "$contains": VALUES,
    **dict.fromkeys(["$text_match", "$text_match_insensitive"], st.sampled_from(TEXTS)),
}
OPERATORS = st.recursive(
    st.sampled_from(sorted(BY_VALUE)).flatmap(lambda name: st.fixed_dictionaries({name: BY_VALUE[name]})),
    lambda inner: st.builds(lambda a, b: a | b, inner, inner) | st.fixed_dictionaries({"$not": inner}),
    max_leaves=2,
)
FILTERS = st.recursive(
    st.dictionaries(KEYS, VALUES | OPERATORS, min_size=1, max_size=2),
    lambda inner: (
        st.fixed_dictionaries({"$not": inner})
        | st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)})
        | st.builds(lambda a, b: a | b, inner, inner)
    ),
    max_leaves=4,
)
KINDS = {bool: "bool", int: "number", float: "number", str: "text", type(None): "null", list: "list"}
MISSING = object()


def kind_of(value):
    return KINDS.get(type(value), "object")


def equal(left, right):
    """Equality by JSON type: a number equals a number of the same value, true is not a number."""
    return kind_of(left) == kind_of(right) and kind_of(left) not in ("list", "object") and left == right


def look_up(metadata, key):
    """The key itself where it is there, else through nested objects."""
    if key in metadata:
        return metadata[key]
    found = metadata
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return MISSING
        found = found[part]
    return found


def contains(found, wanted):
    if isinstance(found, str):
        return isinstance(wanted, str) and wanted in found
    return isinstance(found, list) and any(equal(item, wanted) for item in found)


def holds(found, name, operand):
    """Whether one operator accepts a value that is there."""
    comparisons = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
    if name in comparisons:
        same_kind = kind_of(found) == kind_of(operand) and kind_of(found) in ("number", "text")
        return same_kind and comparisons[name](found, operand)
    if name in ("$any", "$all"):
        quantifier = any if name == "$any" else all
        return isinstance(found, list) and quantifier(contains(found, item) for item in operand)
    if name == "$contains":
        return contains(found, operand)
    if not isinstance(found, str):
        return False
    return operand in found if name == "$text_match" else operand.casefold() in found.casefold()


def accepts(found, name, operand):
    """Whether one operator accepts a value or MISSING."""
    if name == "$not":
        return not all(accepts(found, *item) for item in operand.items())
    if name == "$exists":
        return (found is not MISSING) == operand
    if name == "$empty":
        return (found is MISSING or found is None or found in ("", [])) == operand
    if name in ("$eq", "$ne"):
        return (found is not MISSING and equal(found, operand)) == (name == "$eq")
    if name in ("$in", "$nin"):
        return (found is not MISSING and any(equal(found, item) for item in operand)) == (name == "$in")
    return found is not MISSING and holds(found, name, operand)


def matches(metadata, where):
    """What a filter means, in plain Python."""
    joins = {
        "$and": lambda filters: all(matches(metadata, item) for item in filters),
        "$or": lambda filters: any(matches(metadata, item) for item in filters),
        "$not": lambda item: not matches(metadata, item),
    }
    for key, value in where.items():
        if key in joins:
            accepted = joins[key](value)
        else:
            operators = value if isinstance(value, dict) else {"$eq": value}
            accepted = all(accepts(look_up(metadata, key), *item) for item in operators.items())
        if not accepted:
            return False
    return True
