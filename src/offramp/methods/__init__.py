"""Papers as presets: exits, objective and policy under one name."""

from offramp.methods.base import METHODS, Method
from offramp.methods.deebert import DEEBERT
from offramp.methods.pabee import PABEE
from offramp.registry import import_all

__all__ = ["DEEBERT", "METHODS", "PABEE", "Method"]

import_all(__name__, __path__)
