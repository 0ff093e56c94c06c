"""Score many plans on the same noise, each distinct network evaluation made once.

Plans that begin with the same rows and timesteps ask the network the same questions: they are run as a tree that
branches where they part. Candidates are thinned by successive halving (Karnin et al. 2013): all are scored on a few
samples, and only those that could still win go on to more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from olss_fast.executors.reference import Evaluate, Loop
from olss_fast.plan.plan import Plan
from olss_fast.support.identity import digest
from olss_fast.tuning.recording import Float64, distance
from olss_fast.tuning.store import Store

if TYPE_CHECKING:
    from olss_fast.tuning.fitting import Task

HOPELESS = 1.2  # a mean error this many times the best one's, on the same samples, ends a candidate


def score(plans: Sequence[Plan], task: Task, samples: range) -> list[Float64]:
    """Per-sample root mean square error (P,) of each plan to the teacher's samples, inf where a plan diverges."""
    errors = np.empty((len(plans), len(samples)))
    for chunk in task.recording.chunks(samples):
        target = task.recording.result(chunk).to(task.noise.device)
        place = slice(chunk.start - samples.start, chunk.stop - samples.start)
        begun = Loop(max(plans, key=lambda plan: plan.columns), task.noise[chunk][None])
        for index, result in _descend(plans, range(len(plans)), begun, task.denoiser.asking(chunk)):
            errors[index, place] = distance(result, target).cpu().numpy()
    return list(np.nan_to_num(errors, nan=np.inf))


def kept_scores(store: Store, plans: Sequence[Plan], how: str, compute: Callable[[], list[Float64]]) -> list[Float64]:
    """The errors that `compute` returns; those of an earlier run with this store, if it judged the same plans so."""
    name = "scores-" + digest(how, *(part for plan in plans for part in content(plan)))[:16]
    if not store.has(name):
        store.write(name, {f"{i:04d}": torch.from_numpy(error) for i, error in enumerate(compute())})
    return [store.read(name, f"{i:04d}").numpy() for i in range(len(plans))]


def content(plan: Plan) -> tuple[str, bytes, bytes]:
    """The key by which plans are distinguished."""
    return f"{plan.branches} {plan.models.tolist()}", plan.timesteps.tobytes(), plan.rows.tobytes()


def plan_key(plan: Plan) -> str:
    """Tells plans apart in the names of files."""
    return digest(*content(plan))[:8]


def _descend(
    plans: Sequence[Plan], group: Sequence[int], loop: Loop, evaluate: Evaluate
) -> Iterator[tuple[int, Tensor]]:
    """(index of the plan, its samples (B, ...) in float64) of a `group` of plans that asked the same questions so far,
    in no particular order; `loop` holds the answers."""
    for members in _same_question(plans, group, loop.evaluation):
        branch = loop.fork(plans[members[0]])
        if branch.done:
            yield from ((i, branch.x) for i in members)
        else:
            branch.ask(evaluate)
            yield from _descend(plans, members, branch, evaluate)


def _same_question(plans: Sequence[Plan], group: Sequence[int], depth: int) -> Iterable[list[int]]:
    """Members of `group` together that ask the same network the same at evaluation `depth`, or have the same sample."""
    questions: dict[Hashable, list[int]] = {}
    for index in group:
        plan = plans[index]
        asked = (plan.branches, plan.models[depth], plan.timesteps[depth]) if depth < plan.nfe else "sample"
        questions.setdefault((plan.rows[depth, : 1 + depth * plan.branches].tobytes(), asked), []).append(index)
    return questions.values()


def expected_evaluations(plans: Sequence[Plan], samples: int, first: int) -> int:
    """About how many evaluations a `tournament` makes: half are shared, and a tenth of the plans go on to the end."""
    total = sum(plan.nfe for plan in plans)
    return int(0.5 * total * min(first, samples) + 0.1 * total * max(samples - first, 0))


def tournament(
    plans: Sequence[Plan], task: Task, samples: range, *, keep: Sequence[int] = (), first: int = 8
) -> list[Float64]:
    """Errors of each plan on the samples it got to see: the first `first` for all, then 4 x as many for those whose
    mean is within `HOPELESS` of the best, and so on to all. Plans of `keep` are scored on all samples in any case.
    """
    errors: list[Float64] = [np.empty(0)] * len(plans)
    alive = list(range(len(plans)))
    start, stop = samples.start, min(samples.start + first, samples.stop)
    while start < samples.stop:
        scores = score([plans[i] for i in alive], task, range(start, stop))
        for i, more in zip(alive, scores, strict=True):
            errors[i] = np.append(errors[i], more)
        limit = HOPELESS * min(float(errors[i].mean()) for i in alive if i not in keep or len(alive) == len(keep))
        alive = [i for i in alive if i in keep or errors[i].mean() <= limit]
        start, stop = stop, min(samples.start + 4 * (stop - samples.start), samples.stop)
    return errors
