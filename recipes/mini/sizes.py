"""What one run of the recipe costs: the shape of the model and the steps of every stage."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """One row of the recipe. Lengths are in tokens, batches in rows.

    The feed-forward networks of the encoder are narrower than the decoder's (`intermediate_size`): its tokens have
    learned most of what it knows, and every token of a document passes through them.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    encoder_intermediate_size: int
    tokenizer_characters: int
    bag_characters: int
    bag_steps: int
    bag_batch: int
    pretrain_tokens: int
    pretrain_batch: int
    pretrain_length: int
    reading_rows: int
    compress_rows: int
    align_rows: int
    save_steps: int
    reading_length: int = 64
    max_length: int = 512
    num_compressed_tokens: int = 5


SIZES = {
    # Minutes on one core: proves that every stage runs, loads and scores; the model is useless.
    "tiny": Size(
        vocab_size=600,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        encoder_intermediate_size=32,
        tokenizer_characters=200_000,
        bag_characters=2_000_000,
        bag_steps=20,
        bag_batch=64,
        pretrain_tokens=20_000,
        pretrain_batch=4,
        pretrain_length=128,
        reading_rows=400,
        compress_rows=64,
        align_rows=64,
        save_steps=4,
    ),
    # About an hour and a half on two cores with bfloat16 instructions: the size that ships.
    "cpu": Size(
        vocab_size=16_000,
        hidden_size=320,
        num_layers=2,
        num_heads=5,
        intermediate_size=864,
        encoder_intermediate_size=320,
        tokenizer_characters=60_000_000,
        bag_characters=470_000_000,
        bag_steps=900,
        bag_batch=1024,
        pretrain_tokens=3_500_000,
        pretrain_batch=8,
        pretrain_length=512,
        reading_rows=20_000,
        compress_rows=2_000,
        align_rows=2_000,
        save_steps=50,
    ),
}
# What ten minutes of a data-centre GPU have room for, by arithmetic: nobody has run it yet.
SIZES["gpu"] = replace(
    SIZES["cpu"],
    pretrain_tokens=100_000_000,
    pretrain_batch=64,
    reading_rows=200_000,
    compress_rows=100_000,
    align_rows=150_000,
    save_steps=500,
)
# The same in other widths, to see what a model's size buys: `--until start`.
SIZES |= {
    f"cpu-{width}": replace(
        SIZES["cpu"],
        hidden_size=width,
        num_heads=width // 64,
        intermediate_size=27 * width // 10,
        encoder_intermediate_size=width,
    )
    for width in (64, 128)
}
