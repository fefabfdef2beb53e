"""Tiny random pictures and what reads them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from offramp.backbones import Batch, CifarResNetConfig

IMAGE_ARCHITECTURES = ("vit", "deit", "cifar_resnet")
_CLASSES = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}
SIDE = 8
"""Height and width of a picture, in pixels."""


def tiny_pictures(count: int, seed: int = 0) -> list[Any]:
    """Random PIL images, RGB; the same seed gives the same ones."""
    import PIL.Image

    draw = random.Random(seed)
    size = (SIDE, SIDE)
    return [PIL.Image.frombytes("RGB", size, draw.randbytes(3 * SIDE**2)) for _ in range(count)]


def tiny_image_processor() -> ViTImageProcessorPil:
    """Scales pixels to [-1, 1]."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def tiny_pixels(rows: int, seed: int = 0) -> Batch:
    """What the processor gives of random pictures."""
    draw = torch.Generator().manual_seed(seed)
    pixels: Tensor = 2 * torch.rand((rows, 3, SIDE, SIDE), generator=draw) - 1
    return {"pixel_values": pixels}


def tiny_image_config(arch: str, layers: int, common: dict[str, Any]) -> PreTrainedConfig:
    """Of width 32 and patches of 2 x 2 pixels, or of three widths."""
    if arch == "cifar_resnet":
        blocks = [layers // 3 + (stage < layers % 3) for stage in range(3)]
        return CifarResNetConfig(blocks, (8, 16, 32), SIDE, **common)
    return AutoConfig.for_model(
        arch,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=layers,
        image_size=SIDE,
        patch_size=2,
        architectures=[_CLASSES[arch]],
        **common,
    )
