"""The operating point: a policy, what it was asked for and what it did on recorded rows.

It lies beside the weights as `points/<name>.json`.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from offramp import __version__
from offramp.calibration.certificate import Certificate
from offramp.calibration.conformal import Sets
from offramp.calibration.listing import refresh
from offramp.calibration.probabilities import Temperatures
from offramp.calibration.target import Target
from offramp.errors import OfframpError, OutputError, PointError
from offramp.policies import Policy, make_policy
from offramp.registry import nearest
from offramp.storage import Strict, fingerprint, read_document, write_document
from offramp.table import ProblemType

FOLDER = "points"
_TAMPERED = (
    "what the certificate was made for has changed, or what it says. Run `offramp calibrate` again"
)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
FULL = "full"
"""What full depth is called where a point is asked for."""


def _not_full(name: str) -> str:
    if name == FULL:
        raise ValueError(f"'{FULL}' is what full depth is called; take another name")
    return name


PointName = Annotated[str, StringConstraints(pattern=_NAME), AfterValidator(_not_full)]


class OperatingPoint(Strict):
    """A policy chosen on a table, with the figures it had there.

    Attributes:
        policy: {"name": ..., its options}.
        target: what was asked for; None for a point set by hand.
        role, rows, rows_excluded: the table's role, its rows used, and its broken rows not used.
        metric, score, full_score, drop: None where the table had no labels.
        disagreement: from full depth; see `offramp.metrics.disagreement`.
        cost: share of full-depth FLOPs; cost_reduction is its inverse.
        exit_histogram: rows that left after layer 1, 2, ..., depth.
        class_drops: drop of recall by class name, for classification with labels.
        sets: what makes sets of classes of its answers; None where they were not asked for.
        temperatures: what makes its scores true probabilities; None where that was not asked for.
        certificate: what is promised on rows like those of the table; None for a mere choice.
    """

    schema_version: Literal[1] = 1
    name: PointName
    policy: dict[str, Any]
    target: Target | None
    problem_type: ProblemType
    depth: int = Field(ge=1)
    role: Literal["tune", "calibrate"]
    rows: int = Field(ge=1)
    rows_excluded: int = Field(ge=0)
    metric: str | None
    score: float | None
    full_score: float | None
    drop: float | None
    class_drops: dict[str, float] | None
    disagreement: float = Field(ge=0)
    cost: float = Field(gt=0)
    cost_reduction: float = Field(gt=0)
    exit_histogram: tuple[Annotated[int, Field(ge=0)], ...]
    model_fingerprint: str
    processor_fingerprint: str
    data_fingerprint: str
    engine: str
    dtype: str
    offramp: str = __version__
    sets: Sets | None = None
    temperatures: Temperatures | None = None
    certificate: Certificate | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if len(self.exit_histogram) != self.depth or sum(self.exit_histogram) != self.rows:
            raise ValueError("exit_histogram does not fit depth and rows")
        if self.sets is not None and len(self.sets.limits) != self.depth:
            raise ValueError("sets do not fit depth")
        if self.temperatures is not None and len(self.temperatures.values) != self.depth:
            raise ValueError("temperatures do not fit depth")
        if self._tampered():
            raise ValueError(_TAMPERED)
        try:
            self.build_policy().check(self.problem_type, self.depth)
        except OfframpError as problem:
            raise ValueError(str(problem)) from None
        return self

    def made_with(self, data_fingerprint: str) -> bool:
        """Whether these rows took part in the search or the proof."""
        searched = None if self.certificate is None else self.certificate.searched
        return data_fingerprint in (self.data_fingerprint, searched)

    @property
    def certified(self) -> bool:
        """Whether something is promised, and not of an average over draws alone."""
        if self.certificate is None:
            return False
        return self.certificate.confidence is not None or self.policy["name"] == FULL

    def promise(self) -> str | None:
        """What is promised, in a sentence; None for a mere choice."""
        if self.certificate is None:
            return None
        if self.policy["name"] == FULL:
            return "No early exit is certified: rows run to full depth, and nothing is lost."
        return self.certificate.words()

    def seal(self) -> str:
        """Fingerprint of all that the point says, but for its name."""
        said = self.model_dump(mode="json", exclude={"name", "offramp", "certificate"})
        claim = self.certificate and self.certificate.model_dump(mode="json", exclude={"seal"})
        for name in ("repeated", "searched"):  # older certificates are sealed without
            if claim and not claim[name]:
                del claim[name]
        return fingerprint(json.dumps([said, claim], sort_keys=True))

    def _tampered(self) -> bool:
        return self.certificate is not None and self.certificate.seal != self.seal()

    def promising(self, certificate: Certificate) -> Self:
        """The same point with a certificate."""
        claimed = self.model_copy(update={"certificate": certificate})
        sealed = certificate.model_copy(update={"seal": claimed.seal()})
        return self.model_copy(update={"certificate": sealed})

    def build_policy(self) -> Policy:
        """The policy, ready for an engine or a replay."""
        return make_policy(self.policy)

    def check(self, model_fingerprint: str, processor_fingerprint: str | None = None) -> None:
        """Refuse a point that was chosen for another model or processor, or that is no longer what
        its certificate was made for. Raises PointError."""
        if self._tampered():
            raise PointError(f"Point '{self.name}': {_TAMPERED}.")
        for what, mine, other in (
            ("model", self.model_fingerprint, model_fingerprint),
            ("processor", self.processor_fingerprint, processor_fingerprint),
        ):
            if other is not None and mine != other:
                raise PointError(
                    f"Point '{self.name}' was chosen for {what} {mine}, not for {other}. "
                    "Record a table with this one and run `offramp calibrate` again."
                )

    def check_engine(self, engine: str, dtype: str) -> None:
        """Refuse a point whose figures do not hold where scores are computed otherwise.

        In float32 all engines agree but for the last bits, so a point may move between them; in
        any other format the thresholds do. Raises PointError.
        """
        mine, other = (self.engine, self.dtype), (engine, dtype)
        if mine == other or self.dtype == dtype == "float32":
            return
        # a processor that makes seven bits of eight cannot do otherwise
        able = (self.dtype, dtype) != ("int8", "int7")
        mend = f"Use --backend {self.engine} --dtype {self.dtype}, or record" if able else "Record"
        raise PointError(
            f"Point '{self.name}' was chosen on {self.engine} in {self.dtype}, not on {engine} in "
            f"{dtype}, where rows leave elsewhere. {mend} a table with --backend {engine} --dtype "
            f"{dtype} and run `offramp calibrate` again."
        )

    def save(self, folder: str | Path) -> Path:
        """Write the point beside the weights in a model folder; gives the file's path.

        The folder's model card lists it from then on.
        """
        if not Path(folder).is_dir():
            raise OutputError(f"{folder}: no such model folder. Save the model there first.")
        path = _path(folder, self.name)
        write_document(path, self)
        refresh(Path(folder), usable_points(folder))
        return path

    @classmethod
    def load(cls, folder: str | Path, name: str = "default", certified: bool = False) -> Self:
        """Read a point of a model folder.

        Raises PointError, with `certified` also for a point that promises nothing.
        """
        path = _path(folder, name)
        if not path.is_file():
            known = list_points(folder)
            raise PointError(
                f"{folder} has no operating point '{name}'.{nearest(name, known)} "
                + (f"It has: {', '.join(known)}." if known else "Make one: `offramp calibrate`.")
            )
        point = read_document(cls, path, PointError)
        if point.name != name:
            raise PointError(f"{path}: holds a point named '{point.name}', not '{name}'.")
        if certified and not point.certified:
            is_choice = point.certificate is None
            what = "a choice without a certificate" if is_choice else "right on average alone"
            raise PointError(
                f"{path}: point '{name}' is {what}. Make one that promises with "
                "`offramp calibrate TABLE --confidence 95%`."
            )
        return point


def list_points(folder: str | Path) -> list[str]:
    """Names of the operating points in a model folder."""
    return sorted(path.stem for path in (Path(folder) / FOLDER).glob("*.json"))


def usable_points(folder: str | Path) -> list[OperatingPoint]:
    """The operating points in a model folder, without files that hold none."""
    found = []
    for name in list_points(folder):
        with contextlib.suppress(PointError):
            found.append(OperatingPoint.load(folder, name))
    return found


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a point, which is that of a file. Raises PointError."""
    if name == FULL:
        raise PointError(f"'{FULL}' is what full depth is called; give the point another name.")
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise PointError(
            f"'{name}' cannot be the name of a point. Take letters, digits, '.', '_' and '-', up "
            "to 64 of them, the first a letter or a digit."
        )


def _path(folder: str | Path, name: str) -> Path:
    if name != FULL:
        check_name(name)
    return Path(folder) / FOLDER / f"{name}.json"
