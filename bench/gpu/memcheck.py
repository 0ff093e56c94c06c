"""A few launches of every kernel at awkward sizes, for `compute-sanitizer --tool memcheck`: nothing is compared."""

from __future__ import annotations

import torch

SIZES = (31, 4099)


def launches(device: str) -> None:
    from olss_fast.kernels import StepState, lincomb, start, step

    for numel in SIZES:
        for branches, doubled in ((1, False), (1, True), (2, True)):
            x = torch.randn(1 + doubled, numel, device=device, dtype=torch.float16)
            time = torch.zeros(len(x), device=device)
            state = StepState.empty(x, time, steps=18, noises=2, branches=branches, doubled=doubled)
            state.history[0] = 1.0
            state.history[-2:] = 1.0
            state.noise_counts.fill_(2)
            start(state)
            for _ in range(18):
                step(torch.ones_like(x), state)
        columns = torch.randn(20, numel, device=device, dtype=torch.bfloat16)
        lincomb(columns, torch.randn(20, device=device))
        lincomb(list(columns[:5]), torch.randn(5, device=device))


if __name__ == "__main__":
    import source_tree

    source_tree.use()
    launches("cuda")
    torch.cuda.synchronize()
