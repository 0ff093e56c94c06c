"""The embedded model: a class-conditional pixel diffusion model that comes with the package, and its classifier.

    model = olss_fast.demo.load()
    raw = model.network(x, timestep, class_labels=y)          # (B, 1, 32, 32) -> predicted noise (B, 1, 32, 32)
    images = olss_fast.demo.pipeline()([3, 17]).images        # the same as a pipeline of diffusers

Classes 0-9 are MNIST's digits, 10-19 Fashion-MNIST's garments, `null_class` is the label for "any" that guidance
needs. Everything is read from the package's files; nothing is downloaded. The folder `model/` beside this file is
an ordinary diffusers pipeline (`DDIMPipeline`); its README.md is the model card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from olss_fast.adapters.diffusers.folders import UNetNetwork, read_unet
from olss_fast.demo.convnet import Classifier
from olss_fast.errors import ModelError
from olss_fast.metrics import FeatureStatistics
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.device import pick_device, plain_defaults

if TYPE_CHECKING:
    from olss_fast.demo.class_pipeline import ClassPipeline

MODEL_FOLDER = Path(__file__).parent / "model"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
STATISTICS_FILE = "reference_statistics.safetensors"

CLASS_NAMES = (
    *(f"digit {i}" for i in range(10)),
    *("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
CLASSES = len(CLASS_NAMES)
GUIDANCE_SCALE = 1.5
SHAPE = (1, 32, 32)

__all__ = ["CLASSES", "CLASS_NAMES", "GUIDANCE_SCALE", "MODEL_FOLDER", "DemoModel", "classifier", "load"]
__all__ += ["pipeline", "reference_statistics"]


@dataclass(frozen=True)
class DemoModel:
    """The embedded network with its schedule, sample shape and classes.

    `network(x, timestep, class_labels=y)`: x (B, *shape), timestep (B,) in 0..999 (need not be whole), y (B,) int64.
    """

    network: Callable[..., torch.Tensor]
    schedule: NoiseSchedule
    classes: int = CLASSES
    null_class: int = CLASSES
    guidance_scale: float = GUIDANCE_SCALE
    shape: tuple[int, int, int] = SHAPE
    class_names: tuple[str, ...] = CLASS_NAMES


def load(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DemoModel:
    """The embedded model on `device` (default: a GPU if there is one) in `dtype` (default: float32).

    Raises `ModelError` if a file of the model is missing or unreadable, `InputError` for an unavailable device.
    """
    place = pick_device(device)
    with _naming(MODEL_FOLDER / UNET_FILE) as path:
        network = UNetNetwork(read_unet(path.parent, device=place, dtype=dtype or torch.float32))
    with _naming(MODEL_FOLDER / "scheduler" / "scheduler_config.json") as path:
        schedule = NoiseSchedule.from_diffusers(json.loads(path.read_text()))
    return DemoModel(network=network.eval().requires_grad_(False), schedule=schedule)


def pipeline(device: torch.device | str | None = None) -> ClassPipeline:
    """The embedded model as a diffusers pipeline: `pipe([3, 17], num_inference_steps=20).images`. Errors as in `load`.

    Once saved, load it with `ClassPipeline.from_pretrained(folder)`; `DiffusionPipeline.from_pretrained` needs
    custom_pipeline=olss_fast.demo.class_pipeline.__file__ and trust_remote_code=True.
    """
    place = pick_device(device)
    with _naming(MODEL_FOLDER / UNET_FILE) as path:
        from diffusers import DDIMScheduler

        from olss_fast.demo.class_pipeline import ClassPipeline

        scheduler: Any = DDIMScheduler
        parts = read_unet(path.parent, device=place), scheduler.from_pretrained(MODEL_FOLDER / "scheduler")
        return ClassPipeline(*parts)


def classifier(device: torch.device | str | None = None) -> Classifier:
    """The classifier: images (B, 1, 32, 32) in [-1, 1] -> (logits (B, 20), features (B, 64)). Errors as in `load`."""
    place = pick_device(device)
    with _naming(MODEL_FOLDER / CLASSIFIER_FILE) as path, plain_defaults():
        module = Classifier()
        module.load_state_dict(load_file(path))
    return module.eval().requires_grad_(False).to(place)


def reference_statistics() -> FeatureStatistics:
    """Mean (64,) and covariance (64, 64) of the classifier's features on real test images, with equal class weights.

    For `metrics.frechet_distance`. Raises `ModelError` if the file is missing or unreadable.
    """
    with _naming(MODEL_FOLDER / STATISTICS_FILE) as path:
        arrays = load_arrays(path)
        return FeatureStatistics(arrays["mean"], arrays["covariance"])


@contextmanager
def _naming(path: Path) -> Iterator[Path]:
    """Turn any error while reading `path` into a `ModelError` that names it."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: reinstall olss_fast, or make it with tools/train_demo.py")
    try:
        yield path
    except ImportError as error:
        raise ModelError(f"the embedded model needs a package that is not installed: {error}") from error
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {error}; reinstall olss_fast") from error
