"""Both training stages written plainly: what the method's released code computes, pass by pass.

Alignment, per batch: three encoder passes (the query for the positive, the query again for the negative, the positive
under I_self) and three decoder passes (d+ after q, d+ after itself, d- after q). Compression: one of each. Every pass
is padded to the longest of its texts and the decoder's logits are whole, [batch, tokens, vocabulary].

The losses are the paper's, so that they can be compared with the package's; what differs is how they are computed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.stage import recompute_activations

IGNORED = -100  # a label that cross entropy passes over


class PlainPasses:
    """The passes of both stages over an encoder and a decoder, whose tokenisation and weights they share."""

    def __init__(
        self, encoder: AutoRegEncoder, decoder: FrozenDecoder, *, checkpointing: bool = False
    ) -> None:
        """Put the encoder in training mode; `checkpointing`: both models compute their layers again in the backward
        pass, for which the decoder, frozen as it is, has to be in training mode too."""
        self.encoder = encoder
        self.decoder = decoder
        self.body = encoder.trainable()
        self.body.train()
        if checkpointing:
            recompute_activations(self.body)
            recompute_activations(decoder.model)
            decoder.model.train()

    def compression_loss(self, rows: Sequence[CompressionRow]) -> Tensor:
        """L_IC: minus the mean of log p over all target tokens of the batch."""
        prompts = [self.encoder.prompts.build([row.context], row.instruction).ids[0] for row in rows]
        scores, tokens = self.decode(self.encode(prompts), [row.output for row in rows])
        return -scores.sum() / tokens

    def alignment_loss(
        self, rows: Sequence[AlignmentRow], reference: Tensor, *, beta: float, temperature: float
    ) -> Tensor:
        """L_CDA with the first negative of every row; `reference` [rows, 2] scores d+ and d- after q."""
        positives, negatives = [row.pos for row in rows], [row.neg[0] for row in rows]
        query_pos = self.after_query(rows, positives)
        query_neg = self.after_query(rows, negatives)
        selves = self.encoder.prompts.build(positives, self.encoder.config.document_instruction)
        self_pos, _ = self.decode(self.encode(selves.ids), positives)
        s1 = -torch.sigmoid(beta * (query_pos - self_pos).abs())
        s2 = -torch.sigmoid(beta * (query_pos - reference[:, 0]) - beta * (query_neg - reference[:, 1]))
        return F.cross_entropy(
            torch.stack([s1, s2], dim=1) / temperature, torch.zeros_like(s1, dtype=torch.long)
        )

    @torch.no_grad()
    def reference(self, rows: Sequence[AlignmentRow]) -> Tensor:
        """log p of the positive and the first negative after the query, by the model as it is: [rows, 2]."""
        columns = [
            self.after_query(rows, texts) for texts in ([r.pos for r in rows], [r.neg[0] for r in rows])
        ]
        return torch.stack(columns, dim=1)

    def after_query(self, rows: Sequence[AlignmentRow], texts: Sequence[str]) -> Tensor:
        """log p(text | e_q,next) of a text for each row, [rows]."""
        instruction = self.encoder.config.query_instruction
        prompts = self.encoder.prompts.build([row.query for row in rows], instruction)
        scores, _ = self.decode(self.encode(prompts.ids), texts)
        return scores

    def encode(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """One encoder pass: e_c, [n, k, hidden]."""
        ids, mask = padded(prompts, self.body.device)
        hidden = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        k = self.encoder.num_compressed_tokens
        places = mask.sum(dim=1, keepdim=True) - k + torch.arange(k, device=ids.device)
        return hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def decode(self, states: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """One decoder pass: log p(text | e) summed over tokens, float32 [n], and the number of all tokens."""
        lm = self.decoder.model
        ids, mask = padded(self.decoder.target_ids(texts), states.device)
        table = lm.get_input_embeddings()
        embedded = torch.cat([states.to(table.weight.dtype), table(ids)], dim=1)
        ones = mask.new_ones(states.shape[:2])
        logits = lm(
            inputs_embeds=embedded, attention_mask=torch.cat([ones, mask], dim=1), use_cache=False
        ).logits
        predicted = logits[:, states.shape[1] - 1 : -1]
        labels = ids.masked_fill(mask == 0, IGNORED)
        losses = F.cross_entropy(
            predicted.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        # Left in half precision, sums would be wrong by whole nats and the two losses could not be compared.
        return -losses.float().view(labels.shape).sum(dim=1), mask.sum()


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [n, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask
