"""The documented objects of the running interpreter's standard library: `python -S -m benchmarks.standard_library`.

The rules, all deterministic:

* a public module, class, function, method or property with a docstring of `MIN_CHARACTERS` or more;
* one per object, under its shortest public dotted name (`asyncio.run`, not `asyncio.runners.run`), and one per
  docstring text; methods belong to the class that defines them, or to the public class that inherits them from a
  private one;
* no module that acts when imported (`antigravity`, `this`, `readline`), needs a screen, is one system's only, or left
  the library between Python 3.10 and 3.14.

It imports nothing else: libraries such as transformers put their own functions into standard modules.
"""

import builtins
import functools
import importlib
import inspect
import json
import os.path
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

MIN_CHARACTERS = 60

ACTS_ON_IMPORT = "antigravity this readline rlcompleter ensurepip idlelib turtledemo test lib2to3 pydoc_data"
NEEDS_A_SCREEN = "tkinter turtle curses"
ONE_SYSTEM_ONLY = "posix nt posixpath ntpath genericpath nturl2path msvcrt winreg winsound msilib"
LEFT_THE_LIBRARY = (
    "aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt distutils imghdr imp mailcap nis nntplib "
    "ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"
)
# Codec tables by the hundred, and the inner workings of packages whose public names sit one level up.
UNDOCUMENTED_SUBMODULES = (
    "asyncio encodings concurrent.futures json multiprocessing unittest ctypes sqlite3 re tomllib zoneinfo "
    "xml.sax xml.dom pathlib importlib.metadata importlib.resources string"
)
KEPT_SUBMODULES = "unittest.mock multiprocessing.shared_memory xml.sax.saxutils xml.dom.minidom"

SKIPPED = frozenset(f"{ACTS_ON_IMPORT} {NEEDS_A_SCREEN} {ONE_SYSTEM_ONLY} {LEFT_THE_LIBRARY}".split())
NOT_ENTERED = frozenset(UNDOCUMENTED_SUBMODULES.split())
KEPT = frozenset(KEPT_SUBMODULES.split())
HIDDEN_BASES = frozenset(
    {"socket.SocketType"}
)  # listed as public, but its methods are known as socket.socket's


def collect() -> list[tuple[str, str, str]]:
    """Name, title and docstring of every object, as this process sees its standard library."""
    names: dict[int, tuple[str, object]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, thing in _public_objects():
            known = names.get(id(thing))
            if known is None or _preference(name) < _preference(known[0]):
                names[id(thing)] = (name, thing)
        by_text: dict[str, tuple[str, str, str]] = {}
        for name, thing in sorted(names.values(), key=lambda item: _preference(item[0])):
            text = _own_docstring(thing)
            if len(text) >= MIN_CHARACTERS:
                by_text.setdefault(text, (name, _title(name, thing), text))
    return sorted(by_text.values())


def _preference(name: str) -> tuple[int, int, str]:
    return name.count("."), len(name), name


def _public_objects() -> Iterator[tuple[str, object]]:
    """Every public object with each of its public dotted names; an object comes once per name."""
    classes: list[tuple[str, type]] = []
    for module in _public_modules():
        prefix = "os.path" if module is os.path else module.__name__
        yield prefix, module
        for name in _public_members(module):
            thing = _plain(getattr(module, name, None))
            qualified = name if prefix == "builtins" else f"{prefix}.{name}"
            if qualified in HIDDEN_BASES:
                continue
            if inspect.isclass(thing):
                classes.append((qualified, thing))
                yield qualified, thing
            elif inspect.isroutine(thing):
                yield qualified, thing
    public = {cls for _, cls in classes}
    for qualified, cls in classes:
        yield from _methods(qualified, cls, public)


def _public_modules() -> Iterator[ModuleType]:
    names = sorted(
        name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED
    )
    while names:
        name = names.pop(0)
        try:
            module = importlib.import_module(name)
        except ImportError:  # not built here, or made for another system
            continue
        yield module
        if name not in NOT_ENTERED:
            children = sorted(
                f"{name}.{child.name}" for child in pkgutil.iter_modules(getattr(module, "__path__", []))
            )
            names += [child for child in children if not _is_private(child)]
        else:
            names += sorted(kept for kept in KEPT if kept.startswith(f"{name}."))
    yield os.path


def _is_private(dotted: str) -> bool:
    return any(part.startswith("_") for part in dotted.split("."))


def _public_members(module: ModuleType) -> list[str]:
    """`__all__`, or what the module (or its C accelerator, `_name`) defines itself."""
    listed = getattr(module, "__all__", vars(builtins) if module is builtins else None)
    if listed is not None:
        return sorted(name for name in listed if not name.startswith("_"))
    homes = {module.__name__, f"_{module.__name__}"}
    return sorted(
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(_plain(thing), "__module__", None) in homes
    )


def _plain(thing: object) -> object:
    """The function inside a bound or static method, a property or a cache, so that aliases are one object."""
    if isinstance(thing, property):
        return thing.fget or thing
    if isinstance(thing, functools.cached_property):
        return thing.func
    if isinstance(thing, (staticmethod, classmethod)) or inspect.ismethod(thing):
        thing = thing.__func__
    return getattr(thing, "__wrapped__", thing) if callable(thing) and not inspect.isclass(thing) else thing


def _methods(qualified: str, cls: type, public: set[type]) -> Iterator[tuple[str, object]]:
    """Methods and properties that `cls` defines, or takes over from bases that no public class stands for."""
    elsewhere = {base for other in cls.__mro__[1:] if other in public for base in other.__mro__}
    members: dict[str, object] = {}
    for owner in cls.__mro__:
        if owner not in elsewhere:
            members = {**vars(owner), **members}
    for name, member in sorted(members.items()):
        thing = _plain(member)
        if not name.startswith("_") and (inspect.isroutine(thing) or inspect.isdatadescriptor(thing)):
            yield f"{qualified}.{name}", thing


def _own_docstring(thing: object) -> str:
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _title(name: str, thing: object) -> str:
    """The name, with the signature as callers see it, but for addresses and the interpreter's place, which differ."""
    if not callable(thing):
        return name
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError, AttributeError):
        return name
    signature = re.sub(r"^\((self|cls)\b(, /)?(, )?", "(", signature).replace(sys.executable, "python")
    return name + re.sub(r" at 0x[0-9A-Fa-f]+", "", signature)


if __name__ == "__main__":
    print(json.dumps(collect()))
