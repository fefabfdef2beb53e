"""The CIFAR-10 residual networks of 20 to 110 layers (He et al. 2015, section 4.2).

transformers has no such network: its ResNets are those for ImageNet, and none has the
shortcut without weights ("option A"). A layer of ours is one block of two convolutions; the
width doubles and the map halves twice on the way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from offramp.backbones.base import Batch, Flow, join_rows, take_rows
from offramp.backbones.encoders import BACKBONES
from offramp.errors import ModelError
from offramp.exits import Pooling

MODEL_TYPE = "cifar_resnet"


class CifarResNetConfig(PreTrainedConfig):
    """Config of a `CifarResNetForImageClassification`.

    Args:
        blocks: per stage; (3, 3, 3) is ResNet-20, (9, 9, 9) is ResNet-56.
        widths: of the stages.
        image_size: in pixels, height and width.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        image_size: int = 32,
        num_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.blocks = list(blocks)
        self.widths = list(widths)
        self.image_size = image_size
        self.num_channels = num_channels
        super().__init__(**kwargs)


class Block(nn.Module):
    """Two convolutions and a shortcut without weights, (rows, before, y, x) -> (rows, after, ...).

    Where the width grows, the shortcut takes every second pixel and pads with zeros.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.added = after - before
        stride = 2 if self.added else 1
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, hidden: Tensor) -> Tensor:
        found = F.relu(self.bn1(self.conv1(hidden)))
        found = self.bn2(self.conv2(found))
        return F.relu(found + self._shortcut(hidden))

    def _shortcut(self, hidden: Tensor) -> Tensor:
        if not self.added:
            return hidden
        left = self.added // 2
        return F.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, left, self.added - left))


class CifarResNet(nn.Module):
    """The stem and the blocks."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__()
        first = config.widths[0]
        self.conv1 = nn.Conv2d(config.num_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        widths = np.repeat(config.widths, config.blocks).tolist()
        self.blocks = nn.ModuleList(
            Block(before, after) for before, after in zip([first, *widths], widths, strict=False)
        )

    def stem(self, pixel_values: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(pixel_values.to(self.conv1.weight.dtype))))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """The map after the stem and after each block."""
        states = [self.stem(pixel_values)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states


class CifarResNetForImageClassification(PreTrainedModel):
    """A CIFAR ResNet whose last map is averaged and classified."""

    config_class = CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.num_labels = len(config.id2label or {})
        self.resnet = CifarResNet(config)
        self.classifier = nn.Linear(config.widths[-1], self.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_released(
        cls, weights: Mapping[str, Tensor], labels: Sequence[str]
    ) -> CifarResNetForImageClassification:
        """The network of a state dict of github.com/akamaster/pytorch_resnet_cifar10.

        Raises:
            ModelError: the weights are not those of such a network, or not for these labels.
        """
        weights = {name.removeprefix("module."): leaf for name, leaf in weights.items()}
        names = (re.match(r"layer(\d)\.\d+\.conv1", name) for name in weights)
        stages = Counter(int(found[1]) for found in names if found)
        blocks = [stages[stage] for stage in sorted(stages)]
        config = CifarResNetConfig(blocks, id2label=dict(enumerate(labels)))
        try:
            model = cls(config)
            model.load_state_dict({_renamed(name, blocks): leaf for name, leaf in weights.items()})
        except (RuntimeError, ValueError) as problem:
            said = str(problem).strip().split("\n")[0]
            raise ModelError(
                f"These are not the weights of a CIFAR ResNet of three stages with {len(labels)} "
                f"labels: {said}"
            ) from problem
        return model.eval()

    def head(self, hidden: Tensor) -> Tensor:
        """Scores from the last map."""
        return self.classifier(hidden.mean(dim=(2, 3)))

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        states = self.resnet(pixel_values)
        logits = self.head(states[-1])
        return ImageClassifierOutput(
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def _renamed(name: str, blocks: Sequence[int]) -> str:
    """`layer2.0.conv1.weight` is `resnet.blocks.3.conv1.weight` after a stage of three."""
    if name.startswith("linear."):
        return name.replace("linear.", "classifier.")
    found = re.match(r"layer(\d)\.(\d+)\.(.*)", name)
    if found is None:
        return f"resnet.{name}"
    before = sum(blocks[: int(found[1]) - 1])
    return f"resnet.blocks.{before + int(found[2])}.{found[3]}"


class Pixels(nn.Module):
    """A map as tokens, (rows, width, y, x) -> (rows, y * x, width)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(2).transpose(1, 2)


class CifarResNetBackbone:
    """A CIFAR ResNet run one block at a time."""

    shared_weights = False
    reads = "image"
    poolings: tuple[Pooling, ...] = ("mean", "pooler", "attention")
    pooler: nn.Linear | None = None
    max_length: int | None = None

    def __init__(self, stock: Any) -> None:
        self._stock = stock
        self.layers: nn.ModuleList = stock.resnet.blocks
        self._widths = [int(block.conv2.out_channels) for block in stock.resnet.blocks]
        self._blocks: list[Any] = list(stock.resnet.blocks)
        self.depth = len(self.layers)
        self.view: nn.Module | None = Pixels()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._stock,)

    def example(self, tokens: int, device: torch.device | str) -> Batch:
        config = self._stock.config
        size = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(size, device=device)}

    def embed(self, batch: Batch) -> Flow:
        return Flow(self._stock.resnet.stem(batch["pixel_values"]), None, {})

    def layer(self, number: int, flow: Flow) -> Flow:
        return flow._replace(hidden=self._blocks[number - 1](flow.hidden))

    def through(self, run: Callable[[nn.Module], Callable[..., Any]]) -> CifarResNetBackbone:
        """See `EncoderBackbone.through`."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._blocks = [run(block) for block in self._blocks]
        return twin

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        return take_rows(flow, rows)

    def join(self, flows: Sequence[Flow]) -> Flow:
        return join_rows(flows)

    def width(self, number: int) -> int:
        return self._widths[number - 1]

    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden.mean(dim=1)

    def answer(self, pooled: Tensor) -> Tensor:
        return self._stock.classifier(pooled)

    def head(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._stock.head(hidden)


AutoConfig.register(MODEL_TYPE, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
BACKBONES.register(MODEL_TYPE, CifarResNetBackbone)
