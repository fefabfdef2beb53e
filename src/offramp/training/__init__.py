"""Fine-tuning with exits, and hanging exits on a finished classifier."""

from offramp.training.attachment import attach
from offramp.training.finetune import train
from offramp.training.options import ATTACH, ATTACH_TOKENS, TRAIN, TrainOptions

__all__ = ["ATTACH", "ATTACH_TOKENS", "TRAIN", "TrainOptions", "attach", "train"]
