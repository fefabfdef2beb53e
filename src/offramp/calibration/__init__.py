"""Choosing on an exit table: candidates, operating points and what they claim."""

from offramp.calibration.certificate import Certificate
from offramp.calibration.certifying import certify, choose
from offramp.calibration.everything import everything, per_exit_path
from offramp.calibration.fitting import fit_bins, fit_temperatures
from offramp.calibration.frontier import PolicySpec, frontier, measure
from offramp.calibration.judge import Outcome
from offramp.calibration.monitor import Monitor
from offramp.calibration.point import OperatingPoint, list_points
from offramp.calibration.risks import RISKS
from offramp.calibration.search import Calibration, calibrate
from offramp.calibration.target import Target, parse_share

__all__ = [
    "RISKS",
    "Calibration",
    "Certificate",
    "Monitor",
    "OperatingPoint",
    "Outcome",
    "PolicySpec",
    "Target",
    "calibrate",
    "certify",
    "choose",
    "everything",
    "fit_bins",
    "fit_temperatures",
    "frontier",
    "list_points",
    "measure",
    "parse_share",
    "per_exit_path",
]
