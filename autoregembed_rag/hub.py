"""To the Hugging Face hub: a checkpoint, its decoder and its card, as `from_pretrained` finds them there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from .card import CARD_NAME, is_generated, write_card
from .config import DECODER_FOLDER, AutoRegConfig
from .history import read_history
from .loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_hub_id, load_tokenizer
from .weights import is_adapter, link_weights, write_checkpoint

if TYPE_CHECKING:
    from .encoder import AutoRegEncoder

logger = logging.getLogger(__name__)

# The files that transformers writes of a model and its tokenizer: one that an earlier upload left would be taken for a
# part of this one, or lie there unread. Others are somebody's own.
_SAVED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_STALE = [*_SAVED, *(f"{DECODER_FOLDER}/{name}" for name in _SAVED)]


def push(
    encoder: AutoRegEncoder,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    card: str | Mapping[str, Any] | None,
) -> str:
    """What `AutoRegEncoder.push_to_hub` says."""
    if encoder.has_adapter:
        raise ValueError(
            "an encoder with a live adapter cannot be pushed: save_pretrained(folder), load that with from_pretrained, "
            "which merges the adapter, and push the result"
        )
    decoder = decoder_to_push(encoder.config)
    api = HfApi(token=token)
    with _said_clearly(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        theirs = not isinstance(card, str) and _has_own_card(repo, None if create_pr else revision, token)
    with TemporaryDirectory(prefix="autoregembed-") as temporary:
        folder = Path(temporary)
        write_for_hub(encoder, folder, decoder, repo, card)
        if theirs and is_generated(folder / CARD_NAME):
            if card:
                raise ValueError(
                    f"{repo} has a {CARD_NAME} that somebody has written, which license, language and scores would "
                    "replace: write them there, or remove it"
                )
            logger.info("%s keeps its own %s, which is not a generated one", repo, CARD_NAME)
            (folder / CARD_NAME).unlink()
        with _said_clearly(repo):
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=_STALE,
            )
    return str(commit.pr_url or commit.commit_url)


def write_for_hub(
    encoder: AutoRegEncoder,
    folder: Path,
    decoder: Path | None,
    repo: str,
    card: str | Mapping[str, Any] | None = None,
) -> None:
    """Write into the empty `folder` what is to be in the repository `repo`, with links to weights that are stored
    already; arguments as `push` has them."""
    source = encoder._source
    config = encoder.config
    if decoder is not None:
        config = replace(config, decoder=str(folder.resolve() / DECODER_FOLDER))
        (folder / DECODER_FOLDER).mkdir()
        link_weights(decoder, folder / DECODER_FOLDER)
        trusted = bool(encoder._load_arguments.get("trust_remote_code"))
        load_tokenizer(decoder, trust_remote_code=trusted).save_pretrained(folder / DECODER_FOLDER)
    stored = None if source is None or is_adapter(source) else source
    write_checkpoint(folder, stored or encoder.model, encoder.tokenizer, config)
    own = None if source is None else source / CARD_NAME
    if isinstance(card, str):
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    elif own is not None and own.is_file() and not is_generated(own):
        if card:
            raise ValueError(
                f"{own} is your own, so license, language and scores have no place: write them there, or remove it"
            )
        shutil.copyfile(own, folder / CARD_NAME)
    else:
        write_card(encoder, folder, read_history(source), repo, **(card or {}))


def decoder_to_push(config: AutoRegConfig) -> Path | None:
    """The folder of a decoder that has to go along; None where a name on the hub is enough, or none is known.

    ValueError: it is a folder that is gone.
    """
    if config.decoder is None or is_hub_id(config.decoder):
        return None
    folder = Path(config.decoder)
    if not folder.is_dir():
        raise ValueError(
            f"the decoder {config.decoder!r} is neither a folder nor a hub id: put it back, or write its hub id (or "
            'null, to push without it) under "decoder" in autoregembed.json and load the encoder again'
        )
    return folder


def _has_own_card(repo: str, revision: str | None, token: str | bool | None) -> bool:
    """Is there a README.md in the repository that somebody has written, or changed?"""
    with TemporaryDirectory(prefix="autoregembed-") as folder:
        try:
            card = hf_hub_download(repo, CARD_NAME, revision=revision, token=token, local_dir=folder)
        except LocalEntryNotFoundError:  # the hub did not answer
            raise
        except EntryNotFoundError:
            return False
        return not is_generated(Path(card))


@contextmanager
def _said_clearly(repo: str) -> Iterator[None]:
    """What the hub's client raises, as an error that names the remedy."""
    # The HTTPError of httpx, a package whose name differs from release to release of the client.
    network: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f'{repo!r} is no name of a repository: write "user/name" ({error})') from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            "the hub cannot be reached, because HF_HUB_OFFLINE is set: take that away"
        ) from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(_LOG_IN) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo) from error
    except (network, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"the hub cannot be reached ({type(error).__name__}: {error}): look after the network, HF_ENDPOINT and "
            "proxies, and push again"
        ) from error
    except RuntimeError as error:  # a file that failed to upload
        raise OSError(f"the upload to {repo} failed ({error.__cause__ or error}): push again") from error


_LOG_IN = (
    "the hub does not know who you are: run `hf auth login`, set HF_TOKEN or give token=, in each case with a token "
    "that may write"
)


def _refusal(error: HfHubHTTPError, repo: str) -> OSError:
    status = error.response.status_code
    if status == 401:
        return PermissionError(_LOG_IN)
    if status == 403:
        return PermissionError(
            f"you may not write to {repo}: push to a repository of your own, or give a token with the right to write "
            "there (or create_pr=True)"
        )
    return OSError(f"the hub refuses {repo} ({status}: {error.server_message or str(error).splitlines()[0]})")
