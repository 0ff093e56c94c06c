"""The runs of one PlanScheduler, kept apart: each thread has its own, and a run may move from one thread to another.

A step belongs to the run whose `timesteps` its timestep is a view of; a timestep that is a number or a copy belongs to
the calling thread's run. A thread that has set no timesteps starts with those set last; there, a step that is neither
the first nor the next of one run is refused.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from olss_fast.errors import InputError
from olss_fast.executors.stepwise import Layout, Run
from olss_fast.plan.plan import Floats
from olss_fast.support.text import first_few, quoted

if TYPE_CHECKING:
    from olss_fast.adapters.diffusers.plan_book import Entry

HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Session:
    """The choice of `set_timesteps`, and its run. It does not reference `timesteps`, which keeps it alive.

    layout: of the run, which begins at index `offset` of the timesteps. returned: the sample of the last step.
    """

    entry: Entry | None = None
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    layout: Layout | None = None
    offset: int = 0
    begin_index: int | None = None
    run: Run | None = None
    returned: Tensor | None = None

    @property
    def going(self) -> bool:
        """True if a run has begun and is not finished."""
        return self.run is not None and 0 < self.run.step < self.run.steps

    @property
    def next(self) -> int:
        """Index in `timesteps` of the next step."""
        return self.offset + (0 if self.run is None else self.run.step)

    def check_sigmas(self) -> None:
        """InputError for a pipeline that writes into the scheduler's sigmas to change the steps (Cosmos 2)."""
        if torch.compiler.is_compiling() or type(self.sigmas) is not Tensor:  # of fake ones nothing is known
            return
        assert self.entry is not None
        if self.entry.facts and not torch.equal(self.sigmas, self.entry.levels.ratios()):
            raise InputError(
                f"the pipeline writes into scheduler.sigmas, from which {self.entry.class_name} takes its steps, and "
                "the coefficients of a plan stay what was captured. Run this pipeline with its own scheduler, or with "
                "a fitted plan"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """An independent run from here on; the choice itself never changes."""
        return replace(self, run=copy.deepcopy(self.run, memo))

    def afresh(self) -> Session:
        """The same choice, before its run."""
        if self.entry is None:
            return replace(self)
        return replace(self, layout=self.entry.layout, offset=self.entry.begin, run=None, returned=None)


class Held(NamedTuple):
    """A session and its `timesteps`."""

    session: Session
    timesteps: Tensor


class Sessions:
    """The sessions of all threads, found by thread and by `timesteps`."""

    def __init__(self, session: Session, timesteps: Tensor) -> None:
        self._local, self._lock = threading.local(), threading.Lock()
        self._of_timesteps: Any = WeakIdKeyDictionary()
        self._last = Held(session, timesteps)

    def __getstate__(self) -> Held:
        """A copy has the calling thread's session alone."""
        return self.held

    def __setstate__(self, held: Held) -> None:
        self.__init__(*held)  # type: ignore[misc]
        self.hold(*held)

    @property
    def held(self) -> Held:
        """This thread's session, else the one set last; for reading."""
        held: Held = getattr(self._local, "held", self._last)
        return held

    def hold(self, session: Session, timesteps: Tensor) -> None:
        """Makes this the session of this thread, and the one that other threads start with."""
        self._last = self._take(session, timesteps)

    def own(self) -> Session:
        """This thread's session, for writing."""
        if not hasattr(self._local, "held"):
            self._take(self._last.session.afresh(), self._last.timesteps)
        return self.held.session

    def at(self, timestep: Any, sample: Any) -> Session:
        """The session that a step belongs to; this thread's from now on. InputError if it cannot be determined."""
        mine: Held | None = getattr(self._local, "held", None)
        if torch.compiler.is_compiling():
            return self.held.session
        base = timestep._base if isinstance(timestep, Tensor) else None
        if mine and mine.timesteps is base and (not mine.session.going or mine.session.returned is sample):
            return mine.session
        with self._lock:
            grid = base if base is not None and base in self._of_timesteps else self._last.timesteps
            sessions: list[Session] = list(self._of_timesteps.get(grid, ())) or [self._last.session]
        for session in sessions:
            if session.going and session.returned is sample:
                return self._take(session, grid).session
        if mine and (mine.timesteps is base or grid is not base):
            return mine.session
        return self._take_up(sessions, timestep, grid)

    def _take_up(self, sessions: list[Session], timestep: Any, timesteps: Tensor) -> Session:
        """For a thread that has not set these timesteps: a new run, or the one whose next step this must be."""
        first = sessions[0]
        going = [session for session in sessions if session.going]
        if first.entry is None:
            return first
        found = places(timestep, timesteps, first.entry.timesteps)
        begin = first.entry.begin if first.begin_index is None else first.begin_index
        if not going or (found is not None and begin in found):
            return self._take(first.afresh(), timesteps).session
        following = [session for session in going if found is not None and session.next in found]
        if len(following) != 1:
            raise InputError(
                f"step was called in a thread that has set no timesteps, while {len(going)} runs of other threads are "
                "under way, and cannot tell whether it begins another or goes on with one: call set_timesteps in the "
                "thread of the run, and hand step the entries of `timesteps`"
            )
        return self._take(following[0], timesteps).session

    def _take(self, session: Session, timesteps: Tensor) -> Held:
        with self._lock:
            known = self._of_timesteps.get(timesteps, [])
            if session not in known:  # drops finished runs, which would pile up with the threads
                self._of_timesteps[timesteps] = [*known[:1], *(each for each in known[1:] if each.going), session]
        self._local.held = held = Held(session, timesteps)
        return held


class OwnSession:
    """A scheduler's view of the calling thread's run: its session in `_sessions`, else the one set last."""

    _sessions: Sessions

    @property
    def step_index(self) -> int | None:
        """Index in `timesteps` of the next step; None before the first."""
        session = self._session
        return None if session.run is None else session.next

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep, as set by `set_begin_index`."""
        return self._session.begin_index

    @property
    def timesteps(self) -> Tensor:
        """The timesteps set by this thread, else those set last."""
        return self._sessions.held.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._sessions.hold(self._sessions.own(), timesteps)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The index of a run's first timestep in `timesteps`, or in others; of equal ones the second, as in diffusers.
        InputError if it is not there."""
        grid = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return first_index(timestep, grid, grid.detach().cpu().double().numpy())

    @property
    def sigmas(self) -> Tensor:
        """Sigma of every row, as in diffusers."""
        return self._session.sigmas

    @property
    def num_inference_steps(self) -> int | None:
        return None if (entry := self._session.entry) is None else entry.steps

    @property
    def order(self) -> int:
        """Evaluations per step of the selected plan."""
        entry = self._session.entry
        return entry.facts.order if entry and entry.facts else 1

    @property
    def _session(self) -> Session:
        return self._sessions.held.session

    def _chosen(self) -> Entry:
        if (entry := self._session.entry) is None:
            raise InputError("no plan is chosen before set_timesteps: call that before step and add_noise")
        return entry


def first_index(timestep: Any, timesteps: Tensor, values: Floats) -> int:
    """The index of a run's first timestep in `timesteps`, whose numbers are `values`; 0 if it cannot be determined.

    Of equal timesteps the second is used, as in diffusers: the first belongs to the step before (Heun). InputError for
    a number, or a tensor on the CPU, that is not among them.
    """
    found = places(timestep, timesteps, values)
    if found is None:
        return 0
    if not found:
        raise InputError(
            f"the first timestep of this run is {quoted(timestep)}, and the plan has {first_few(values)}; hand step "
            "the entries of `timesteps`, or say with set_begin_index where the run begins"
        )
    return found[min(1, len(found) - 1)]


def places(timestep: Any, timesteps: Tensor, values: Floats) -> list[int] | None:
    """All indices of a timestep; None if reading it would wait for a device or break a compiled graph.

    A view of `timesteps` gives its index by its offset. Numbers and CPU tensors are compared in float32, or in the
    tensor's dtype if that is coarser. InputError for other than numbers.
    """
    if torch.compiler.is_compiling():
        return None
    grid = values.astype(np.float32)
    if isinstance(timestep, Tensor) and timestep.numel():
        if timestep._base is timesteps:
            return [int(timestep.storage_offset())]
        if timestep.device.type != "cpu":
            return None
        if timestep.dtype in HALF:
            grid = torch.from_numpy(grid).to(timestep.dtype).float().numpy()
        timestep = timestep.flatten()[0].item()
    try:
        number = np.float32(timestep)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or np.ndim(number):
        raise InputError(f"the timestep of a step is {quoted(timestep)}; expected a number or a tensor of one")
    return [int(i) for i in np.flatnonzero(number == (np.trunc(grid) if isinstance(timestep, Integral) else grid))]
