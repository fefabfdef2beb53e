"""Answers for texts and files, early where that is good enough."""

from offramp.prediction.files import Summary, predict_file
from offramp.prediction.pipeline import TextClassifier, pipeline
from offramp.prediction.predictor import Predictor
from offramp.prediction.stream import predict

__all__ = ["Predictor", "Summary", "TextClassifier", "pipeline", "predict", "predict_file"]
