"""Forward passes of the encoder: prompts in, compressed vectors out, on one device or on several.

A pass takes as many prompts of like length as make up its tokens. Where attention is FlashAttention 2 they are packed
end to end, without padding; elsewhere they are padded on the right, which causal attention needs no mask for.
"""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .last_layer import last_layer_at
from .prompt import length_groups, pad_right

Row = Sequence[int]
"""Token ids of a prompt."""
Job = Sequence[Row]
"""The prompts of a text: one, or two that begin alike."""

logger = logging.getLogger(__name__)

# Tokens of a pass: a CPU's caches like it small, a GPU's units like it large.
TOKENS = {"cpu": 4096}
TOKENS_ELSEWHERE = 32_768
FLASH = "flash_attention_2"
# A little less than the most that glibc lets its thresholds grow to.
KEPT_BYTES = (32 << 20) - (64 << 10)


def compressed_states(model: PreTrainedModel, ids: Tensor, lengths: Tensor, k: int) -> Tensor:
    """e_c of right-padded prompts: the last hidden states at their final k tokens, [n, k, hidden].

    The forward pass of the encoder, for training and inference.
    """
    columns = lengths[:, None] - k + torch.arange(k, device=ids.device)
    with last_layer_at(columns, ids.shape[1]):
        hidden: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device)[:, None], columns]


def packed_states(model: PreTrainedModel, rows: Sequence[Row], k: int) -> Tensor:
    """The same of prompts laid end to end, [n, k, hidden]; positions that begin anew keep them apart."""
    device = model.device
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None].to(device)
    ids = torch.tensor([token for row in rows for token in row])[None].to(device)
    columns = (lengths.cumsum(0)[:, None] - k + torch.arange(k)).reshape(1, -1).to(device)
    with last_layer_at(columns, ids.shape[1]):
        hidden: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden[0, columns[0]].view(len(rows), k, -1)


def forked_states(model: PreTrainedModel, trunk: Sequence[Row], branch: Sequence[Row], k: int) -> Tensor:
    """e_c of pairs of prompts that begin alike, [n, 2 * k, hidden]: what is common to both is computed once.

    The second prompt's own end is laid behind the first prompt, at the positions it has in its own, and cannot see the
    first one's.
    """
    device, forks = model.device, [_common(*pair) for pair in zip(trunk, branch, strict=True)]
    ids, lengths = pad_right(
        [[*one, *other[fork:]] for one, other, fork in zip(trunk, branch, forks, strict=True)]
    )
    first, fork = torch.tensor([[len(row)] for row in trunk]), torch.tensor(forks)[:, None]
    place = torch.arange(ids.shape[1])[None]
    positions = torch.where(place < first, place, place - first + fork)
    own = (place >= fork) & (place < first)  # of the first prompt alone
    hidden_from = (place >= first)[:, :, None] & own[:, None, :]
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & ~hidden_from
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    ends = torch.cat([first - k + torch.arange(k), lengths[:, None] - k + torch.arange(k)], dim=1).to(device)
    with last_layer_at(ends, ids.shape[1]):
        hidden: Tensor = model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask[:, None].to(device),
            use_cache=False,
        ).last_hidden_state
    return hidden[torch.arange(len(ids), device=device)[:, None], ends]


def _common(one: Row, other: Row) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, CPUs and MPS have words."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and bool(
            re.search(r"not enough memory|can't allocate memory|out of memory", str(error), re.IGNORECASE)
        )
    )


