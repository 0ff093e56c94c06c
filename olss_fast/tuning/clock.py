"""Progress bars, and what each stage of a tuning or a comparison cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from olss_fast.network import Denoiser
from olss_fast.support.progress import evaluation_bar


@dataclass(frozen=True)
class Clock:
    """Adds up the network evaluations and seconds of each stage; a bar for each where `visible`."""

    denoiser: Denoiser
    visible: bool
    evaluations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar of `total` sample evaluations, which the denoiser's advance; yields what advances it by others."""
        start, before = time.perf_counter(), self.denoiser.evaluations
        with evaluation_bar(title, total, self.visible) as bar:
            self.denoiser.tick = bar.update
            yield bar.update
            bar.total = bar.n  # early stopping leaves some of the estimate unused
            bar.refresh()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.evaluations[name] = self.evaluations.get(name, 0) + self.denoiser.evaluations - before
