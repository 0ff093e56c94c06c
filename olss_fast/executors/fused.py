"""The fused executor: one kernel between two network calls (`olss_fast.kernels.step`), buffers made once.

Every table of the plan lies in device memory in the layout of `StepState`, whose capacity may exceed the plan: a new
plan, guidance scale or noise is written over the old one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError, NetworkError
from olss_fast.executors.host_step import host_step
from olss_fast.executors.increments import Increments, increments
from olss_fast.executors.reference import OnStep
from olss_fast.kernels import StepState
from olss_fast.plan.plan import Plan

Ask = Callable[[Tensor, Tensor, int], Tensor]
"""`ask(x, time, model)`: the raw output of network number `model`, of x's shape and dtype."""


class Room(NamedTuple):
    """Capacity of the buffers, or what a plan needs of it."""

    steps: int
    noises: int


LEAST_ROOM = Room(steps=16, noises=0)  # most plans then fit the buffers of another


class FusedLoop:
    """The sampling loop for one network and one noise shape.

    like: an empty tensor (B, …) of the network's dtype, device and memory format. doubled: the network gets both halves
    of a guided pair, unconditional first. Every call passes the same two tensors, x and its timesteps, or a copy of x
    if the network writes to it. room: the least capacity.
    """

    backend = "fused"
    moved = ""  # the parameter or module that forced the last recapture

    def __init__(self, ask: Ask, like: Tensor, plan: Plan, *, doubled: bool, room: Room = LEAST_ROOM) -> None:
        self.ask, self.batch = ask, like.shape[0]
        self.x = torch.cat([like, like]) if doubled else torch.empty_like(like)
        self.time = torch.zeros(self.x.shape[0], dtype=torch.float32, device=like.device)
        self.state = StepState.empty(
            self.x,
            self.time,
            steps=max(plan.nfe, room.steps),
            noises=max(plan.noises, room.noises),
            branches=plan.branches,
            doubled=doubled,
        )
        self.plan: Plan | None = None
        self._host = host_step(self.state)
        self._asked, self._lends = 0, True  # evaluations since the start; whether the network gets x itself

    @property
    def room(self) -> Room:
        """Capacity of the buffers."""
        return Room(self.state.rows.shape[0] - 1, self.state.history.shape[0] - self._noise_start)

    @property
    def _noise_start(self) -> int:
        start: int = 1 + (self.state.rows.shape[0] - 1) * self.state.branches
        return start

    @property
    def bytes(self) -> int:
        """Device memory of the loop's own buffers."""
        return sum(each.numel() * each.element_size() for each in self.state if isinstance(each, Tensor))

    def fits(self, plan: Plan) -> bool:
        """True if the buffers can hold `plan`."""
        room = self.room
        return plan.nfe <= room.steps and plan.noises <= room.noises and plan.branches == self.state.branches

    def load(self, plan: Plan, guidance_scale: float) -> None:
        """Writes the plan's tables and the guidance scale to device memory, if they changed."""
        self.state.guidance.fill_(guidance_scale)
        if plan is self.plan:
            return
        state, outputs = self.state, plan.noise_slice.start
        found = Increments(plan.rows, False)
        if state.x.dtype == state.rows.dtype:  # otherwise sums are wider than x and do not carry its rounding on
            found = increments(plan.rows, outputs)
        rows = np.zeros(tuple(state.rows.shape))
        rows[: plan.nfe + 1, :outputs] = found.rows[:, :outputs]
        rows[: plan.nfe + 1, self._noise_start : self._noise_start + plan.noises] = found.rows[:, outputs:]
        times, counts = np.zeros(len(rows)), np.zeros(len(rows))
        times[: plan.nfe] = plan.timesteps
        counts[: plan.nfe + 1] = [1 + max(np.flatnonzero(row), default=-1) for row in found.rows[:, outputs:]]
        state.anchored.fill_(found.anchored)
        for buffer, values in ((state.rows, rows), (state.timesteps, times), (state.noise_counts, counts)):
            buffer.copy_(torch.from_numpy(values))
        self.plan = plan

    def fill(self, noise: Tensor, step_noise: Tensor | None) -> None:
        """x_T, and the fresh noises (Z, B, …) of a stochastic plan."""
        self.state.column(0).copy_(noise)
        for z, each in enumerate([] if step_noise is None else step_noise):
            self.state.column(self._noise_start + z).copy_(each)

    def evaluate(self, model: int) -> None:
        """One network call and the step after it."""
        x = self.x if self._lends else self.x.clone()
        version = x._version
        output = self.ask(x, self.time, model)
        if output.device != x.device:
            raise NetworkError(
                f"the network returned a tensor on {output.device} for an input on {x.device}: move it there"
            )
        same = output is x or output._base is x  # a network that works in place
        if same or output.dtype != x.dtype or output.stride() != x.stride():
            output = torch.empty_like(x).copy_(output)
        if x._version != version and self._lends:
            output = output.clone()
            self._keep_x()
        self._asked += 1
        if self._host is not None:
            self._host(output)
        else:
            torch.ops.olss_fast.step.default(output, *self.state)

    def _keep_x(self) -> None:
        """The network wrote to x, which the next row needs: from now on it gets copies."""
        if self._asked:
            raise NetworkError(
                f"the network wrote to its input, for the first time at evaluation {self._asked}: copy it"
            )
        self._lends = False
        self.start()

    def start(self) -> None:
        """Forms the first network input. Calls the operators directly: the state was checked when it was made."""
        self._asked = 0
        if self._host is not None:
            self._host(None)
        else:
            torch.ops.olss_fast.start.default(*self.state)

    def run(self, on_step: OnStep | None = None) -> Tensor:
        """The sample (B, …): a view of the network's input buffer, valid until the next run."""
        return self.steps(self.evaluate, on_step)

    def steps(self, evaluate: Callable[[int], object], on_step: OnStep | None = None) -> Tensor:
        """`run`, by `evaluate(model)` for each evaluation."""
        assert self.plan is not None
        self.start()
        x = self.x.narrow(0, 0, self.batch)
        for i, model in enumerate(self.plan.models.tolist()):
            evaluate(model)
            if on_step is not None:
                on_step(i, x)
        return x

    def require_finite(self) -> None:
        """NetworkError naming the first output of the last run with NaN or infinity. Synchronises with the device."""
        assert self.plan is not None
        columns = self.state.history[: self.plan.noise_slice.start]
        finite = torch.isfinite(columns).all(1)
        if not bool(finite.all()):
            column = int((~finite).nonzero()[0])
            if column == 0:
                raise InputError("the noise holds NaN or infinity")
            raise NetworkError(
                f"the network returned NaN or infinity at evaluation {(column - 1) // self.plan.branches}; lower the "
                "guidance, or run the network in a wider dtype"
            )
