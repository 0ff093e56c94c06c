"""Record a teacher: the triangle R that all path planning needs, and its states on disk in chunks.

The teacher is a Plan, so each of its states, and each output at the times of a grid of G, is a known combination of its
basis [x_T, f_0 .. f_{T-1}]. Every chunk's [x_T | outputs at the grid] is folded into an R factor (float64,
R <- qr([R; chunk])), after which path planning works on a (G+1) x (G+1) triangle whatever the number of samples. R
factors of several processes merge by one QR of their stack. What fits read again and again are the states that a
student is to reach: they are kept in float32, the basis is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olss_fast.executors.reference import Loop
from olss_fast.network import Denoiser, require_finite
from olss_fast.support.tree import batches
from olss_fast.tuning.store import Store

if TYPE_CHECKING:
    from olss_fast.plan.plan import Plan
    from olss_fast.schedule.noise_schedule import NoiseSchedule
    from olss_fast.solvers.dense import Dense
    from olss_fast.tuning.teacher import Teacher

PROBED = 4  # samples, to check that a network is the one that a store belongs to
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """The split of the samples: rows are fitted on `fit`, choices are made on `validation`, `held_out` judges."""

    fit: range
    validation: range
    held_out: range

    @staticmethod
    def of(samples: int, *, validation: int, held_out: int) -> Split:
        """The last `held_out` samples, the `validation` before them, and the rest."""
        first, second = samples - validation - held_out, samples - held_out
        return Split(range(first), range(first, second), range(second, samples))


def merge_triangles(triangles: Sequence[Float64]) -> Float64:
    """The R factor of the QR of the stacked matrices whose R factors are given, with a non-negative diagonal."""
    r = np.asarray(np.linalg.qr(np.concatenate(triangles), mode="r"))
    columns = r.shape[1]
    full = np.zeros((columns, columns))
    full[: r.shape[0]] = r
    return full * np.where(np.diag(full) < 0, -1.0, 1.0)[:, None]


def triangle(columns: Tensor) -> Float64:
    """R factor (C, C) of the matrix whose C columns are the tensors `columns` (C, B, ...), in float64."""
    tall = columns.reshape(columns.shape[0], -1).to(torch.float64).T
    return merge_triangles([torch.linalg.qr(tall, mode="r").R.cpu().numpy()])


@dataclass(frozen=True)
class Recording:
    """A finished teacher run; `pixels` are those of all fit samples."""

    teacher: Teacher
    store: Store
    split: Split
    batch_size: int
    pixels: int

    @property
    def grid(self) -> Plan:
        """The evaluations that paths are made of."""
        return self.teacher.grid

    @cached_property
    def r(self) -> Float64:
        """The triangle (G+1, G+1) of the fit samples' [x_T | outputs at the grid]."""
        chunks = batches(self.split.fit, self.batch_size)
        return merge_triangles([self.store.read(chunk_name(chunk), "r").numpy() for chunk in chunks])

    def recorded(self) -> list[slice]:
        """The chunks as they lie in the store."""
        parts = (self.split.fit, self.split.validation, self.split.held_out)
        return [chunk for part in parts for chunk in batches(part, self.batch_size)]

    def chunks(self, samples: range) -> list[slice]:
        """`samples` cut where the recorded chunks end, so that each piece lies in one file."""
        pieces = [slice(max(c.start, samples.start), min(c.stop, samples.stop)) for c in self.recorded()]
        return [piece for piece in pieces if piece.start < piece.stop]

    def _place(self, chunk: slice) -> tuple[str, slice]:
        """The file that holds `chunk`, and where in it."""
        (home,) = [c for c in self.recorded() if c.start <= chunk.start and chunk.stop <= c.stop]
        return chunk_name(home), slice(chunk.start - home.start, chunk.stop - home.start)

    def result(self, chunk: slice) -> Tensor:
        """The teacher's samples (B, ...) of `chunk`, float32."""
        name, place = self._place(chunk)
        return self.store.read(name, "result", place)

    def state(self, chunk: slice, index: int) -> Tensor:
        """The teacher's state `index` (its network input there, G: its sample) of a fit chunk, (B, ...) float64."""
        if index == self.grid.nfe:
            return self.result(chunk).to(torch.float64)
        name, place = self._place(chunk)
        return self.store.read(name, "states", (index, place)).to(torch.float64)


def distance(samples: Tensor, teachers: Tensor) -> Tensor:
    """Root mean square distance (B,) of samples (B, ...), in their dtype and on their device."""
    return (samples - teachers.to(samples)).flatten(1).square().mean(1).sqrt()


def chunk_name(chunk: slice) -> str:
    return f"chunk-{chunk.start:06d}-{chunk.stop:06d}"


def record(
    teacher: Teacher,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    *,
    store: Store,
    split: Split,
    batch_size: int,
    progress: Callable[[int], object] = lambda evaluations: None,
) -> Recording:
    """Run `teacher` on all noise, chunk by chunk; finished chunks in the store are not run again.

    `progress` is told how many evaluations of a sample that skips.
    Raises `NetworkError` (evaluation and sample named) and `StoreError`.
    """
    rows = teacher.rows(schedule)
    recording = Recording(teacher, store, split, batch_size, len(split.fit) * denoiser.noise[0].numel())
    for chunk in recording.recorded():
        if store.has(chunk_name(chunk)):
            store.entry(chunk_name(chunk))
            progress((chunk.stop - chunk.start) * teacher.plan.nfe)
        else:
            wanted = rows if chunk.start in split.fit else None
            store.write(chunk_name(chunk), _run_chunk(teacher.plan, denoiser, chunk, wanted))
    return recording


def _run_chunk(plan: Plan, denoiser: Denoiser, chunk: slice, rows: Dense | None) -> dict[str, Tensor]:
    """The samples of `plan`; with `rows` of a grid also the states there, and the triangle of the outputs."""
    noise, evaluate = denoiser.noise[chunk], denoiser.asking(chunk)
    loop = Loop(plan, noise[None])
    while not loop.done:
        require_finite(loop.ask(evaluate), step=loop.evaluation - 1, first_sample=chunk.start)
    tensors = {"result": loop.x.to(torch.float32)}
    if rows is not None:
        basis = loop.columns.flatten(1)
        outputs = np.concatenate([np.eye(1, len(basis)), rows.outputs])  # x_T before them
        states = torch.tensor(rows.inputs, device=basis.device) @ basis
        tensors["states"] = states.to(torch.float32).reshape(-1, *noise.shape)
        tensors["r"] = torch.from_numpy(triangle(torch.tensor(outputs, device=basis.device) @ basis))
    return tensors


def probe(plan: Plan, denoiser: Denoiser) -> Tensor:
    """The network's outputs (samples, questions, ...) for a few samples at a plan's noisiest, middle and last time.

    It is asked about states of these levels whose image is another sample's noise: no teacher need have run.
    """
    stride = -(-denoiser.samples // PROBED) | 1  # odd, for conditioning often repeats
    samples = slice(0, denoiser.samples, stride)
    x, ask = denoiser.noise[samples].double(), denoiser.asking(samples)
    answers = []
    for i in sorted({0, plan.nfe // 2, plan.nfe - 1}):
        mixed = float(plan.alphas[i]) * x.roll(1, 0) + float(plan.sigmas[i]) * x
        state = mixed if i else float(plan.rows[0, 0]) * x
        answers.append(ask(state, float(plan.timesteps[i]))[0])
    return torch.stack(answers, 1)
