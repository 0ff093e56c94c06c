"""Whole pipelines from local folders, and their prompts from text files: for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from olss_fast._device import pick_device
from olss_fast._files import read_bounded
from olss_fast.adapters.diffusers import check_index, first_lines, weights_variant
from olss_fast.adapters.pipeline_calls import takes
from olss_fast.errors import InputError, ModelError

LARGEST_PROMPTS = 2**24  # bytes
DENOISERS = ("unet", "transformer")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_any_pipeline(folder: str | Path, *, device: str | None = None, dtype: str | None = None) -> Any:
    """The diffusers pipeline of a local folder: safetensors only, nothing fetched, no code of the folder's is run.

    `dtype` defaults to float32 on a CPU, elsewhere to float16 for a UNet and bfloat16 for a transformer. Raises
    `ModelError` for a folder that is no pipeline, or that diffusers cannot load.
    """
    folder, place = Path(folder), pick_device(device)
    index = check_index(folder)
    parts = [name for name in DENOISERS if (folder / name).is_dir()]
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"the dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    usual = torch.float32 if place.type == "cpu" else torch.float16 if "unet" in parts else torch.bfloat16
    variant = weights_variant(folder / parts[0]) if parts else None
    try:
        from diffusers import DiffusionPipeline

        loader: Any = DiffusionPipeline
        pipe = loader.from_pretrained(
            str(folder),
            torch_dtype=usual if dtype is None else DTYPES[dtype],
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:  # whatever diffusers, transformers or safetensors made of a damaged folder
        kind = index.get("_class_name", "pipeline")
        raise ModelError(f"the {kind} in {folder} cannot be loaded: {first_lines(error)}") from error
    return pipe.to(place)


def silence() -> None:
    """No progress bars and advice of diffusers and transformers while pipelines are loaded."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, one prompt each; empty ones and such as begin with # are left out."""
    try:
        # "sig": editors of Windows begin a file with a mark.
        text = read_bounded(Path(path), LARGEST_PROMPTS, error=InputError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise InputError(f"{path} holds no prompts: expected one a line (lines that begin with # are comments)")
    return prompts


def prompt_calls(
    pipe: Any,
    prompts: Sequence[str],
    samples: int,
    *,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`samples` images as calls of the pipeline, `batch_size` (1) a call: prompts in turn, every image its own seed."""
    if not takes(pipe, "prompt"):
        raise InputError(f"{type(pipe).__name__} takes no prompt: leave --prompts out")
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if guidance and not takes(pipe, "guidance_scale"):
        raise InputError(f"{type(pipe).__name__} takes no guidance_scale: leave --guidance-scale out")
    size = batch_size or 1
    calls = []
    for first in range(0, samples, size):
        numbers = range(first, min(first + size, samples))
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in numbers]
        calls.append({"prompt": [prompts[i % len(prompts)] for i in numbers], "generator": generators, **guidance})
    return calls


def pipeline_images(pipe: Any, calls: Sequence[dict[str, Any]], steps: int) -> NDArray[np.float32]:
    """(P, C, H, W) images in [-1, 1] of all calls, at `num_inference_steps` = `steps`."""
    parts = [pipe(**call, num_inference_steps=steps, output_type="np").images for call in calls]
    images = np.concatenate(parts).astype(np.float32)  # (P, H, W, C) in [0, 1]
    return np.asarray(2.0 * images.transpose(0, 3, 1, 2) - 1.0, dtype=np.float32)