def keep_freed_memory() -> None:
    """Have glibc reuse the memory that passes free instead of returning it to the system with each.

    It does so for blocks as large as the largest that was ever freed. Of what is freed here no byte was touched.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


class Passes:
    """Runs prompts through one body or, with copies of it on several devices, through all of them at once."""

    def __init__(self, body: PreTrainedModel, k: int, devices: Sequence[torch.device]) -> None:
        """`devices` begin with the body's own; for a device that is named again, the same weights serve twice."""
        copies = {device: deepcopy(body).to(device) for device in {*devices} - {devices[0]}}  # type: ignore[arg-type]
        self._bodies = [copies.get(device, body) for device in devices]
        if body.device.type == "cpu":
            keep_freed_memory()
        self._k = k
        self._most = TOKENS.get(self._bodies[0].device.type, TOKENS_ELSEWHERE)
        self._fits = math.inf  # tokens of a pass, padding included, that memory is known to hold

    @property
    def num_devices(self) -> int:
        """How many bodies share the work."""
        return len(self._bodies)

    def run(self, jobs: Sequence[Job], size: int | None) -> Iterator[tuple[list[int], Tensor]]:
        """(places in `jobs`, their e_c [n, prompts * k, hidden]), in any order; `size` jobs at a time, or as suits the
        device."""
        groups = self._groups(jobs, size)
        if len(self._bodies) == 1:
            for group in groups:
                yield group, self._pass(self._bodies[0], [jobs[i] for i in group])
        else:
            yield from self._spread(jobs, groups)

    def _groups(self, jobs: Sequence[Job], size: int | None) -> list[list[int]]:
        lengths = [len(job[0]) for job in jobs]
        if size is None:
            return length_groups(lengths, most=self._most)
        order = sorted(range(len(jobs)), key=lambda i: -lengths[i])
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _spread(self, jobs: Sequence[Job], groups: Iterable[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Each group on the next device that is free. A device that fails is left out from then on, and its group goes
        to another; the last one's error is raised."""
        idle, todo = list(self._bodies), deque(groups)
        ready: list[tuple[list[int], Tensor]] = []
        running: dict[Future[Tensor], tuple[PreTrainedModel, list[int]]] = {}
        threads = ThreadPoolExecutor(len(idle), thread_name_prefix="encode")
        try:
            while todo or running or ready:
                while todo and idle:
                    body, group = idle.pop(), todo.popleft()
                    running[threads.submit(self._pass, body, [jobs[i] for i in group])] = body, group
                yield from ready
                ready = []
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    body, group = running.pop(done)
                    try:
                        ready.append((group, done.result()))
                        idle.append(body)
                    except RuntimeError as error:
                        self._leave_out(body, error)
                        todo.appendleft(group)
        finally:
            threads.shutdown(cancel_futures=True)

    def _leave_out(self, body: PreTrainedModel, error: RuntimeError) -> None:
        if len(self._bodies) == 1:
            raise error
        self._bodies.remove(body)
        logger.warning("%s is left out from here on, it failed: %s", body.device, error)

    def _pass(self, body: PreTrainedModel, jobs: list[Job]) -> Tensor:
        """e_c of a few jobs; those that do not fit into memory together go in halves, from then on.

        MemoryError: one alone does not fit.
        """
        tokens = len(jobs) * max(len(job[0]) for job in jobs)
        if len(jobs) > 1 and tokens > self._fits:
            return self._halves(body, jobs)
        try:
            return self._forward(body, list(zip(*jobs, strict=True)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside the handler: its traceback holds on to what filled the memory.
        if body.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(jobs) == 1:
            raise MemoryError(
                f"one text of {tokens} tokens does not fit into memory ({reason}): lower max_length, choose a narrower "
                "dtype or another device"
            )
        if self._fits == math.inf:
            logger.warning(
                "%d texts at once do not fit into memory (%s): going on with half of them", len(jobs), reason
            )
        self._fits = min(self._fits, tokens // 2)
        return self._halves(body, jobs)

    def _halves(self, body: PreTrainedModel, jobs: list[Job]) -> Tensor:
        middle = len(jobs) // 2
        return torch.cat([self._pass(body, jobs[:middle]), self._pass(body, jobs[middle:])])

    @torch.inference_mode()
    def _forward(self, body: PreTrainedModel, prompts: list[tuple[Row, ...]]) -> Tensor:
        """`prompts` are the first of each text and, where there are two, the second of each."""
        if len(prompts) == 2 and can_fork(body, prompts[0]):
            return forked_states(body, prompts[0], prompts[1], self._k)
        return torch.cat([self._states(body, rows) for rows in prompts], dim=1)

    def _states(self, body: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
        if body.config._attn_implementation == FLASH:
            return packed_states(body, rows, self._k)
        ids, lengths = (tensor.to(body.device) for tensor in pad_right(rows))
        return compressed_states(body, ids, lengths, self._k)


def can_fork(body: PreTrainedModel, rows: Sequence[Row]) -> bool:
    """Only where the attention takes any mask, positions are free, and no window narrower than a prompt slides."""
    window = getattr(body.config, "sliding_window", None) or math.inf
    return (
        body.config._attn_implementation in ("sdpa", "eager")
        and hasattr(body, "rotary_emb")
        and max(map(len, rows)) < window
    )
