"""The built-in set of images: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn."""

from __future__ import annotations

import io

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from offramp.data.hashing import split_examples
from offramp.data.images import needs_pillow

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
SPLIT_SEED = 0


def load() -> DatasetDict:
    """The splits train, validation and test, cut by input hash; columns image and label."""
    from sklearn.datasets import load_digits  # seconds that nobody else should wait

    needs_pillow()
    digits = load_digits()
    grey = (digits.images * (255 / digits.images.max())).round().astype(np.uint8)
    columns = {
        "image": [{"bytes": _png(pixels), "path": None} for pixels in grey],
        "label": digits.target.tolist(),
    }
    names = ClassLabel(names=[str(name) for name in digits.target_names])
    whole = Dataset.from_dict(columns, Features({"image": Image(), "label": names}))
    return DatasetDict(split_examples(whole, SHARES, SPLIT_SEED))


def _png(pixels: np.ndarray) -> bytes:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
