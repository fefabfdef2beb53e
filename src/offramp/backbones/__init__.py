"""Models cut into embedding, layers and rest."""

from offramp.backbones.base import Backbone, Batch, Flow, example_rows, join_rows, take_rows
from offramp.backbones.cifar_resnet import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
)
from offramp.backbones.deberta import DebertaBackbone
from offramp.backbones.encoders import (
    BACKBONES,
    EncoderBackbone,
    Layout,
    check_architecture,
    make_backbone,
    register_layout,
)

__all__ = [
    "BACKBONES",
    "Backbone",
    "Batch",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "DebertaBackbone",
    "EncoderBackbone",
    "Flow",
    "Layout",
    "check_architecture",
    "example_rows",
    "join_rows",
    "make_backbone",
    "register_layout",
    "take_rows",
]
