"""The results of tuning or comparing: the held-out error, NFE, path and times of every candidate.

The error of a candidate is the RMSE of each of its samples to the teacher's sample from the same noise (see
`metrics.rmse`). Hopeless candidates are dropped after a few samples; only those scored on all held-out samples are
compared with each other, and `len(candidate.errors)` says on how many a candidate was scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from olss_fast.errors import InputError
from olss_fast.methods import ANALYTIC, is_olss
from olss_fast.plan.plan import Plan
from olss_fast.support.files import read_bounded, write_atomically
from olss_fast.support.folders import PathLike, make_folder

FORMAT = "olss_fast.report"
VERSION = 1
NEAR = 3.0  # times the teacher's own error, below which a student's is no longer all its own
LARGEST_FILE = 2**30  # bytes


@dataclass(frozen=True)
class Candidate:
    """One sampler with its score.

    `kind` is "analytic" or one of `methods.METHODS`; `errors` are per-sample RMSEs on the first `len(errors)` held-out
    samples (inf where the sampler diverged); `path` holds the steps of the grid that a fit was planned at; `accepted`
    marks the best of its NFE.
    """

    name: str
    kind: str
    spacing: str
    plan: Plan
    errors: tuple[float, ...]
    path: tuple[int, ...] | None = None
    accepted: bool = False

    def __post_init__(self) -> None:
        errors = tuple(float(error) for error in self.errors)
        if not errors or any(math.isnan(error) or error < 0.0 for error in errors):
            raise InputError(
                f"candidate {self.name!r} has errors {errors[:8]}: expected at least one RMSE >= 0 (inf if it diverged)"
            )
        object.__setattr__(self, "errors", errors)
        if self.path is not None:
            object.__setattr__(self, "path", tuple(int(step) for step in self.path))

    @property
    def nfe(self) -> int:
        """Network evaluations; a guided pair counts once."""
        return int(self.plan.nfe)

    @property
    def samples(self) -> int:
        """On how many held-out samples it was scored."""
        return len(self.errors)

    @cached_property
    def mean(self) -> float:
        """Mean RMSE over the samples it was scored on."""
        return float(np.mean(self.errors))

    @cached_property
    def median(self) -> float:
        """Median RMSE over the samples it was scored on."""
        return float(np.median(self.errors))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the mean; the mean itself twice if there is a single or a diverged sample."""
        if self.samples < 2 or not math.isfinite(self.mean):
            return self.mean, self.mean
        from olss_fast.metrics import bootstrap_interval

        return bootstrap_interval(np.asarray(self.errors), level=level)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: infinite `errors` become null; mean, median and interval are for people."""
        return {
            "name": self.name,
            "kind": self.kind,
            "spacing": self.spacing,
            "nfe": self.nfe,
            "samples": self.samples,
            "mean": _finite(self.mean),
            "median": _finite(self.median),
            "interval": [_finite(bound) for bound in self.interval()],
            "accepted": self.accepted,
            "path": None if self.path is None else list(self.path),
            "errors": [_finite(error) for error in self.errors],
            "plan": self.plan.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The candidate whose `to_dict` is `data`."""
        return cls(
            name=str(data["name"]),
            kind=str(data["kind"]),
            spacing=str(data["spacing"]),
            plan=Plan(**data["plan"]),
            errors=tuple(math.inf if error is None else float(error) for error in data["errors"]),
            path=None if data["path"] is None else tuple(data["path"]),
            accepted=bool(data["accepted"]),
        )


@dataclass(frozen=True)
class GuidanceRow:
    """Mean errors at one guidance scale, of the plan accepted for `nfe` and of the analytic one that was best."""

    scale: float
    nfe: int
    tuned: float
    analytic: float


