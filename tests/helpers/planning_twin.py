"""What the C++ planner computes, in plain NumPy from the definitions, and problems to plan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from olss_fast import NoiseSchedule, Plan, solvers

Array = npt.NDArray[np.float64]
Problem = tuple[Array, Array, int]  # R (T+1, T+1), teacher rows (T+1, T+1), recorded values per tensor M


class Twin:
    """Greedy runs over the errors of strides, each error the length of an explicit residual."""

    def __init__(self, r: Array, rows: Array, count: int = 1) -> None:
        self.r, self.states, self.end = r, r @ rows.T, len(r) - 1
        self.scale = 1 / np.sqrt(count)
        self.known: dict[tuple[int, ...], Array] = {}

    def errors(self, path: tuple[int, ...]) -> Array:
        """Errors of the strides from the end of `path` to all later states."""
        if path not in self.known:
            basis: list[Array] = []
            for column in [*(self.r[:, 1 + node] for node in path), self.states[:, path[-1]]]:
                rest = column.copy()
                for _ in range(2):
                    for q in basis:
                        rest -= q * (q @ rest)
                length = np.linalg.norm(rest)
                if length > 1e-10 * np.linalg.norm(column):
                    basis.append(rest / length)
            targets = self.states[:, path[-1] + 1 :]
            residuals = targets.copy()
            for q in basis:
                residuals -= np.outer(q, q @ residuals)
            lengths = np.linalg.norm(residuals, axis=0)
            lengths[lengths <= 1e-12 * np.linalg.norm(targets, axis=0)] = 0
            self.known[path] = lengths * self.scale
        return self.known[path]

    def stride_errors(self, path: tuple[int, ...]) -> list[float]:
        nodes = (*path, self.end)
        return [float(self.errors(nodes[:k])[nodes[k] - nodes[k - 1] - 1]) for k in range(1, len(nodes))]

    def greedy(self, steps: int, threshold: float) -> tuple[tuple[int, ...] | None, float]:
        """The path that a threshold gives, or None, and the least error that was too large for it."""
        path: tuple[int, ...] = (0,)
        rejected = np.inf
        for _ in range(steps):
            errors = self.errors(path)
            within = np.flatnonzero(errors <= threshold)
            beyond = errors[within[-1] + 1 :] if len(within) else errors
            rejected = min(rejected, float(beyond.min(initial=np.inf)))
            if len(within) == 0:
                return None, rejected
            if path[-1] + 1 + within[-1] == self.end:
                return path, rejected
            path += (path[-1] + 1 + int(within[-1]),)
        return None, rejected

    def least_threshold(self, steps: int) -> tuple[float, tuple[int, ...]]:
        """Every threshold at which a run changes, from 0 up, until one is feasible: no assumption of any kind."""
        threshold = 0.0
        while True:
            path, rejected = self.greedy(steps, threshold)
            if path is not None:
                return threshold, self.lengthened(path, steps)
            threshold = rejected

    def least_threshold_by_halving(self, steps: int) -> tuple[float, tuple[int, ...]]:
        """As published: a binary search, here to the last bit. Takes feasibility to be monotone."""
        low, high = 0.0, float(self.errors((0,))[-1])
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if self.greedy(steps, middle)[0] is None else (low, middle)
        path = self.greedy(steps, high)[0]
        assert path is not None
        return high, self.lengthened(path, steps)

    def lengthened(self, path: tuple[int, ...], steps: int) -> tuple[int, ...]:
        """The worst stride divided (the longest of equal ones) where its worse half is best, until there are enough."""
        while len(path) < steps:
            nodes, errors = (*path, self.end), self.stride_errors(path)
            lengths = np.diff(nodes)
            worst = max(np.flatnonzero(lengths > 1), key=lambda k: (errors[k], lengths[k], -k))
            first, last = nodes[worst], nodes[worst + 1]

            def rank(
                node: int, before: tuple[int, ...] = path[: worst + 1], last: int = last
            ) -> tuple[float, int, int]:
                halves = self.errors(before)[node - before[-1] - 1], self.errors((*before, node))[last - node - 1]
                return max(halves), abs(2 * node - before[-1] - last), node

            path = (*path[: worst + 1], min(range(first + 1, last), key=rank), *path[worst + 1 :])
        return path

    def deployed_error(self, path: tuple[int, ...]) -> float:
        """Least squares for the sample from the initial noise and the outputs at the nodes."""
        columns = self.r[:, [0, *(1 + node for node in path)]]
        weights = np.linalg.lstsq(columns, self.states[:, -1], rcond=None)[0]
        return float(np.linalg.norm(columns @ weights - self.states[:, -1]) * self.scale)


def ddim(steps: int) -> Plan:
    """A DDIM run on the noise schedule of Stable Diffusion."""
    schedule = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
    return solvers.ddim(schedule, steps, spacing="trailing")


def mixture(steps: int, seed: int, dimension: int = 16, components: int = 6) -> Problem:
    """A DDIM run on the exact score of a mixture of Gaussians: smooth outputs, nearly dependent on each other."""
    rng = np.random.default_rng(seed)
    teacher = ddim(steps)
    alphas, sigmas = teacher.alphas, teacher.sigmas
    centres = rng.standard_normal((components, dimension))
    widths = 0.2 * np.exp(0.5 * rng.standard_normal((components, dimension)))
    x = rng.standard_normal((max(64, 2 * (steps + 1) // dimension), dimension))
    basis = [x.ravel()]
    for alpha, sigma, next_alpha, next_sigma in zip(alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:], strict=True):
        variances = (alpha * widths) ** 2 + sigma**2
        offsets = x[:, None] - alpha * centres
        logits = -0.5 * (offsets**2 / variances + np.log(variances)).sum(-1)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        noise = sigma * (weights[..., None] * offsets / variances).sum(1)
        basis.append(noise.ravel())
        x = next_alpha / alpha * (x - sigma * noise) + next_sigma * noise
    return triangle(np.stack(basis, 1)), teacher.rows, x.size


def smooth(steps: int, seed: int) -> Problem:
    """Outputs that vary slowly, with some noise of their own, as those of a network do."""
    rng = np.random.default_rng(seed)
    count, phase = 4 * (steps + 1), np.pi * np.linspace(0, 1, steps)
    waves = np.stack([np.cos(k * phase) / (1 + k) for k in range(6)])
    outputs = rng.standard_normal((count, 6)) @ waves + 0.01 * rng.standard_normal((count, steps))
    return triangle(np.column_stack([rng.standard_normal(count), outputs])), ddim(steps).rows, count


def dense(steps: int, seed: int) -> Problem:
    """Independent outputs and dense random rows: no trajectory looks like this, and nothing here is monotone."""
    rng = np.random.default_rng(seed)
    count = 3 * (steps + 1)
    rows = np.tril(rng.standard_normal((steps + 1, steps + 1))) / np.sqrt(steps)
    return triangle(rng.standard_normal((count, steps + 1))), rows, count


def dependent(steps: int, seed: int) -> Problem:
    """A smooth run in which some outputs are zero, and others repeat an earlier one."""
    rng = np.random.default_rng(seed)
    r, rows, count = smooth(steps, seed)
    for node in range(1, steps):
        if rng.random() < 0.4:
            r[:, 1 + node] = rng.choice([0.0, 1.0]) * r[:, node]
    return r, rows, count


def triangle(basis: Array) -> Array:
    """The R factor of a QR."""
    return np.triu(np.linalg.qr(basis, mode="r"))
