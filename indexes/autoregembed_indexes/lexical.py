"""Search by words: FTS5 over the documents' texts, ranked by BM25."""

import re

DEFAULT_TOKENIZER = "porter unicode61"
MAX_WORDS = 1_000

# External content: the words point into `documents`, so that texts are stored once.
WORDS_TABLE = (
    "CREATE VIRTUAL TABLE words USING fts5(text, content='documents', content_rowid='row', "
    "tokenize='{tokenizer}')"
)

_WORD = re.compile(r"\w+")


def match_expression(query: str, tokenizer: str) -> str | None:
    """Turn a user's text into a MATCH expression, its words joined by OR; None where it has no words.

    Every word is quoted, so nothing in the text is an operator. Joined by AND, few whole questions would find
    anything. A trigram tokenizer finds any three characters in a row, so there each three are a word. Words
    after the first 1,000 different ones are left out.
    """
    words = dict.fromkeys(_WORD.findall(query.lower()))
    if tokenizer.startswith("trigram"):
        words = dict.fromkeys(
            word[start : start + 3] for word in words for start in range(max(1, len(word) - 2))
        )
    return " OR ".join(f'"{word}"' for word in list(words)[:MAX_WORDS]) or None
