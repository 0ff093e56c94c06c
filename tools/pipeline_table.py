"""Writes docs/pipelines.md: which pipelines of diffusers run plans, from the table that
`tests/adapters/test_every_pipeline.py` runs.

python tools/pipeline_table.py
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pipelines.md"
TABLE = ROOT / "tests" / "helpers" / "every_pipeline.json"

HEADER = """# diffusers' pipelines with a plan in their scheduler slot

Written by `python tools/pipeline_table.py`, from the table that `tests/adapters/test_every_pipeline.py` runs with
diffusers {version}: each class as a tiny random network, once with its own scheduler and once with
`PlanScheduler.from_pipe` and that scheduler captured. {right} classes give the same as with their own scheduler,
{refused} are refused by name, and {unbuilt} were not tried.

What makes a pipeline unfit is found by what it does, not by its name. `from_pipe` refuses pipelines of pipelines, whose
inner slots are the ones to fill, and schedulers whose step needs more than output, time and sample. In a call,
a pipeline that looks at something that its scheduler has and a plan has not (its betas, its list of outputs), or writes
into its sigmas, gets an InputError that says what; one that asks for the class of its scheduler is told the one that
the plan stands in for.
`tune_pipeline` first asks two steps of the pipeline's own loop again from outside, and refuses where the answers differ
(StableDiffusionLatentUpscalePipeline).

## Right

{names}

## Refused

| class | because it |
|---|---|
{reasons}

## Not tried

| why not | classes |
|---|---|
{missing}
"""
BECAUSE = {
    "per_token_timesteps": "gives each token a time of its own",
    r"scheduler\._step_index": "takes steps of its scheduler back",
    r"scheduler\._get_conditioning_c_in": "computes with methods of its scheduler",
    r"writes into scheduler\.sigmas": "writes into its scheduler's sigmas (plans that were not captured run)",
}


def page() -> str:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    refused, unbuilt = table["refused"], table["unbuilt"]
    right = [name for name in table["pipelines"] if name not in refused]
    by_reason = groupby(sorted(unbuilt, key=lambda name: (unbuilt[name], name)), key=unbuilt.__getitem__)
    return HEADER.format(
        version=table["diffusers"],
        right=len(right),
        refused=len(refused),
        unbuilt=len(unbuilt),
        names=", ".join(right),
        reasons="\n".join(f"| {name} | {BECAUSE.get(why, why)} |" for name, why in sorted(refused.items())),
        missing="\n".join(f"| {why} | {', '.join(names)} |" for why, names in by_reason),
    )


if __name__ == "__main__":
    PAGE.write_text(page())
