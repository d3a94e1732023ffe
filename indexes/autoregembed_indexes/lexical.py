"""Search by words: FTS5 over the documents' texts, ranked by BM25."""

import re
from itertools import pairwise

from autoregembed_indexes.records import is_valid_text

DEFAULT_TOKENIZER = "porter unicode61"
MAX_WORDS = 1_000

# External content: the words point into `documents`, so that texts are stored once.
WORDS_TABLE = (
    "CREATE VIRTUAL TABLE words USING fts5(text, content='documents', content_rowid='row', "
    "tokenize='{tokenizer}')"
)
# Words of so many bytes are gathered before they are written; with FTS5's own 1 MiB, much of a large add is merging.
WORDS_MEMORY = "INSERT INTO words(words, rank) VALUES ('hashsize', 33554432)"

# The combining marks that FTS5 reads as part of the word around them, so that decomposed accents do not split it.
_ACCENTS = r"\u0300-\u0304\u0306-\u030c\u030f\u0311\u031b\u0323-\u0328\u032d\u032e\u0330\u0331"
_ARGUMENT = re.compile(r"'((?:[^']|'')*)'|(\w+)")


def match_expression(query: str, tokenizer: str) -> str | None:
    """Turn a user's text into a MATCH expression, its words joined by OR; None where it has no words.

    Every word is quoted, so nothing in the text is an operator. Joined by AND, few whole questions would find
    anything. A trigram tokenizer finds any three characters in a row, so there each three of a word are one, and
    shorter words find nothing. Words after the first 1,000 different ones are left out.
    """
    arguments = _arguments(tokenizer)
    words = _words(query, arguments)
    if "trigram" in map(str.lower, arguments):
        words = [word[start : start + 3] for word in words for start in range(len(word) - 2)]
    # Lower case only tells words apart. FTS5 folds case by itself, and some letters, like İ, it folds otherwise.
    different = list({word.lower(): word for word in words}.values())
    return " OR ".join('"' + word.replace('"', '""') + '"' for word in different[:MAX_WORDS]) or None


def check_tokenizer(tokenizer: str) -> None:
    """Refuse what SQLite would not answer with an error of its own; the rest it tells when the table is made."""
    if not isinstance(tokenizer, str):
        raise TypeError(f"tokenizer must be a str, got {type(tokenizer).__name__}")
    arguments = [argument.lower() for argument in _arguments(tokenizer)]
    # SQLite crashes on an option of trigram that has no value.
    lacking = "trigram" in arguments and len(arguments[arguments.index("trigram") :]) % 2 == 0
    if lacking or "\0" in tokenizer or not is_valid_text(tokenizer):
        raise ValueError(f"tokenizer {tokenizer!r} is not one that FTS5 can have")


def _arguments(tokenizer: str) -> list[str]:
    return [quoted.replace("''", "'") or bare for quoted, bare in _ARGUMENT.findall(tokenizer)]


def _words(query: str, arguments: list[str]) -> list[str]:
    """Split a text where FTS5 would: at all but letters, digits and what the tokenizer's arguments say."""
    options = {"tokenchars": "", "separators": ""}
    for name, characters in pairwise(arguments):
        if name.lower() in options:
            options[name.lower()] += re.escape(characters)
    word = rf"(?:[^\W_{options['separators']}]|[{_ACCENTS}{options['tokenchars']}])+"
    return re.findall(word, query)
