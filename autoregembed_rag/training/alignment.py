"""Stage 2, conditional distribution alignment (section 3.3, equation 2, and the variants of appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..losses import DIVERGENCES, conditional_distribution_alignment_loss, divergence_alignment_loss
from .arguments import AlignmentArguments
from .data import AlignmentRow, alignment_rows
from .negatives import Negatives
from .reference import Pair, ReferenceStore
from .sources import RowSource
from .stage import Stage
from .trainer import Batch, Distinct, compressed_prompts, wait_for_everyone

REFERENCE = "reference"


def train_alignment(
    encoder: AutoRegEncoder,
    decoder: FrozenDecoder,
    rows: RowSource,
    output: str | Path,
    arguments: AlignmentArguments | None = None,
    *,
    merge_adapter: bool = False,
) -> AutoRegEncoder:
    """Minimise L_CDA over `rows` and save the encoder to `output`.

    Reference scores are computed once, by the model as it starts, and kept below `output` until the end: a run that
    was interrupted, even among them, goes on where it was.

    Args:
        encoder: the result of stage 1; trained in place, its trained weights in float32.
        decoder: the base language model, never changed.
        rows: queries with a positive and, where there are any, negatives: anything that `alignment_rows` takes.
        output: folder for the checkpoint, new or empty; loads with `AutoRegEncoder.from_pretrained`.
        arguments: hyperparameters, by default the paper's.
        merge_adapter: as in `train_compression`.

    Returns:
        The trained encoder, loaded from `output`.

    Raises:
        ValueError, FloatingPointError, MemoryError, CheckpointError: as `train_compression` does.
    """
    rows = alignment_rows(rows)
    arguments = arguments or AlignmentArguments()
    stage = Stage("alignment", encoder, decoder, rows, output, arguments, merge_adapter=merge_adapter)
    if stage.finished:
        trained = stage.result()
    else:
        negatives = Negatives(rows, arguments)

        def examine(row: AlignmentRow) -> None:
            negatives.check(row)
            for text in (row.pos, *row.neg):
                decoder.check_target(text)

        rows.check(examine)
        objective = Divergences if arguments.similarity in DIVERGENCES else LogProbabilities
        chosen = objective(stage, decoder, negatives, arguments)
        trained = stage.run(chosen.collate, chosen.step_loss)
    if stage.trainer_arguments.process_index == 0:
        _remove_reference(stage.output / REFERENCE)
    return trained


def _remove_reference(folder: Path) -> None:
    """Remove what `ReferenceStore` wrote into `folder`, and the folder if nothing else is there."""
    for file in folder.glob("scores-*.sqlite*"):
        file.unlink()
    with suppress(OSError):
        folder.rmdir()


class Objective:
    """What every similarity needs: how a batch is made, and its loss."""

    def __init__(
        self, stage: Stage, decoder: FrozenDecoder, negatives: Negatives, arguments: AlignmentArguments
    ) -> None:
        self.stage = stage
        self.encoder = stage.encoder
        self.decoder = decoder
        self.negatives = negatives
        self.arguments = arguments


class LogProbabilities(Objective):
    """Equation 2 and its log-sigmoid variant: differences of log-probabilities, to each other and to the reference."""

    def __init__(
        self, stage: Stage, decoder: FrozenDecoder, negatives: Negatives, arguments: AlignmentArguments
    ) -> None:
        super().__init__(stage, decoder, negatives, arguments)
        self.reference = self._reference_scores(stage)

    def collate(self, batch: list[tuple[int, AlignmentRow]]) -> Batch:
        """Distinct prompts, the distinct (prompt, text) pairs to score, and where each score belongs."""
        own, drawn = self.negatives.own(batch), self.negatives.in_batch(batch)
        prompts: Distinct[tuple[str, str]] = Distinct()
        pairs: Distinct[tuple[int, str]] = Distinct()
        query_pos, self_pos, query_neg, known = [], [], [], []
        for (_, row), explicit, others in zip(batch, own, drawn, strict=True):
            query = prompts.add((row.query, self.encoder.config.query_instruction))
            document = prompts.add((row.pos, self.encoder.config.document_instruction))
            query_pos.append(pairs.add((query, row.pos)))
            self_pos.append(pairs.add((document, row.pos)))
            query_neg.append([pairs.add((query, text)) for text in (*explicit, *others)])
            known += [Pair(row.query, text) for text in (row.pos, *explicit)]
        others = [text for texts in drawn for text in texts]
        k = self.encoder.num_compressed_tokens
        return {
            "numbers": [number for number, _ in batch],
            "prompts": self.stage.prompts(list(prompts)),
            "pairs": [prompt for prompt, _ in pairs],
            "targets": self.decoder.target_ids([text for _, text in pairs]),
            "query_pos": torch.tensor(query_pos),
            "self_pos": torch.tensor(self_pos),
            "query_neg": torch.tensor(query_neg),
            "reference": self.reference.scores(known).view(len(batch), -1),
            "drawn": self.decoder.target_ids(others),
            "states": self.reference.states([row.query for _, row in batch], k) if others else None,
            "labels": torch.ones(1, len(batch), dtype=torch.long),
        }

    def step_loss(self, compressor: nn.Module, batch: Batch) -> Tensor:
        """One encoder pass over the prompts, one decoder pass over the pairs."""
        scores = self._score(compressor(batch["prompts"])[batch["pairs"]], batch["targets"])
        reference = batch["reference"]
        if batch["states"] is not None:
            # Which rows meet in a batch is not known beforehand: their reference is scored here.
            size = len(batch["states"])
            states = batch["states"].repeat_interleave(len(batch["drawn"]) // size, dim=0)
            with torch.no_grad():
                reference = torch.cat([reference, self._score(states, batch["drawn"]).view(size, -1)], dim=1)
        return conditional_distribution_alignment_loss(
            scores[batch["query_pos"]],
            scores[batch["self_pos"]],
            scores[batch["query_neg"]],
            reference[:, 0],
            reference[:, 1:],
            beta=self.arguments.beta,
            temperature=self.arguments.temperature,
            similarity=self.arguments.similarity,  # type: ignore[arg-type]
            reduction="none",
        )

    def _score(self, states: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        scores = self.decoder.target_log_probs(states, targets)
        if not self.arguments.length_normalized:
            return scores
        return scores / torch.tensor([len(target) for target in targets], device=scores.device)

    @torch.inference_mode()
    def _reference_scores(self, stage: Stage) -> ReferenceStore:
        """log p_ref of every positive and every negative of a row's own under e_q,next, what is not on disk yet
        shared among the processes."""
        stage.claim()
        arguments = stage.trainer_arguments
        key = [
            stage.identity[name] for name in ("encoder", "encoder_dtype", "decoder", "decoder_dtype", "bf16")
        ] + [self.arguments.length_normalized]
        store = ReferenceStore(stage.output / REFERENCE, repr(key), process=arguments.process_index)
        size = self.arguments.batch_size
        starts = range(arguments.process_index * size, len(stage.rows), arguments.world_size * size)
        for start in tqdm(starts, desc="reference scores", unit="batch", disable=arguments.process_index > 0):
            batch = [(i, stage.rows[i]) for i in range(start, min(start + size, len(stage.rows)))]
            with stage.autocast():
                self._add_reference(store, batch)
        wait_for_everyone()
        return store

    def _add_reference(self, store: ReferenceStore, batch: list[tuple[int, AlignmentRow]]) -> None:
        texts = self.negatives.own(batch)
        pairs = store.missing(
            Pair(row.query, text)
            for (_, row), own in zip(batch, texts, strict=True)
            for text in (row.pos, *own)
        )
        wanted = [row.query for _, row in batch] if self.arguments.in_batch_negatives else []
        stateless = store.without_state(wanted)
        queries = {
            query: i for i, query in enumerate(dict.fromkeys([pair.query for pair in pairs] + stateless))
        }
        if not queries:
            return
        prompts = self.encoder.prompts.build(list(queries), self.encoder.config.query_instruction)
        states = compressed_prompts(self.encoder.model, prompts.ids, self.encoder.num_compressed_tokens)
        if stateless:
            store.add_states(stateless, states[[queries[query] for query in stateless]])
        # Last, so that what a kill leaves without scores shares its passes with the same queries again.
        if pairs:
            targets = self.decoder.target_ids([pair.target for pair in pairs])
            store.add(pairs, self._score(states[[queries[pair.query] for pair in pairs]], targets))


class Divergences(Objective):
    """The KL and JS variants: whole next-token distributions under e_q,next and e_d,self, no reference."""

    def collate(self, batch: list[tuple[int, AlignmentRow]]) -> Batch:
        """Distinct prompts, and the distinct (query prompt, document prompt, document) to compare."""
        prompts: Distinct[tuple[str, str]] = Distinct()
        compared: Distinct[tuple[int, int, str]] = Distinct()
        positive, negative = [], []
        texts = zip(batch, self.negatives.own(batch), self.negatives.in_batch(batch), strict=True)
        for (_, row), own, others in texts:
            query = prompts.add((row.query, self.encoder.config.query_instruction))
            found = []
            for text in (row.pos, *own, *others):
                document = prompts.add((text, self.encoder.config.document_instruction))
                found.append(compared.add((query, document, text)))
            positive.append(found[0])
            negative.append(found[1:])
        return {
            "numbers": [number for number, _ in batch],
            "prompts": self.stage.prompts(list(prompts)),
            "queries": [query for query, _, _ in compared],
            "documents": [document for _, document, _ in compared],
            "targets": self.decoder.target_ids([text for _, _, text in compared]),
            "positive": torch.tensor(positive),
            "negative": torch.tensor(negative),
            "labels": torch.ones(1, len(batch), dtype=torch.long),
        }

    def step_loss(self, compressor: nn.Module, batch: Batch) -> Tensor:
        """One encoder pass over the prompts, one decoder pass over every document under both its vectors."""
        states = compressor(batch["prompts"])
        divergences = self.decoder.target_divergences(
            states[batch["documents"]],
            states[batch["queries"]],
            batch["targets"],
            DIVERGENCES[self.arguments.similarity],
        )
        return divergence_alignment_loss(
            divergences[batch["positive"]],
            divergences[batch["negative"]],
            temperature=self.arguments.temperature,
            reduction="none",
        )
