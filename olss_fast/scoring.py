"""Score many plans on the same noise, each distinct network evaluation made once.

Plans that begin with the same rows and timesteps ask the network the same questions: they are run as a tree that
branches where they part. Candidates are thinned by successive halving (Karnin et al. 2013): all are scored on a few
samples, and only those that could still win go on to more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from olss_fast.executors import reference
from olss_fast.fitting import Float64, Task
from olss_fast.identity import digest
from olss_fast.plan import Plan
from olss_fast.store import Store

Progress = Callable[[int], object]
HOPELESS = 1.2  # a mean error this many times the best one's, on the same samples, ends a candidate


def score(
    plans: Sequence[Plan], task: Task, samples: range, progress: Progress = lambda evaluations: None
) -> list[Float64]:
    """Per-sample root mean square error (P,) of each plan to the teacher's samples, inf where a plan diverges."""
    errors = np.empty((len(plans), len(samples)))
    for chunk in task.recording.chunks(samples):
        target = task.recording.result(chunk).to(torch.float64)
        place = slice(chunk.start - samples.start, chunk.stop - samples.start)
        for index, result in final_samples(plans, task, chunk, progress):
            errors[index, place] = (result.cpu() - target).square().flatten(1).mean(1).sqrt().numpy()
    return list(np.nan_to_num(errors, nan=np.inf))


def kept_scores(store: Store, plans: Sequence[Plan], how: str, compute: Callable[[], list[Float64]]) -> list[Float64]:
    """The errors that `compute` returns; those of an earlier run with this store, if it judged the same plans so."""
    name = "scores-" + digest(how, *(part for plan in plans for part in content(plan)))[:16]
    if not store.has(name):
        store.write(name, {f"{i:04d}": torch.from_numpy(error) for i, error in enumerate(compute())})
    return [store.read(name, f"{i:04d}").numpy() for i in range(len(plans))]


def content(plan: Plan) -> tuple[str, bytes, bytes]:
    """What plans are told apart by."""
    return f"{plan.branches} {plan.models.tolist()}", plan.timesteps.tobytes(), plan.rows.tobytes()


def final_samples(
    plans: Sequence[Plan], task: Task, chunk: slice, progress: Progress = lambda evaluations: None
) -> Iterator[tuple[int, Tensor]]:
    """(index of the plan, its samples (B, ...) in float64), shared evaluations made once, in no particular order."""
    for branches in sorted({plan.branches for plan in plans}):
        group = [i for i, plan in enumerate(plans) if plan.branches == branches]
        yield from _descend(
            plans, group, task.with_branches(branches), chunk, task.noise[chunk][None].double(), 0, progress
        )


def _descend(
    plans: Sequence[Plan],
    group: Sequence[int],
    task: Task,
    chunk: slice,
    columns: Tensor,
    depth: int,
    progress: Progress,
) -> Iterator[tuple[int, Tensor]]:
    """All plans of `group` asked the same questions so far; `columns` holds the answers."""
    for members in _same_question(plans, group, depth).values():
        plan = plans[members[0]]
        row = torch.tensor(plan.rows[depth, : columns.shape[0]], device=columns.device)
        x = reference.combine(row, columns)
        finished = [i for i in members if plans[i].nfe == depth]
        yield from ((i, x) for i in finished)
        if len(finished) < len(members):
            outputs = task.ask(x, float(plan.timesteps[depth]), chunk)
            progress(x.shape[0])
            rest = [i for i in members if plans[i].nfe > depth]
            yield from _descend(plans, rest, task, chunk, torch.cat([columns, outputs]), depth + 1, progress)


def _same_question(plans: Sequence[Plan], group: Sequence[int], depth: int) -> Mapping[bytes, list[int]]:
    """Members of `group` by the network input and timestep of evaluation `depth` (or by their last row)."""
    questions: dict[bytes, list[int]] = {}
    for index in group:
        plan = plans[index]
        key = plan.rows[depth, : 1 + depth * plan.branches].tobytes()
        key += plan.timesteps[depth].tobytes() if depth < plan.nfe else b"sample"
        questions.setdefault(key, []).append(index)
    return questions


def expected_evaluations(plans: Sequence[Plan], samples: int, first: int) -> int:
    """About how many evaluations a `tournament` makes: half are shared, and a tenth of the plans go on to the end."""
    total = sum(plan.nfe for plan in plans)
    return int(0.5 * total * min(first, samples) + 0.1 * total * max(samples - first, 0))


def tournament(
    plans: Sequence[Plan],
    task: Task,
    samples: range,
    *,
    keep: Sequence[int] = (),
    first: int = 8,
    progress: Progress = lambda evaluations: None,
) -> list[Float64]:
    """Errors of each plan on the samples it got to see: the first `first` for all, then 4 x as many for those whose
    mean is within `HOPELESS` of the best, and so on to all. Plans of `keep` are scored on all samples in any case.
    """
    errors: list[Float64] = [np.empty(0)] * len(plans)
    alive = list(range(len(plans)))
    start, stop = samples.start, min(samples.start + first, samples.stop)
    while start < samples.stop:
        scores = score([plans[i] for i in alive], task, range(start, stop), progress)
        for i, more in zip(alive, scores, strict=True):
            errors[i] = np.append(errors[i], more)
        limit = HOPELESS * min(float(errors[i].mean()) for i in alive if i not in keep or len(alive) == len(keep))
        alive = [i for i in alive if i in keep or errors[i].mean() <= limit]
        start, stop = stop, min(samples.start + 4 * (stop - samples.start), samples.stop)
    return errors
