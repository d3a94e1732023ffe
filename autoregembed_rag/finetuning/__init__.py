"""Fine-tuning on somebody's own corpus: rows and an evaluation made of it, a plan, the stages, a verdict."""

from .report import FinetuneReport
from .run import FinetuneArguments, default_arguments, finetune

__all__ = ["FinetuneArguments", "FinetuneReport", "default_arguments", "finetune"]