@dataclass(frozen=True)
class Report:
    """All candidates of a tuning or a comparison.

    `held_out` is the number of samples of a full score, `settings` what the run was asked to do (JSON values),
    `evaluations` the network evaluations of each stage (record, fit, polish, accept), `seconds` its times; `guidance`
    the errors at guidance scales around the tuned one, where that was measured.
    """

    candidates: tuple[Candidate, ...]
    teacher: Plan
    held_out: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    guidance: tuple[GuidanceRow, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        most = max((candidate.samples for candidate in self.candidates), default=0)
        if most > self.held_out:
            raise InputError(f"a candidate was scored on {most} samples, but held_out is {self.held_out}")

    @property
    def own_error(self) -> float | None:
        """By how much the teacher's samples move when its steps are doubled; None if that was not measured."""
        told = self.teacher.metadata.get("own_error")
        return None if told is None else _error(float(told))

    @property
    def own_run(self) -> tuple[int, float] | None:
        """Steps and mean error of the network's own long run, where the teacher asks another network; else None."""
        told = self.settings.get("own_run")
        return None if told is None else (int(told["steps"]), _error(told["error"]))

    @property
    def near_teacher(self) -> list[int]:
        """Where the best candidate comes so near to the teacher that its own error counts (`NEAR` times it)."""
        error = self.own_error or 0.0
        return [nfe for nfe in self.nfes if (best := self.find(nfe)) and best.mean < NEAR * error]

    @property
    def nfes(self) -> tuple[int, ...]:
        """The numbers of network evaluations that occur, ascending."""
        return tuple(sorted({candidate.nfe for candidate in self.candidates}))

    def at(self, nfe: int, kind: str | None = None, *, partial: bool = False) -> list[Candidate]:
        """Candidates of this NFE (and kind), best mean first; `partial` includes those dropped after a few samples."""
        found = [
            candidate
            for candidate in self.candidates
            if candidate.nfe == nfe
            and kind in (None, candidate.kind)
            and (partial or candidate.samples == self.held_out)
        ]
        return sorted(found, key=lambda candidate: candidate.mean)

    def best(self, nfe: int, kind: str | None = None) -> Candidate:
        """The candidate of least mean error among those scored on all held-out samples. `InputError` if none was."""
        found = self.find(nfe, kind)
        if found is None:
            what = "candidate" if kind is None else f"{kind!r} candidate"
            raise InputError(
                f"no {what} of {nfe} NFE was scored on all {self.held_out} samples; "
                f"the report has {sorted({(each.nfe, each.kind) for each in self.candidates})}"
            )
        return found

    def find(self, nfe: int, kind: str | None = None) -> Candidate | None:
        """Like `best`, but None if there is none."""
        return next(iter(self.at(nfe, kind)), None)

    def olss(self, nfe: int) -> Candidate | None:
        """The best variant of OLSS at this NFE, or None; methods shown beside OLSS do not count."""
        return next((each for each in self.at(nfe) if is_olss(each.kind)), None)

    def matching_nfe(self, error: float, kind: str = ANALYTIC) -> float:
        """At how many evaluations the best of `kind` reaches `error`, log-linear between those that were scored.

        The smallest NFE scored is returned if it already does, inf if none does.
        """
        scored = [(nfe, best.mean) for nfe in self.nfes if (best := self.find(nfe, kind)) is not None]
        for i, (nfe, mean) in enumerate(scored):
            if mean > error:
                continue
            if i == 0 or error <= 0.0 or mean <= 0.0:
                return float(nfe)
            before, worse = scored[i - 1]
            share = math.log(worse / error) / math.log(worse / mean) if math.isfinite(worse) else 1.0
            return before + share * (nfe - before)
        return math.inf

    def table(self, *, width: int | None = None) -> str:
        """One line an NFE: OLSS against the best analytic solver, and the errors at other guidance scales if there are.

        Coloured only where standard output is a terminal.
        """
        from olss_fast.report.tables import guidance_table, render, summary_table

        parts = [summary_table(self)] + ([guidance_table(self)] if self.guidance else [])
        return "\n\n".join(render(part, width=width) for part in parts)

    def solver_table(self, *, width: int | None = None) -> str:
        """One line a solver family, one column an NFE, and at how many NFE the best of them reaches OLSS."""
        from olss_fast.report.tables import render, solver_table

        return render(solver_table(self), width=width)

    def plot_error(self, path: PathLike) -> Path:
        """Error against NFE for all solvers, as PNG (or what the suffix says)."""
        from olss_fast.report.plots import plot_error

        return plot_error(self, path)

    def plot_path(self, path: PathLike) -> Path:
        """The planned evaluation times over the noise schedule, for each step count."""
        from olss_fast.report.plots import plot_path

        return plot_path(self, path)

    def plot(self, folder: PathLike) -> list[Path]:
        """Writes `error.png`, and `path.png` if there are fitted samplers, into `folder`, and makes it if need be."""
        folder = make_folder(folder)
        pictures = [self.plot_error(folder / "error.png")]
        if any(is_olss(candidate.kind) for candidate in self.candidates):
            pictures.append(self.plot_path(folder / "path.png"))
        return pictures

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the errors of all candidates, and all that was set and measured."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "held_out": self.held_out,
            "settings": dict(self.settings),
            "evaluations": dict(self.evaluations),
            "seconds": dict(self.seconds),
            "guidance": [
                vars(row) | {"tuned": _finite(row.tuned), "analytic": _finite(row.analytic)} for row in self.guidance
            ],
            "teacher": self.teacher.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }

    def to_json(self, path: PathLike) -> Path:
        """Write as JSON, one candidate a line, atomically. Floats are written so that they read back the same."""
        data = self.to_dict()
        candidates = ",\n".join("  " + json.dumps(each, allow_nan=False) for each in data.pop("candidates"))
        head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items())
        write_atomically(Path(path), f'{{\n{head},\n "candidates": [\n{candidates}\n ]\n}}\n'.encode())
        return Path(path)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Raises `InputError` for what is not a report, or one of a newer version."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InputError(f"this is no {FORMAT} file: it does not begin with that format's name")
        if data.get("version") != VERSION:
            raise InputError(f"the report has version {data.get('version')!r}, this package reads {VERSION}: update it")
        try:
            report = cls(
                candidates=tuple(Candidate.from_dict(each) for each in data["candidates"]),
                teacher=Plan(**data["teacher"]),
                held_out=int(data["held_out"]),
                settings=dict(data["settings"]),
                evaluations=dict(data["evaluations"]),
                seconds=dict(data["seconds"]),
                guidance=tuple(_guidance_row(row) for row in data.get("guidance", [])),
            )
            _ = report.own_error, report.own_run  # must be readable
            return report
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the report is damaged: {type(error).__name__}: {error}; tune again") from error

    @classmethod
    def from_json(cls, path: PathLike) -> Report:
        """Raises `InputError` if the file is missing, too large or no report."""
        try:
            return cls.from_dict(json.loads(read_bounded(path, LARGEST_FILE, error=InputError)))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"the report {path} cannot be read: {error}") from error


def _guidance_row(data: Mapping[str, Any]) -> GuidanceRow:
    tuned, analytic = (math.inf if data[key] is None else float(data[key]) for key in ("tuned", "analytic"))
    return GuidanceRow(float(data["scale"]), int(data["nfe"]), tuned, analytic)


def _error(value: Any) -> float:
    """As a float, inf for None. `ValueError` for what cannot be an error."""
    error = math.inf if value is None else float(value)
    if not error >= 0.0:
        raise ValueError(f"{value!r} is no root mean square")
    return error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
