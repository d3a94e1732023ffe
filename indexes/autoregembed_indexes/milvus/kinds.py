"""How a server searches vectors, in the words of a DocumentIndex' `factory`."""

import re
from dataclasses import dataclass, field
from typing import Any

from autoregembed_indexes.kinds import LEAST_PROBES

DEFAULT_LISTS = 1024
MOST_LISTS = 65_536
MOST_LINKS = 64
LARGEST_EF = 32_768

_FACTORY = re.compile(r"auto|Flat|SQfp16|IVF(\d*),(Flat|SQ8)|HNSW(\d+)", re.IGNORECASE)
_EXAMPLES = "'auto', 'Flat', 'SQfp16', 'IVF1024,Flat', 'IVF1024,SQ8', 'HNSW32'"


@dataclass(frozen=True)
class MilvusKind:
    """One of Milvus' index types and what it is built with."""

    index_type: str
    build_parameters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, factory: str) -> "MilvusKind":
        """The index for a factory. Raises ValueError, naming those that there are, for another."""
        if not isinstance(factory, str):
            raise TypeError(f"factory must be a str, got {type(factory).__name__}")
        found = _FACTORY.fullmatch(factory.replace(" ", ""))
        if not found:
            raise ValueError(f"factory {factory!r} is not one that Milvus has; use one of {_EXAMPLES}")
        lists, code, links = found.groups()
        if code:
            wanted = int(lists or DEFAULT_LISTS)
            if not 1 <= wanted <= MOST_LISTS:
                raise ValueError(f"factory {factory!r} asks for {wanted:,} lists; use 1 to {MOST_LISTS:,}")
            return cls("IVF_FLAT" if code.lower() == "flat" else "IVF_SQ8", {"nlist": wanted})
        if links:
            if not 4 <= int(links) <= MOST_LINKS:
                raise ValueError(f"factory {factory!r} asks for {links} links; use 4 to {MOST_LINKS}")
            return cls("HNSW", {"M": int(links), "efConstruction": 200})
        return cls("AUTOINDEX" if found[0].lower() == "auto" else "FLAT")

    @property
    def exact(self) -> bool:
        """Whether a search misses nothing."""
        return self.index_type == "FLAT"

    def search_parameters(self, limit: int, thorough: bool) -> dict[str, Any]:
        """What a search for `limit` vectors visits; `thorough` visits all that it can."""
        chosen = {}
        if "nlist" in self.build_parameters:
            lists = self.build_parameters["nlist"]
            chosen = {"nprobe": lists if thorough else min(lists, max(LEAST_PROBES, lists // 4))}
        elif self.index_type == "HNSW":
            chosen = {"ef": LARGEST_EF if thorough else min(LARGEST_EF, max(128, 2 * limit))}
        return {"metric_type": "COSINE", "params": chosen}
