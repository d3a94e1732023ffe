"""Checkpoints that an interrupted run can trust: one counts only once everything in it is on the disk.

A checkpoint is written below `.saving`, where `complete.json` goes in last: it lists every other file with its size.
Only then does the folder move to `checkpoint-N`, and only then are the older ones removed. So a save that was cut
short, by a kill or a full disk, is told from a whole one, and what a killed run leaves from what is the user's.

A run writes only into a folder that was new or empty when it claimed it: `.unfinished` is there from before the first
file of the run until after its record, `training.json`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..history import RECORD

logger = logging.getLogger(__name__)

MARKER = "complete.json"
STAGING = ".saving"
UNFINISHED = ".unfinished"


class CheckpointError(OSError):
    """A run could not write into its output folder; what was complete there is intact."""


def staging(output: Path) -> Path:
    """Where checkpoints of `output` are until they are complete, and where they go to be removed."""
    return output / STAGING


def publish(folder: Path, output: Path, run: dict[str, Any]) -> None:
    """Make a checkpoint in `staging(output)`, to which nothing more will be written, the only one of `output`.

    Args:
        folder: the checkpoint, `checkpoint-N`.
        output: gets it under that name; older checkpoints go.
        run: what decides the result of the run that made it.
    """
    _seal(folder, run)
    complete = folder.rename(output / folder.name)
    _sync(output)
    remove_all_but(complete, output)


def is_complete(folder: Path) -> bool:
    """Whether `folder` was published and still holds what it held then."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = marker["files"].items()
        return "run" in marker and all((folder / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_checkpoint(output: Path) -> Path | None:
    """The newest complete `checkpoint-N` below `output`; None where there is none."""
    return next((folder for folder in _checkpoints(output) if is_complete(folder)), None)


def run_of(folder: Path) -> dict[str, Any]:
    """The run that published `folder`."""
    run: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))["run"]
    return run


def check_free(output: Path) -> None:
    """ValueError where `output` holds anything but a run of this library: it is not ours to write over."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: give a folder")
    ours = any((output / name).is_file() for name in (UNFINISHED, RECORD)) or newest_checkpoint(output)
    if not ours and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no training run: give a new or empty folder")


def claim(output: Path) -> None:
    """Make `output` the folder of a run that has begun; CheckpointError if nothing can be written there, or another
    run is writing."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Where no file can be made, one that is there can still be touched.
        with sole_writer(output), tempfile.TemporaryFile(dir=output):
            (output / UNFINISHED).touch()
        _sync(output)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"nothing can be written into {output} ({error.strerror}): give another output folder, or make this one "
            "writable"
        ) from error


def check_no_stranger(output: Path) -> None:
    """ValueError for a `checkpoint-N` that is not ours: it would be in the way, and is not ours to remove."""
    for folder in _checkpoints(output):
        if not (folder / MARKER).exists():
            raise ValueError(
                f"{folder} has no {MARKER}, so it is no checkpoint of this library: give another output folder, or "
                "move it away"
            )


def remove_all_but(kept: Path | None, output: Path) -> None:
    """Remove our checkpoints below `output` except `kept`, and what killed saves left there."""
    room = staging(output)
    for folder in _checkpoints(output):
        if folder != kept and (folder / MARKER).exists():
            room.mkdir(exist_ok=True)
            # At no time is there half a checkpoint under its own name.
            folder.rename(room / f"removed-{folder.name}")
    for remains in _remains(output):
        shutil.rmtree(remains)


def end(output: Path) -> None:
    """Remove what a run needs no longer, now that its record is written."""
    remove_all_but(None, output)
    (output / UNFINISHED).unlink(missing_ok=True)


def clean_up(output: Path) -> None:
    """Remove what a run has left that was killed after its end."""
    if (output / UNFINISHED).exists():
        with sole_writer(output):
            end(output)


def sync_files(folder: Path) -> None:
    """Put the files of `folder`, though not of folders in it, on the disk."""
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)
    _sync(folder)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all, and is on the disk when this returns."""
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _sync(beside)
    beside.replace(file)
    _sync(file.parent)


@contextmanager
def saving(output: Path) -> Iterator[None]:
    """CheckpointError for whatever breaks off a save below `output`: it says what is left and what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise CheckpointError(
            f"saving below {output} failed ({str(error).splitlines()[0]}); {what_is_left(output)}: make room or mend "
            "the disk and run the same command again"
        ) from error


def what_is_left(output: Path) -> str:
    """From where a run that stops here goes on."""
    intact = newest_checkpoint(output)
    return f"{intact} is intact" if intact else f"there is no checkpoint in {output} yet"


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """CheckpointError if another run is writing below `output`; the system ends the claim if this process dies."""
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another run is writing below {output}: wait until it ends, or give another output folder"
            ) from None
        except OSError as error:  # some network file systems know no locks
            logger.warning("%s cannot be locked (%s): let no other run write there", output, error)
        yield
    finally:
        os.close(descriptor)


def _seal(folder: Path, run: dict[str, Any]) -> None:
    """Write the marker, once every file has reached the disk."""
    content = sorted(path for path in folder.rglob("*") if path.name != MARKER)
    for path in content:
        _sync(path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in content if path.is_file()}
    write_json(folder / MARKER, {"files": files, "run": run})


def _remains(output: Path) -> list[Path]:
    return [path for path in output.glob(f"{STAGING}*") if path.is_dir()]


def _checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    numbered = [
        path
        for path in output.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir()
    ]
    return sorted(numbered, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _is_failed_write(error: Exception) -> bool:
    # tokenizers raises plain Exceptions, torch.save plain RuntimeErrors.
    return isinstance(error, OSError | SafetensorError) or type(error) in (Exception, RuntimeError)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
