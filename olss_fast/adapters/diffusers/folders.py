"""Local diffusers folders: the bare network of an unconditional or class-conditional UNet2DModel, and whole pipelines.

    model = load_pipeline("path/to/ddpm-folder")
    images = olss_fast.sample(model.network, plan, torch.randn(16, *model.shape))

Only safetensors weights are read, nothing is unpickled and nothing is downloaded. Nonlinear parts of a scheduler, such
as clipping the predicted image, are not applied to a bare network: a Plan is linear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError, ModelError
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.device import pick_device, plain_defaults
from olss_fast.support.files import read_bounded
from olss_fast.support.text import clipped

LARGEST_CONFIG = 2**24  # bytes
DENOISERS = ("unet", "transformer")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model"


class UNetNetwork(torch.nn.Module):
    """network(x, timestep[, class_labels]) -> raw output of x's shape, from a UNet2DModel.

    x (B, C, H, W), timestep (B,) in the model's own unit (need not be whole), class_labels (B,) int64. If the model
    also predicts the variance (twice the channels), the first half is returned.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        output: tuple[Tensor, ...] = self.unet(x, timestep, class_labels=class_labels, return_dict=False)
        return output[0][:, : x.shape[1]]


@dataclass(frozen=True)
class DiffusersModel:
    """A loaded pipeline: what `tune` and `sample` take, the shape of one sample and the number of its classes.

    `classes` is 0 for an unconditional model. `null_class` is the label for "any class" that guidance needs, None if
    not known.
    """

    network: UNetNetwork
    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    classes: int = 0
    null_class: int | None = None
    guidance_scale: float = 1.0


def load_pipeline(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    null_class: int | None = None,
) -> DiffusersModel:
    """Load a pipeline folder to `device`, by default a GPU if there is one.

    `null_class` is the label the model was trained with for "no class"; it is not counted among the classes if it is
    the last one. Default: "_null_class" in the folder's model_index.json, if it is there.

    Raises:
        ModelError: no such folder, not a pipeline of this kind, no or only pickled weights, weights that do not fit.
        ScheduleError: the scheduler's noise levels are of an unknown kind.
        InputError: an unavailable device.
    """
    folder = Path(folder)
    index = _check_pipeline(folder)
    if null_class is None:
        null_class = index.get("_null_class")
    config = _read_config(folder / "unet" / "config.json")
    shape = _sample_shape(config, folder)
    classes = _count_classes(config, folder)
    if null_class is not None and (type(null_class) is not int or not 0 <= null_class < classes):
        raise ModelError(
            f"null_class is {null_class!r}, but the model in {folder} has "
            + (f"the labels 0 to {classes - 1}" if classes else "no classes")
        )
    schedule = NoiseSchedule.from_diffusers(_read_config(folder / "scheduler" / "scheduler_config.json"))
    unet = read_unet(folder / "unet", device=device, dtype=dtype)
    return DiffusersModel(
        network=UNetNetwork(unet).eval().requires_grad_(False),
        schedule=schedule,
        shape=shape,
        classes=classes - 1 if null_class == classes - 1 else classes,
        null_class=null_class,
    )


