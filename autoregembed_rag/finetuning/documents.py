"""Documents, and how plain text, Markdown and HTML become one; navigation, scripts and styles are no text of a page."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser

LONGEST_TITLE = 120


@dataclass(frozen=True)
class Section:
    """Text under its headings, from the outermost to its own; () for text before the first."""

    headings: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Document:
    """One document; `title` may be empty. No section is without text. ValueError if the id is not valid Unicode."""

    id: str
    title: str
    sections: tuple[Section, ...]

    def __post_init__(self) -> None:
        check_id(self.id)


def check_id(name: str) -> None:
    """ValueError for an id that is not valid Unicode."""
    if valid_unicode(name) != name:
        raise ValueError(
            f"the id {name!r} holds a lone surrogate, which is not valid Unicode: give another id"
        )


def valid_unicode(name: str) -> str:
    """The name with lone surrogates, which stand for what is not valid Unicode, as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def plain_document(id: str, title: str, text: str) -> Document:  # noqa: A002
    """A document of one section. A title that the text begins with, as a sentence of its own, is not repeated."""
    title, text = _one_line(title), text.strip()
    if title and (rest := _after_title(text, title)):
        text = rest
    return Document(id, title, (Section((), text),) if text else ())


def _after_title(text: str, title: str) -> str:
    """What follows if `title` is the first sentence or line of `text`, whatever its last stop; else ""."""
    words = title.rstrip(" .").casefold().split()
    if not words or not text.casefold().startswith(words[0]):
        return ""
    spaced = r"\s+".join(map(re.escape, words))
    match = re.match(rf"{spaced}(?:\s*[.!?:]+\s+|\s*\n)", text, re.IGNORECASE)
    return text[match.end() :].strip() if match else ""


def text_document(id: str, text: str) -> Document:  # noqa: A002
    """A plain text; its first line is a title if it is short, stands alone and does not end like a sentence."""
    first, _, rest = text.strip().partition("\n")
    underline, _, after = rest.partition("\n")
    if re.fullmatch(r"[=\-~*#]{3,}\s*", underline):
        rest, underline = after, ""
    standing_alone = rest.strip() and not underline.strip()
    if standing_alone and len(first) <= LONGEST_TITLE and re.search(r"\w", first) and first[-1] not in ".,;:":
        return plain_document(id, first, rest)
    return plain_document(id, "", text)


class _Outline:
    """Collects headings and text into sections; the first heading of level 1 is the title."""

    def __init__(self) -> None:
        self.title = ""
        self._path: list[tuple[int, str]] = []
        self._text: list[str] = []
        self._sections: list[Section] = []

    def heading(self, level: int, text: str) -> None:
        text = _one_line(text)
        if not text:
            return
        self._close()
        self._path = [(depth, name) for depth, name in self._path if depth < level]
        if level == 1 and not self.title:
            self.title = text
        else:
            self._path.append((level, text))

    def add(self, text: str) -> None:
        self._text.append(text)

    def _close(self) -> None:
        if text := "".join(self._text).strip():
            self._sections.append(Section(tuple(name for _, name in self._path), text))
        self._text = []

    def document(self, id: str, fallback_title: str) -> Document:  # noqa: A002
        self._close()
        return Document(id, self.title or _one_line(fallback_title), tuple(self._sections))


_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)?(?:---|\.\.\.)\s*(?:\n|\Z)", re.DOTALL)
# What stands between the two rules of front matter: "key: value" first, then more of these, lists, indented values.
_KEY = re.compile(r"[\w\"'$@].*?:(?:\s.*)?")
_YAML = re.compile(rf"{_KEY.pattern}|[ \t].*|-(?:\s.*)?|#.*|[\]}}].*")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*")


def markdown_document(id: str, text: str) -> Document:  # noqa: A002
    """A Markdown document by its headings; front matter gives at most the title, code keeps its lines."""
    front = _front_matter(text)
    named = re.search(r"^title:[ \t]*(.+)$", front[0], re.MULTILINE) if front else None
    text = _without_comments(text[front.end() if front else 0 :])
    outline = _Outline()
    fence = previous = ""  # the open fence's characters; the last line, which an underline makes a heading
    for line in text.split("\n"):
        marker, atx, underline = _FENCE.match(line), _ATX.fullmatch(line), _UNDERLINE.fullmatch(line)
        if marker and (not fence or marker[1].startswith(fence)):
            outline.add(previous)
            fence, previous = "" if fence else marker[1], ""
        elif fence:
            outline.add(f"{line}\n")
        elif atx:
            outline.add(previous)
            outline.heading(len(atx[1]), _plain(_without_closing_marks(atx[2] or "")))
            previous = ""
        elif underline and previous.strip():
            outline.heading(1 if underline[1][0] == "=" else 2, previous)
            previous = ""
        else:
            outline.add(previous)
            previous = f"{_plain(line)}\n"
    outline.add(previous)
    return outline.document(id, named[1].strip().strip("\"'") if named else "")


