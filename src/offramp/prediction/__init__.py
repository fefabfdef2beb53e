"""Answers for texts, images and files, early where that is good enough."""

from offramp.prediction.exporting import Exported, export
from offramp.prediction.files import Summary, predict_file
from offramp.prediction.pipeline import Classifier, pipeline
from offramp.prediction.predictor import Predictor
from offramp.prediction.stream import predict

__all__ = [
    "Classifier",
    "Exported",
    "Predictor",
    "Summary",
    "export",
    "pipeline",
    "predict",
    "predict_file",
]