@plain_defaults()
def read_unet(
    folder: Path, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The UNet2DModel of a component folder (config.json beside safetensors weights). Errors as in `load_pipeline`."""
    place = pick_device(device)
    how = {"variant": weights_variant(folder), "torch_dtype": dtype, "low_cpu_mem_usage": False}
    unet: torch.nn.Module
    unet, info = _from_pretrained("UNet2DModel", folder, "weights", output_loading_info=True, **how)
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise ModelError(f"the weights in {folder} lack {len(absent)} tensors of its config.json, first {absent[0]!r}")
    return unet.to(place)


def _from_pretrained(class_name: str, folder: Path, what: str, **how: Any) -> Any:
    """What diffusers loads from safetensors in a local folder. ModelError, naming `what`, if it cannot."""
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(f"diffusers is needed to load {folder}, and cannot be imported: {error}") from error
    try:
        kind = getattr(diffusers, class_name)
        return kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **how)
    except Exception as error:  # a damaged folder may raise anything in diffusers, transformers, safetensors or torch
        said = clipped(" ".join(str(error).split()), 300)
        raise ModelError(f"the {what} in {folder} cannot be loaded: {said}") from error


def _check_pipeline(folder: Path) -> dict[str, Any]:
    """A model_index.json that names a UNet2DModel and a scheduler, and nothing that changes what is sampled."""
    index = check_index(folder)
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    unet = parts.pop("unet", None)
    kind = index.get("_class_name", "unnamed")
    if unet is None or unet[-1:] != ["UNet2DModel"]:
        raise ModelError(
            f"{folder} holds a {kind} with unet {unet}: only pipelines of a UNet2DModel can be loaded as a network; "
            "tune those that take a prompt with olss_fast.tune_pipeline (--prompts FILE)"
        )
    if "scheduler" not in parts:
        raise ModelError(f"{folder} holds a {kind} without a scheduler: its noise schedule is unknown")
    others = sorted(set(parts) - {"scheduler"})
    if others:
        raise ModelError(
            f"{folder} holds a {kind} with {', '.join(others)}: only pixel pipelines of a UNet2DModel can be loaded as "
            "a network; tune those that take a prompt with olss_fast.tune_pipeline (--prompts FILE)"
        )
    return index


def check_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder. Raises `ModelError`."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: give a local diffusers pipeline folder, or 'demo'")
    return _read_config(folder / "model_index.json")


def _read_config(path: Path) -> dict[str, Any]:
    text = read_bounded(path, LARGEST_CONFIG, error=ModelError)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected an object with the settings")
    return config


def _sample_shape(config: Mapping[str, Any], folder: Path) -> tuple[int, int, int]:
    channels, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if not isinstance(channels, int) or outputs not in (channels, 2 * channels):
        raise ModelError(
            f"the UNet in {folder} takes {channels} channels and returns {outputs}: expected as many, or twice as many "
            "where it predicts the variance too"
        )
    size = config.get("sample_size")
    sides = tuple(size) if isinstance(size, list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"the UNet in {folder} has sample_size {size!r}: set it in unet/config.json, such as 32")
    return channels, sides[0], sides[1]


def _count_classes(config: Mapping[str, Any], folder: Path) -> int:
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind is not None:
        raise ModelError(f"the UNet in {folder} has class_embed_type {kind!r}: only plain class labels can be used")
    return 0 if count is None else int(count)


def weights_variant(folder: Path) -> str | None:
    """Which weights to load: the plain ones if there, else the only variant there is, such as "fp16"."""
    found = sorted(path.name for path in folder.glob(f"{WEIGHTS}*.safetensors*"))
    if f"{WEIGHTS}.safetensors" in found or f"{WEIGHTS}.safetensors.index.json" in found:
        return None
    variants = sorted({name.split(".")[1].split("-")[0] for name in found if name.count(".") > 1})
    if variants:
        return variants[0]
    pickled = [path.name for path in folder.glob("*.bin")]
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are read: load the "
            "pipeline with diffusers and save it again with safe_serialization=True"
        )
    raise ModelError(f"{folder} has no weights: expected {WEIGHTS}.safetensors beside config.json")


def load_any_pipeline(folder: str | Path, *, device: str | None = None, dtype: str | None = None) -> Any:
    """The diffusers pipeline of a local folder: safetensors only, no downloads, none of the folder's code is run.

    `dtype` defaults to float32 on a CPU, elsewhere to float16 for a UNet and bfloat16 for a transformer. Raises
    `ModelError` for a folder that is not a pipeline, or that diffusers cannot load.
    """
    folder, place = Path(folder), pick_device(device)
    index = check_index(folder)
    parts = [name for name in DENOISERS if (folder / name).is_dir()]
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"the dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    usual = torch.float32 if place.type == "cpu" else torch.float16 if "unet" in parts else torch.bfloat16
    variant = weights_variant(folder / parts[0]) if parts else None
    how = {"variant": variant, "torch_dtype": usual if dtype is None else DTYPES[dtype]}
    return _from_pretrained("DiffusionPipeline", folder, index.get("_class_name", "pipeline"), **how).to(place)


def silence() -> None:
    """Silences progress bars and advice of diffusers and transformers while pipelines are loaded."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
