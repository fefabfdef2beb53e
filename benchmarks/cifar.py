"""CIFAR-10 and the released residual networks, as offramp reads them: a Dataset and a folder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from offramp.backbones import CifarResNetForImageClassification
from offramp.storage import whole_folder

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def images(file: Path) -> Dataset:
    """The columns image and label of one of the shared .npz files."""
    packed = np.load(file)
    jpeg, ends = packed["jpeg"], packed["offsets"]
    stored = [
        {"bytes": jpeg[start:end].tobytes(), "path": None} for start, end in pairwise(ends.tolist())
    ]
    kinds = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    return Dataset.from_dict({"image": stored, "label": packed["labels"].tolist()}, kinds)


def network(weights: Path, folder: Path) -> Path:
    """A released network as a folder, with the normalisation it was trained with."""
    if not folder.is_dir():
        model = CifarResNetForImageClassification.from_released(load_file(weights), CLASSES)
        processor = ViTImageProcessorPil(
            size={"height": 32, "width": 32},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
        with whole_folder(folder) as staged:
            model.save_pretrained(staged)
            processor.save_pretrained(staged)
    return folder
