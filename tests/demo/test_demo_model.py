"""The embedded model: its files, what it says, and that it draws what it is asked to draw."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import olss_fast
from olss_fast import demo, metrics
from olss_fast.errors import InputError, ModelError


@pytest.fixture(scope="module")
def model() -> demo.DemoModel:
    return demo.load("cpu")


@pytest.fixture(scope="module")
def teacher(model: demo.DemoModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of every class by 12 steps of DDIM, written out here so that no other part of the package helps."""
    labels = torch.arange(2 * model.classes) % model.classes
    x = torch.randn((len(labels), *model.shape), generator=torch.Generator().manual_seed(0))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    products = torch.cat([(1.0 - betas).cumprod(0), torch.ones(1, dtype=torch.float64)])  # [-1] is the clean end
    both = torch.cat([torch.full_like(labels, model.null_class), labels])
    times = [*torch.linspace(999, 0, 13)[:-1].round().long().tolist(), -1]
    for now, after in pairwise(times):
        raw = model.network(x.repeat(2, 1, 1, 1), torch.full((len(both),), float(now)), class_labels=both)
        unconditional, conditional = raw.chunk(2)
        noise = unconditional + model.guidance_scale * (conditional - unconditional)
        clean = (x - (1.0 - products[now]).sqrt().float() * noise) / products[now].sqrt().float()
        x = products[after].sqrt().float() * clean + (1.0 - products[after]).sqrt().float() * noise
    return x, labels


def test_files_are_within_their_budgets() -> None:
    sizes = {path.name: path.stat().st_size for path in demo.MODEL_FOLDER.rglob("*") if path.is_file()}
    assert sizes["diffusion_pytorch_model.safetensors"] <= 5e6
    assert sizes[demo.CLASSIFIER_FILE] <= 1e6
    assert "README.md" in sizes


def test_network_is_what_the_card_says(model: demo.DemoModel) -> None:
    assert isinstance(model.network, torch.nn.Module)
    parameters = list(model.network.parameters())
    assert 1e6 <= sum(p.numel() for p in parameters) <= 2e6
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not any(p.requires_grad for p in parameters)
    assert (model.classes, model.null_class, model.shape) == (20, 20, (1, 32, 32))
    assert len(set(model.class_names)) == 20