def _front_matter(text: str) -> re.Match[str] | None:
    """The front matter that a text begins with, unless what its two rules enclose is more text."""
    front = _FRONT_MATTER.match(text)
    lines = [line for line in (front[1] or "").split("\n") if line.strip()] if front else []
    first = next((line for line in lines if line[0] != "#"), "")
    settings = _KEY.fullmatch(first) and all(map(_YAML.fullmatch, lines))
    return front if settings or not lines else None


# Plain string methods where a regular expression would take quadratic time on a hostile text.


def _without_comments(text: str) -> str:
    before, *parts = text.split("<!--")
    kept = [before]
    for part in parts:
        _, closed, after = part.partition("-->")
        kept.append(after if closed else f"<!--{part}")
    return "".join(kept)


def _without_closing_marks(heading: str) -> str:
    """`Heading ##` -> `Heading`, but `C#` as it is."""
    bare = heading.rstrip().rstrip("#")
    return bare.rstrip() if bare != bare.rstrip() else heading.strip()


def _plain(line: str) -> str:
    """A line without Markdown's marks for images, links, emphasis and code."""
    line = re.sub(r"!\[([^\[\]]*)\]\([^()]*\)", r"\1", line)
    line = re.sub(r"\[([^\[\]]+)\](?:\([^()]*\)|\[[^\[\]]*\])", r"\1", line)
    return re.sub(r"\*\*|`+|(?<!\w)__|__(?!\w)", "", line)


_VOID = {"br", "hr", "img", "input", "link", "meta", "area", "base", "col", "embed", "source", "track", "wbr"}
_DROPPED = {
    "script",
    "style",
    "nav",
    "footer",
    "noscript",
    "template",
    "svg",
    "button",
    "select",
    "textarea",
    "iframe",
}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_IMPLIED_END = {"p", "li", "tr", "td", "th", "dt", "dd", "option"}
_NOT_IN_HEADINGS = {*_HEADINGS, "p", "ul", "ol", "table"}
_BLOCKS = _IMPLIED_END | {
    "div",
    "section",
    "article",
    "main",
    "header",
    "aside",
    "blockquote",
    "pre",
    "table",
    "ul",
    "ol",
    "dl",
    "figure",
    "figcaption",
    "br",
    "hr",
    "body",
}


class _Page(HTMLParser):
    """Feeds an outline. An element ends at its end tag or at that of an element around it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.outline = _Outline()
        self.title = ""
        self._open: list[str] = []
        self._depth: Counter[str] = Counter()  # how many of each are open
        self._hidden = 0
        self._inside: list[str] | None = None  # the text of the heading or title that is open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if self._inside is not None and tag in _NOT_IN_HEADINGS:
            while self._inside is not None:  # a heading without an end tag must not swallow the page
                self._close()
        if tag in _IMPLIED_END and self._open and self._open[-1] == tag:
            self._close()
        if tag in _BLOCKS:
            self._add("\n\n")
        if tag in _VOID:
            return
        self._open.append(tag)
        self._depth[tag] += 1
        self._hidden += tag in _DROPPED
        if (tag in _HEADINGS or tag == "title") and not self._hidden:
            self._inside = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._depth[tag]:
            return
        while self._close() != tag:
            pass
        if tag in _BLOCKS:
            self._add("\n\n")

    def _close(self) -> str:
        tag = self._open.pop()
        self._depth[tag] -= 1
        self._hidden -= tag in _DROPPED
        if self._inside is not None and (tag in _HEADINGS or tag == "title"):
            text, self._inside = "".join(self._inside), None
            if tag in _HEADINGS:
                self.outline.heading(_HEADINGS[tag], text)
            else:
                self.title = self.title or text
        return tag

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._add(data if self._depth["pre"] else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        if self._inside is not None:
            self._inside.append(text)
        elif not self._hidden:
            self.outline.add(text)


def html_document(id: str, text: str) -> Document:  # noqa: A002
    """A web page by its headings, the title its first <h1> or else <title>; menus, scripts and styles are dropped."""
    page = _Page()
    page.feed(text)
    page.close()
    document = page.outline.document(id, page.title)
    return Document(id, document.title, tuple(Section(s.headings, _tidy(s.text)) for s in document.sections))


def _tidy(text: str) -> str:
    """Lines without spaces at their ends (code keeps its indent), paragraphs one blank line apart."""
    text = re.sub(r"\n (?! )", "\n", "\n".join(line.rstrip() for line in text.split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())
