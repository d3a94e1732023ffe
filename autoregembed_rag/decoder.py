"""FrozenDecoder: the base language model that reads compressed vectors, scores texts and writes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .chunked import by_chunks, by_groups
from .fingerprint import weights_digest
from .loading import (
    decoder_folder,
    embedding_table,
    load_model,
    load_tokenizer,
    model_arguments,
    named_folder,
)
from .losses import wide
from .prompt import TextTokenizer, check_texts, collect_cut, length_groups, pad_right

if TYPE_CHECKING:
    from .encoder import AutoRegEncoder

logger = logging.getLogger(__name__)

# Positions that targets leave free for compressed vectors in a model with few of them.
COMPRESSED_ROOM = 32
# Target tokens whose activations exist at once, padding included: enough to keep a GPU busy.
GROUP_TOKENS = 1024
# What `generate` gives transformers' `generate` itself.
OWN_ARGUMENTS = {"input_ids", "inputs_embeds", "attention_mask", "return_dict_in_generate"}


class FrozenDecoder(torch.nn.Module):
    """A causal language model that never trains: eval mode whatever a trainer says, no gradient to its weights.

    It reads `[e_1 .. e_k, embed(d_1) .. embed(d_T)]` and predicts `d_1 .. d_T, <eos>`. Pickles by the folder it came
    from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_target_tokens: int = 512,
        frozen: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Freeze `model`.

        Args:
            model: a causal language model.
            tokenizer: its tokenizer.
            max_target_tokens: targets longer than this, or than the model's positions less 32, are cut and then
                have no `<eos>`.
            frozen: entered around every pass through `model`, which is frozen inside it alone: for weights that an
                encoder trains an adapter on. None: `model` is frozen here, for good.
        """
        super().__init__()
        self.training = False
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no eos token, which ends every target: set tokenizer.eos_token"
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None:
            max_target_tokens = min(max_target_tokens, longest - COMPRESSED_ROOM)
        if max_target_tokens < 1:
            raise ValueError(
                f"max_target_tokens must be at least 1, not {max_target_tokens} (the model has {longest} positions)"
            )
        self.model = model
        if frozen is None:
            self.model.requires_grad_(False).train(False)
        self.frozen = frozen or nullcontext
        self._fingerprint = ""
        self._digested: list[tuple[int, int]] | None = None
        self._source: tuple[Path, dict[str, Any]] | None = None
        self.tokenizer = tokenizer
        self.max_target_tokens = max_target_tokens
        self._text = TextTokenizer(tokenizer)
        self._check_head()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "mini",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "auto",
        max_target_tokens: int = 512,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
    ) -> FrozenDecoder:
        """Load the decoder of an AutoRegEmbed checkpoint, or a plain language model by its folder or hub id; `revision`
        and `token` are of that hub id, as in `AutoRegEncoder.from_pretrained`.

        Raises:
            FileNotFoundError: nothing can be loaded; the message lists what would work.
            ValueError: the checkpoint does not name its decoder.
        """
        folder = decoder_folder(model, revision, token)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        place, arguments = model_arguments(device, dtype, attn_implementation, trust_remote_code)
        lm = load_model(AutoModelForCausalLM, folder, arguments)
        decoder = cls(lm.to(place), tokenizer, max_target_tokens=max_target_tokens)  # type: ignore[arg-type]
        decoder._source = (
            folder,
            {
                "device": device,
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "max_target_tokens": max_target_tokens,
                "trust_remote_code": trust_remote_code,
            },
        )
        return decoder

    @classmethod
    def for_encoder(
        cls,
        encoder: AutoRegEncoder,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        token: str | bool | None = None,
        trust_remote_code: bool = False,
    ) -> FrozenDecoder:
        """Load the decoder that an encoder's checkpoint names; arguments as `from_pretrained` has them.

        Raises:
            FileNotFoundError: it cannot be loaded.
            ValueError: the checkpoint does not name it; the message says how to.
        """
        folder = named_folder(encoder.config.decoder, encoder, token)
        return cls.from_pretrained(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    def train(self, mode: bool = True) -> FrozenDecoder:  # noqa: ARG002
        """Changes nothing: the decoder is always in eval mode."""
        return self

    @property
    def hidden_size(self) -> int:
        """Dimensions of one input embedding, and so of one compressed vector."""
        return embedding_table(self.model).shape[1]

    @property
    def fingerprint(self) -> str:
        """Names the weights as they are now, in the precision they are in: 16 hexadecimal digits."""
        # Reading all weights takes seconds: torch counts the changes of each.
        weights = self.model.state_dict(keep_vars=True).values()
        changes = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if changes != self._digested:
            self._fingerprint, self._digested = weights_digest(self.model)[:16], changes
        return self._fingerprint

    def target_ids(self, targets: Sequence[str]) -> list[list[int]]:
        """Token ids of each target with `<eos>`, cut to `max_target_tokens` (then without)."""
        rows = self._text.encode(targets, limit=self.max_target_tokens)
        return [[*row, self._eos][: self.max_target_tokens] for row in rows]

    def beginning(self, text: str, num_tokens: int) -> str:
        """What the first `num_tokens` tokens of a text spell."""
        (ids,) = self._text.encode([text], limit=num_tokens)
        return text if len(ids) <= num_tokens else str(self.tokenizer.decode(ids[:num_tokens]))

    def check_target(self, text: str) -> None:
        """ValueError for a text that the tokenizer drops altogether."""
        # No tokenizer drops letters or digits of ASCII, which spares tokenising nearly every text.
        if not re.search(r"[a-zA-Z0-9]", text) and len(self.target_ids([text])[0]) < 2:
            raise ValueError(f"the tokenizer leaves no token of the target {text!r}: remove the row")

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def target_log_probs(self, compressed: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """log p(d | e) of every target, summed over its tokens: [n] in float32 or wider; gradients flow into
        `compressed`.

        Args:
            compressed: e_c, [n, k, hidden].
            targets: token ids of n targets, none empty.
        """

        def log_probs(group: list[int], states: Tensor) -> Tensor:
            values, rows = self._token_log_probs(states, [targets[i] for i in group])
            return values.new_zeros(len(group)).index_add(0, rows, values)

        return by_groups(log_probs, self._groups(targets), compressed)

    def _token_log_probs(self, compressed: Tensor, targets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """log p of every target token [m], and their targets [m]."""
        hidden, ids, rows = self._predicting(compressed, targets)

        def of_tokens(part: slice, of_part: Tensor) -> Tensor:
            return -F.cross_entropy(wide(self._logits(of_part)), ids[part], reduction="none")

        return by_chunks(of_tokens, hidden), rows

    def target_divergences(
        self,
        first: Tensor,
        second: Tensor,
        targets: Sequence[Sequence[int]],
        divergence: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """A divergence between p(. | d_<t, first) and p(. | d_<t, second), its mean over every target's tokens: [n].

        Args:
            first: e_c of n texts, [n, k, hidden]; gradients flow into it and into `second`.
            second: as many others.
            targets: token ids of n targets, none empty.
            divergence: log-probabilities [m, vocabulary] twice -> [m].
        """

        def divergences(group: list[int], one: Tensor, other: Tensor) -> Tensor:
            texts = [targets[i] for i in group]
            hidden, _, rows = self._predicting(torch.cat([one, other]), [*texts, *texts])
            half = len(hidden) // 2

            def of_tokens(_: slice, *of_part: Tensor) -> Tensor:
                log_p, log_q = (F.log_softmax(wide(self._logits(states)), dim=-1) for states in of_part)
                return divergence(log_p, log_q)

            values = by_chunks(of_tokens, hidden[:half], hidden[half:])
            rows = rows[:half]
            return values.new_zeros(len(group)).index_add(0, rows, values) / torch.bincount(rows)

        return by_groups(divergences, self._groups(targets), first, second)

    def _groups(self, targets: Sequence[Sequence[int]]) -> list[list[int]]:
        return length_groups([len(target) for target in targets], most=GROUP_TOKENS)

    def _predicting(
        self, compressed: Tensor, targets: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The states from which each target token is predicted [m, hidden], the tokens [m], their targets [m]."""
        ids, lengths = (tensor.to(compressed.device) for tensor in pad_right(targets))
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return self._forward(compressed, ids)[real], ids[real], real.nonzero()[:, 0]

    def _forward(self, compressed: Tensor, ids: Tensor) -> Tensor:
        """[n, k, hidden] and [n, longest] -> the states that predict each of `ids`, [n, longest, hidden]."""
        k = compressed.shape[1]
        self._check_positions(k, ids.shape[1])
        with self.frozen():
            table = self.model.get_input_embeddings()
            # The last token of a target is predicted, never read.
            read = torch.cat([compressed.to(embedding_table(self.model).dtype), table(ids[:, :-1])], dim=1)
            hidden: Tensor = self.model.base_model(inputs_embeds=read, use_cache=False).last_hidden_state
            return hidden[:, k - 1 :]

    def _check_positions(self, k: int, num_tokens: int) -> None:
        """ValueError where a model that learned an embedding for each position has too few for so many tokens after k
        vectors."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        needed = k + num_tokens - 1  # the last token is predicted, never read
        if longest is not None and needed > longest and not hasattr(self.model.base_model, "rotary_emb"):
            raise ValueError(
                f"{k} compressed vectors and {num_tokens} tokens need {needed} positions, and "
                f"{type(self.model).__name__} has {longest}: lower max_new_tokens or max_target_tokens, or compress "
                "into fewer vectors"
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return cast(Tensor, head(hidden))

    @torch.inference_mode()
    def log_prob(
        self,
        compressed: np.ndarray | Tensor | None,
        targets: Sequence[str],
        *,
        per_token: bool = False,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> np.ndarray:
        """log p(target | e) (section 3.3), summed over the target's tokens and `<eos>`, in nats.

        Args:
            compressed: e_c, from `AutoRegEncoder.compress`: of n texts, [n, k, hidden], each target under its own, or
                of one text, [1, k, hidden], all targets under it. None: log p(target), under no text.
            targets: n texts.
            per_token: the mean over the tokens instead of their sum.
            batch_size: pairs per forward pass.
            show_progress: draw a bar.

        Returns:
            float32 [n], none above 0.
        """
        targets = check_texts(targets, "targets")
        states = self._start() if compressed is None else self._states(compressed)
        if len(states) == 1:
            states = states.expand(len(targets), -1, -1)
        if len(states) != len(targets):
            raise ValueError(
                f"{len(states)} compressed texts and {len(targets)} targets: give as many of each"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        ids = self.target_ids(targets)
        cut = [text for text, row in zip(targets, ids, strict=True) if row[-1] != self._eos]
        if cut and not collect_cut(cut):
            logger.warning(
                "%d of %d targets were cut to %d tokens", len(cut), len(ids), self.max_target_tokens
            )
        out = np.empty(len(ids), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with tqdm(total=len(ids), desc="score", unit="text", disable=not show_progress) as progress:
            for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
                scores = self.target_log_probs(states[batch], [ids[i] for i in batch])
                out[batch] = scores.cpu().numpy()
                progress.update(len(batch))
        return out / np.array([len(row) for row in ids], dtype=np.float32) if per_token else out

    def _start(self) -> Tensor:
        """What the decoder reads before a text that nothing precedes, [1, 1, hidden]: its bos token, or where it has
        none the token that ends the text before."""
        first = self.tokenizer.bos_token_id
        ids = torch.tensor([[self._eos if first is None else first]], device=self.model.device)
        with self.frozen():
            return cast(Tensor, self.model.get_input_embeddings()(ids))

    def generate(
        self,
        compressed: np.ndarray | Tensor,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        **arguments: Any,  # noqa: ANN401
    ) -> list[str]:
        """What the decoder says when it reads each e_c: greedy unless `arguments` of `generate` say otherwise.

        Args:
            compressed: e_c, [n, k, hidden], from `AutoRegEncoder.compress`.
            max_new_tokens: tokens at most for each text.
            batch_size: texts that are written at once.
            arguments: passed to transformers' `generate`, e.g. `do_sample=True, temperature=0.7`.

        Raises:
            ValueError: an argument that is not the caller's; more tokens than the model has positions for.
        """
        if refused := sorted(OWN_ARGUMENTS & arguments.keys()):
            raise ValueError(
                f"leave {', '.join(refused)} out: generate reads `compressed` alone and returns texts; generate_tokens "
                "has the probability of each token"
            )
        written = [
            ids for _, rows in self._write(compressed, batch_size, max_new_tokens, arguments) for ids in rows
        ]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True) if written else []

    @torch.inference_mode()
    def generate_tokens(
        self, compressed: np.ndarray | Tensor, *, max_new_tokens: int = 64, batch_size: int = 32
    ) -> list[list[tuple[str, float]]]:
        """What the decoder says greedily, token by token: the characters that each adds, and the probability in [0, 1]
        that the decoder gave it.

        No two tokens follow each other twice, since small decoders go in circles. Special tokens are left out.
        `max_new_tokens` and `batch_size` as in `generate`.
        """
        spelled = []
        arguments = {"logits_processor": [NoRepeatNGramLogitsProcessor(2)]}
        for states, rows in self._write(compressed, batch_size, max_new_tokens, arguments):
            said = [row[: row.index(self._eos) + 1] if self._eos in row else row for row in rows]
            # `generate` would keep the logits of every step, [n, vocabulary]: one more pass over all steps is cheap.
            values, _ = self._token_log_probs(states, said)
            chances = values.exp().split([len(ids) for ids in said])  # type: ignore[no-untyped-call]
            spelled += [
                self._spelled(ids, chance.tolist()) for ids, chance in zip(said, chances, strict=True)
            ]
        return spelled

    @torch.inference_mode()
    def _write(
        self,
        compressed: np.ndarray | Tensor,
        batch_size: int,
        max_new_tokens: int,
        arguments: Mapping[str, Any],
    ) -> Iterator[tuple[Tensor, list[list[int]]]]:
        """transformers' `generate`: some e_c at a time, and the token ids that it writes after each."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        states = self._states(compressed)
        self._check_positions(states.shape[1], max_new_tokens)
        pad = self.tokenizer.pad_token_id
        settings = {
            "do_sample": False,
            "eos_token_id": self._eos,
            "pad_token_id": self._eos if pad is None else pad,
            "max_new_tokens": max_new_tokens,
            **arguments,
        }
        batches = states.split(batch_size) if len(states) else ()  # type: ignore[no-untyped-call]
        for batch in batches:
            with self.frozen():
                written = self.model.generate(  # type: ignore[operator]
                    inputs_embeds=batch.to(embedding_table(self.model).dtype),
                    attention_mask=torch.ones(batch.shape[:2], dtype=torch.long, device=batch.device),
                    return_dict_in_generate=False,
                    **settings,
                )
            yield batch, written.tolist()

    def _spelled(self, ids: list[int], chances: list[float]) -> list[tuple[str, float]]:
        """What each token adds to the text; several that spell one character add it with the last."""
        special = {*self.tokenizer.all_special_ids}
        kept = [(token, chance) for token, chance in zip(ids, chances, strict=True) if token not in special]
        spelled, before = [], ""
        for end, (_, chance) in enumerate(kept, 1):
            text = str(self.tokenizer.decode([token for token, _ in kept[:end]]))
            if text.endswith("\ufffd") and end < len(kept):
                text = before
            spelled.append((text[len(before) :], chance))
            before = text
        return spelled

    def _states(self, compressed: np.ndarray | Tensor) -> Tensor:
        states = torch.as_tensor(compressed, device=self.model.device)
        if states.ndim != 3 or states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"compressed has shape {list(states.shape)}, but this decoder reads [n, k, {self.hidden_size}]: "
                "use the decoder that the encoder was trained with"
            )
        return states

    def __reduce__(self) -> tuple[Any, ...]:
        if self._source is None:
            raise TypeError(
                "a decoder that FrozenDecoder.from_pretrained has not loaded cannot be pickled: save its model, and "
                "load it from there"
            )
        return _reopen, self._source

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Scores are taken from the head alone; a model that changes its logits afterwards would be misread."""
        ids = torch.tensor([[0, 1]], device=self.model.device)
        with self.frozen():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = self._logits(hidden).float()
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the output embedding (soft-capping or "
                "scaling), which FrozenDecoder does not support: use a Llama, Mistral, Qwen or GPT-2 style model"
            )


def _reopen(source: Path, arguments: dict[str, Any]) -> FrozenDecoder:
    return FrozenDecoder.from_pretrained(source, **arguments)
