"""How many times as long as a reference something takes, on a machine that is slow today and busy the next second.

A round times blocks in the order A B B A (A ours, B the reference) and gives one ratio,

    r = (a_1 + a_2) / (b_1 + b_2),        a, b: nanoseconds a call.

Both sides of a round have the same clock frequency and the same neighbours; a drift over the round cancels to first
order, because A and B have the same mean place in it; each side comes once after itself and once after the other, so
what one leaves in the caches cancels too. What does not cancel is that a busy machine slows one side more than the
other: over a minute on two shared cores, r moved with the time that a round took, up in three comparisons and down in a
fourth (correlation of the logarithms 0.5 to 0.8, and -0.5 to -0.8). So only the quietest quarter of the rounds counts,
those whose product of both times is least, which favours neither side; what is reported is the

    median of r over the quietest quarter of the rounds.

Rounds end when their time is up, not when they agree: a machine stays busy for seconds, during which rounds agree to
half a percent on a ratio that is 10% off. So a benchmark's rounds come in several short turns (see bench/conftest.py)
with all others between them, and are put together with `joined`.

The clock is the processor's time of this thread, so waiting for a slice of a busy machine's time does not count. It
sees neither other threads (set `torch.set_num_threads(1)`) nor a GPU. Only the standard library is needed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Call = Callable[[], object]

CLOCK = time.thread_time_ns
BLOCK = 1_000_000  # ns; as many calls as fill it are timed together, so that reading the clock costs nothing
SECONDS = 0.3  # of rounds
QUIET = 0.25  # the part of the rounds that counts


@dataclass(frozen=True)
class Comparison:
    """Seconds a call of either side, one figure a round; they are paired."""

    ours: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def quiet(self) -> Comparison:
        """The quietest rounds."""
        count = math.ceil(QUIET * len(self.ours))
        pairs = sorted(zip(self.ours, self.reference, strict=True), key=math.prod)[:count]
        return Comparison(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    @property
    def ratio(self) -> float:
        quiet = self.quiet
        return statistics.median(a / b for a, b in zip(quiet.ours, quiet.reference, strict=True))


def joined(parts: Sequence[Comparison]) -> Comparison:
    """The rounds of all of them."""
    ours, reference = ([x for part in parts for x in getattr(part, side)] for side in ("ours", "reference"))
    return Comparison(tuple(ours), tuple(reference))


def compare(ours: Call, reference: Call, *, seconds: float = SECONDS) -> Comparison:
    """Rounds of A B B A; both are called first until a block is filled, which warms them up."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _rounds(ours, reference, (_calls_a_block(ours), _calls_a_block(reference)), seconds)
    finally:
        if collecting:
            gc.enable()


def _rounds(ours: Call, reference: Call, calls: tuple[int, int], seconds: float) -> Comparison:
    end = time.perf_counter() + seconds
    a: list[float] = []
    b: list[float] = []
    while not a or time.perf_counter() < end:
        a_1, b_1 = _block(ours, calls[0]), _block(reference, calls[1])
        b_2, a_2 = _block(reference, calls[1]), _block(ours, calls[0])
        a.append(0.5e-9 * (a_1 + a_2))
        b.append(0.5e-9 * (b_1 + b_2))
    return Comparison(tuple(a), tuple(b))


def _calls_a_block(call: Call) -> int:
    calls = 1
    while (took := calls * _block(call, calls)) < BLOCK:
        calls = max(2 * calls, min(10 * calls, math.ceil(calls * BLOCK / max(took, 1.0))))
    return calls


def _block(call: Call, calls: int) -> float:
    """Nanoseconds a call, over `calls` of them."""
    started = CLOCK()
    for _ in range(calls):
        call()
    return (CLOCK() - started) / calls


def slowed(call: Call, fraction: float) -> Call:
    """`call`, and then a busy loop for `fraction` of the time that it took: a slowdown to prove a gate with."""

    def slower() -> object:
        started = CLOCK()
        result = call()
        end = started + (1.0 + fraction) * (CLOCK() - started)
        while CLOCK() < end:
            pass
        return result

    return slower
