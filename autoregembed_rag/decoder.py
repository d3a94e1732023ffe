"""FrozenDecoder: the base language model that reads compressed vectors, scores texts and writes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import CONFIG_NAME, AutoRegConfig
from .loading import embedding_table, load_model, model_arguments, resolve_folder
from .prompt import TextTokenizer, check_texts, pad_right

logger = logging.getLogger(__name__)

# Target tokens whose logits exist at once: 1024 rows of a 32,000-word vocabulary are 131 MB in float32.
LOGIT_ROWS = 1024
# Positions that targets leave free for compressed vectors in a model with few of them.
COMPRESSED_ROOM = 32


class TargetLogProbs(NamedTuple):
    """log p of every target token, in float32: `values` [m] and the row each belongs to, `rows` [m]."""

    values: Tensor
    rows: Tensor

    def summed(self, n: int) -> Tensor:
        """Summed over each of the n targets' tokens: float32 [n]."""
        return torch.zeros(n, device=self.values.device).index_add(0, self.rows, self.values)


class FrozenDecoder(torch.nn.Module):
    """A causal language model that never trains: eval mode whatever a trainer says, no gradient to its weights.

    It reads `[e_1 .. e_k, embed(d_1) .. embed(d_T)]` and predicts `d_1 .. d_T, <eos>`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_target_tokens: int = 512
    ) -> None:
        """Freeze `model`; targets longer than `max_target_tokens`, or than the model's positions less 32, are cut
        and then have no `<eos>`."""
        super().__init__()
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
        self.model = model.requires_grad_(False)
        self.model.train(False)
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
        trust_remote_code: bool = False,
    ) -> FrozenDecoder:
        """Load the decoder of an AutoRegEmbed checkpoint, or a plain language model by its folder or hub id.

        Raises:
            FileNotFoundError: nothing can be loaded; the message lists what would work.
            ValueError: the checkpoint does not name its decoder.
        """
        folder = decoder_folder(model)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        place, arguments = model_arguments(device, dtype, attn_implementation, trust_remote_code)
        lm = load_model(AutoModelForCausalLM, folder, arguments)
        return cls(lm.to(place), tokenizer, max_target_tokens=max_target_tokens)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> FrozenDecoder:  # noqa: ARG002
        """Stays in eval mode."""
        return super().train(False)

    @property
    def hidden_size(self) -> int:
        """Dimensions of one input embedding, and so of one compressed vector."""
        return embedding_table(self.model).shape[1]

    def target_ids(self, targets: Sequence[str]) -> list[list[int]]:
        """Token ids of each target with `<eos>`, cut to `max_target_tokens` (then without)."""
        rows = self._text.encode(targets, limit=self.max_target_tokens)
        return [[*row, self._eos][: self.max_target_tokens] for row in rows]

    @property
    def _eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def token_log_probs(self, compressed: Tensor, targets: Sequence[Sequence[int]]) -> TargetLogProbs:
        """log p(d_t | d_<t, e) for every token of every target; gradients flow into `compressed`.

        Args:
            compressed: e_c, [n, k, hidden].
            targets: token ids of n targets, none empty.
        """
        k = compressed.shape[1]
        ids, lengths = (tensor.to(compressed.device) for tensor in pad_right(targets))
        table = self.model.get_input_embeddings()
        # The last token of a target is predicted, never read.
        embedded = torch.cat([compressed.to(embedding_table(self.model).dtype), table(ids[:, :-1])], dim=1)
        hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, k - 1 :]
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        values = self._score(hidden[real], ids[real])
        return TargetLogProbs(values, real.nonzero()[:, 0])

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """log p of `ids` [m] from `hidden` [m, hidden], a bounded number of logits at a time."""
        pieces = []
        for states, targets in zip(
            torch.split(hidden, LOGIT_ROWS), torch.split(ids, LOGIT_ROWS), strict=True
        ):
            if torch.is_grad_enabled() and states.requires_grad:
                # Logits are computed again in the backward pass rather than kept.
                pieces.append(checkpoint(self._score_piece, states, targets, use_reentrant=False))
            else:
                pieces.append(self._score_piece(states, targets))
        return torch.cat(pieces)

    def _score_piece(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return -F.cross_entropy(self._logits(hidden).float(), ids, reduction="none")

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return cast(Tensor, head(hidden))

    @torch.inference_mode()
    def log_prob(
        self, compressed: np.ndarray | Tensor, targets: Sequence[str], *, batch_size: int = 32
    ) -> np.ndarray:
        """log p(target | e) (section 3.3), summed over the target's tokens and `<eos>`, in nats.

        Args:
            compressed: e_c of n texts, [n, k, hidden], from `AutoRegEncoder.compress`.
            targets: n texts, each scored under its own e_c.
            batch_size: pairs per forward pass.

        Returns:
            float32 [n], none above 0.
        """
        targets = check_texts(targets, "targets")
        states = self._states(compressed)
        if len(states) != len(targets):
            raise ValueError(
                f"{len(states)} compressed texts and {len(targets)} targets: give as many of each"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        ids = self.target_ids(targets)
        if num_cut := sum(row[-1] != self._eos for row in ids):
            logger.warning(
                "%d of %d targets were cut to %d tokens", num_cut, len(ids), self.max_target_tokens
            )
        out = np.empty(len(ids), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            scores = self.token_log_probs(states[batch], [ids[i] for i in batch]).summed(len(batch))
            out[batch] = scores.cpu().numpy()
        return out

    @torch.inference_mode()
    def generate(
        self,
        compressed: np.ndarray | Tensor,
        *,
        max_new_tokens: int = 64,
        **arguments: Any,  # noqa: ANN401
    ) -> list[str]:
        """What the decoder says when it reads each e_c: greedy unless `arguments` of `generate` say otherwise.

        Args:
            compressed: e_c, [n, k, hidden], from `AutoRegEncoder.compress`.
            max_new_tokens: tokens at most for each text.
            arguments: passed to transformers' `generate`, e.g. `do_sample=True, temperature=0.7`.
        """
        states = self._states(compressed)
        if len(states) == 0:
            return []
        embedded = states.to(embedding_table(self.model).dtype)
        pad = self.tokenizer.pad_token_id
        ids = self.model.generate(  # type: ignore[operator]
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device),
            **{
                "max_new_tokens": max_new_tokens,
                "do_sample": False,
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.eos_token_id if pad is None else pad,
                **arguments,
            },
        )
        return [str(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _states(self, compressed: np.ndarray | Tensor) -> Tensor:
        states = torch.as_tensor(compressed, device=self.model.device)
        if states.ndim != 3 or states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"compressed has shape {list(states.shape)}, but this decoder reads [n, k, {self.hidden_size}]: "
                "use the decoder that the encoder was trained with"
            )
        return states

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Scores are taken from the head alone; a model that changes its logits afterwards would be misread."""
        ids = torch.tensor([[0, 1]], device=self.model.device)
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = self._logits(hidden).float()
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the output embedding (soft-capping or "
                "scaling), which FrozenDecoder does not support: use a Llama, Mistral, Qwen or GPT-2 style model"
            )


def decoder_folder(model: str | Path) -> Path:
    """The folder of the base LM that an AutoRegEmbed checkpoint names; any other model is a language model itself.

    FileNotFoundError lists what would work; ValueError if a checkpoint names no decoder.
    """
    folder = resolve_folder(model)
    file = folder / CONFIG_NAME
    if not file.exists():
        return folder
    decoder = AutoRegConfig.load(file).decoder
    if decoder is None:
        raise ValueError(
            f"{file} does not name its decoder: pass the base language model to FrozenDecoder.from_pretrained, "
            'or write its folder or hub id there under "decoder"'
        )
    return resolve_folder(decoder)
