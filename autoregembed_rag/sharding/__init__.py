"""Corpora beyond one machine's memory or time: encoded in shards, on one machine or on a Ray cluster, and loaded."""

from .loading import from_shards
from .manifest import Manifest, Shard
from .run import encode_shards
from .shards import Batch, read_shards

__all__ = ["Batch", "Manifest", "Shard", "encode_shards", "from_shards", "read_shards"]
