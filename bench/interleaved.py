"""How many times as long as a reference something takes, on a machine that is slow today and busy the next second.

A round times blocks in the order A B B A (A ours, B the reference) and gives one ratio,

    r = (a_1 + a_2) / (b_1 + b_2),        a, b: nanoseconds a call,

and what is reported is the median of r over all rounds. Within a round both sides have the same clock frequency and the
same neighbours, so these cancel; a drift over the round cancels to first order, because A and B have the same mean
place in it; each side comes once after itself and once after the other, so what one leaves in the caches cancels too.
A round that something interrupted is an outlier, and a median does not see how far out it lies. (The ratio of two
medians, or of two minima, would compare the quietest moments of either side, which need not be the same ones.)

The standard error of a median is 1.2533 s / sqrt(n) for normal errors; s is taken from the interquartile range q, which
outliers do not move, as q / 1.349. Rounds go on until it is below `PRECISION`, or time is up.

The clock is the processor's time of this thread, so waiting for a slice of a busy machine's time does not count: at a
load of 2 to 3 on two cores the worst standard error after 4 s was 7% with `time.perf_counter_ns`, and 3% with this. It
sees neither other threads (set `torch.set_num_threads(1)`) nor a GPU. Only the standard library is needed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]

CLOCK = time.thread_time_ns
PRECISION = 0.006  # relative standard error of the ratio at which rounds end
BLOCK = 1_000_000  # ns; as many calls as fill it are timed together, so that reading the clock costs nothing
LEAST_ROUNDS, MOST_ROUNDS = 40, 2000
SECONDS = 3.0  # of rounds; slow calls end by it, with at least FEWEST_ROUNDS
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Comparison:
    """Seconds a call of either side, one figure a round; they are paired."""

    ours: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def standard_error(self) -> float:
        """Of `ratio`, relative to it; infinite for a single round."""
        if len(self.ours) < 2:
            return math.inf
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return 1.2533 * (high - low) / 1.349 / math.sqrt(len(self.ours)) / self.ratio


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
    started = time.perf_counter()
    a: list[float] = []
    b: list[float] = []
    while len(a) < MOST_ROUNDS:
        a_1, b_1 = _block(ours, calls[0]), _block(reference, calls[1])
        b_2, a_2 = _block(reference, calls[1]), _block(ours, calls[0])
        a.append(0.5e-9 * (a_1 + a_2))
        b.append(0.5e-9 * (b_1 + b_2))
        late = len(a) >= FEWEST_ROUNDS and time.perf_counter() - started > seconds
        if late or (len(a) % LEAST_ROUNDS == 0 and _comparison(a, b).standard_error <= PRECISION):
            break
    return _comparison(a, b)


def _comparison(a: list[float], b: list[float]) -> Comparison:
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