def test_network_answers_alike_alone_and_in_a_batch_at_any_time(model: demo.DemoModel) -> None:
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(1))
    timestep, labels = torch.tensor([999.0, 437.25, 0.0]), torch.tensor([3, 17, 20])
    together = model.network(x, timestep, class_labels=labels)
    assert together.shape == x.shape
    assert together.isfinite().all()
    for i in range(3):
        alone = model.network(x[i : i + 1], timestep[i : i + 1], class_labels=labels[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_schedule_is_stable_diffusions(model: demo.DemoModel) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.sqrt(np.cumprod(1.0 - betas))
    times = np.array([0.0, 1.0, 500.0, 999.0])
    np.testing.assert_allclose(model.schedule.alpha(times), alphas[times.astype(int)], rtol=1e-6)
    assert model.schedule.prediction_type == "epsilon"


def test_folder_is_a_diffusers_pipeline(model: demo.DemoModel) -> None:
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(demo.MODEL_FOLDER, local_files_only=True).to(torch.float32)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.scheduler.final_alpha_cumprod == 1.0
    assert not pipeline.scheduler.config.clip_sample
    x, labels = torch.zeros(1, *model.shape), torch.tensor([4])
    expected = pipeline.unet(x, 500, class_labels=labels).sample
    torch.testing.assert_close(model.network(x, torch.tensor([500.0]), class_labels=labels), expected)


def test_samples_show_the_class_asked_for(teacher: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = teacher
    assert metrics.class_agreement(images, labels, demo.classifier("cpu")) >= 0.85
    assert images.abs().max() < 1.5


def test_samples_are_closer_to_real_images_than_noise_is(teacher: tuple[torch.Tensor, torch.Tensor]) -> None:
    judge = demo.classifier("cpu")
    reference = demo.reference_statistics()
    distance = metrics.frechet_distance(metrics.extract_features(teacher[0], judge), reference)
    noise = torch.randn(teacher[0].shape, generator=torch.Generator().manual_seed(2))
    assert 5 * distance < metrics.frechet_distance(metrics.extract_features(noise, judge), reference)


def test_reference_statistics_are_moments() -> None:
    mean, covariance = demo.reference_statistics()
    assert mean.shape == (64,)
    assert covariance.shape == (64, 64)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(covariance).min() > 0.0


def test_classifier_clamps_and_gives_features() -> None:
    judge = demo.classifier("cpu")
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    logits, features = judge(images)
    assert logits.shape == (2, 20)
    assert features.shape == (2, judge.num_features) == (2, 64)
    torch.testing.assert_close(judge(images.clamp(-1, 1))[1], features)


@pytest.fixture
def copied_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL_FOLDER, folder)
    monkeypatch.setattr(demo, "MODEL_FOLDER", folder)
    return folder


CALLS = {
    demo.UNET_FILE: demo.load,
    "unet/config.json": demo.load,
    "scheduler/scheduler_config.json": demo.load,
    demo.CLASSIFIER_FILE: demo.classifier,
    demo.STATISTICS_FILE: demo.reference_statistics,
}


@pytest.mark.parametrize("file", CALLS)
def test_missing_file_is_named(copied_folder: Path, file: str) -> None:
    (copied_folder / file).unlink()
    with pytest.raises(ModelError, match=Path(file).stem):
        CALLS[file]()


@pytest.mark.parametrize("file", CALLS)
def test_truncated_file_is_named(copied_folder: Path, file: str) -> None:
    content = (copied_folder / file).read_bytes()
    (copied_folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"cannot be read.*reinstall"):
        CALLS[file]()


def test_weights_of_another_network_are_refused(copied_folder: Path) -> None:
    path = copied_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_class_embeds": 5}))
    with pytest.raises(ModelError, match="cannot be read"):
        demo.load("cpu")


@pytest.mark.parametrize("call", [demo.load, demo.classifier])
def test_device_that_is_not_there_is_named(call: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match="'cuda:99'"):
        call("cuda:99")


def test_the_pipeline_samples_what_the_model_does() -> None:
    pipe = demo.pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.tensor([3, 17])
    found = pipe([3, 17], 3, generator=torch.Generator().manual_seed(0), output_type="latent").images
    noise = torch.randn(2, *demo.SHAPE, generator=torch.Generator().manual_seed(0))
    how = {"conditioning": {"class_labels": labels}, "unconditional": {"class_labels": 20}, "guidance_scale": 1.5}
    expected = olss_fast.sample(demo.load("cpu").network, olss_fast.capture(pipe.scheduler, 3), noise, **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # three evaluations in float32
    assert pipe(3, 1).images[0].size == (32, 32)
    for wrong in (20, -1, [], 1.5):
        with pytest.raises(InputError, match="expected whole numbers from 0 to 19"):
            pipe(wrong)


def test_the_pipeline_can_be_made_again() -> None:
    """Importing a module of that name would put it in the function's place."""
    assert type(demo.pipeline("cpu")) is type(demo.pipeline("cpu"))


@pytest.mark.filterwarnings("ignore")
def test_a_saved_pipeline_is_loaded_by_those_who_do_not_know_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    from olss_fast.demo import class_pipeline

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    pipe = demo.pipeline("cpu")
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=class_pipeline.__file__, trust_remote_code=True
    )
    found = [
        each(3, 1, generator=torch.Generator().manual_seed(0), output_type="latent").images for each in (pipe, again)
    ]
    assert torch.equal(*found)


def test_the_folder_says_which_label_is_none() -> None:
    from olss_fast.adapters.diffusers import load_pipeline

    model = load_pipeline(demo.MODEL_FOLDER, device="cpu")
    assert (model.classes, model.null_class) == (demo.CLASSES, demo.CLASSES)
