"""Local diffusers folders: what loads, equality with the UNet itself, and a clear word on what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from olss_fast.adapters.diffusers import load_pipeline
from olss_fast.errors import ModelError, ScheduleError


def make_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return UNet2DModel(**{**settings, **changes})


def save_pipeline(folder: Path, unet: UNet2DModel, **options: Any) -> Path:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    DDPMPipeline(unet, scheduler).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model") / "plain", make_unet())


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain pipeline to damage."""
    return Path(shutil.copytree(plain, tmp_path / "broken"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unconditional(plain: Path) -> None:
    model = load_pipeline(plain, device="cpu")
    assert (model.shape, model.classes, model.null_class) == ((1, 8, 8), 0, None)
    assert model.schedule.prediction_type == "epsilon"
    x, timestep = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 10.5, 999.0])
    expected = make_unet().eval()(x, timestep).sample
    assert torch.equal(model.network(x, timestep), expected)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_class_conditional_with_null_class(tmp_path: Path) -> None:
    unet = make_unet(num_class_embeds=5)
    folder = save_pipeline(tmp_path / "model", unet)
    assert load_pipeline(folder, device="cpu").classes == 5
    model = load_pipeline(folder, device="cpu", null_class=4)
    assert (model.classes, model.null_class) == (4, 4)
    x, timestep, labels = torch.randn(2, 1, 8, 8), torch.full((2,), 7.0), torch.tensor([1, 4])
    expected = unet.eval()(x, timestep, class_labels=labels).sample
    assert torch.equal(model.network(x, timestep, class_labels=labels), expected)


def test_learned_variance_is_cut_off(tmp_path: Path) -> None:
    unet = make_unet(out_channels=2)
    model = load_pipeline(save_pipeline(tmp_path / "model", unet), device="cpu")
    x, timestep = torch.randn(2, 1, 8, 8), torch.full((2,), 7.0)
    assert torch.equal(model.network(x, timestep), unet.eval()(x, timestep).sample[:, :1])


def test_half_precision_variant(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model", make_unet().half(), variant="fp16")
    assert next(load_pipeline(folder, device="cpu").network.parameters()).dtype == torch.float32
    half = load_pipeline(folder, device="cpu", dtype=torch.float16)
    assert next(half.network.parameters()).dtype == torch.float16


def test_rectangular_samples(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model", make_unet(sample_size=(8, 16)))
    assert load_pipeline(folder, device="cpu").shape == (1, 8, 16)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        load_pipeline(tmp_path / "nowhere")


def test_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_pipeline(tmp_path)


def test_folder_without_weights(broken: Path) -> None:
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_pipeline(broken)


def test_pickled_weights_are_refused(broken: Path) -> None:
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="only pickled weights"):
        load_pipeline(broken)


def test_truncated_weights(broken: Path) -> None:
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(broken)


def test_weights_that_lack_a_tensor(broken: Path) -> None:
    edit(broken / "unet" / "config.json", num_class_embeds=3)
    with pytest.raises(ModelError, match=r"lack 1 tensors .* 'class_embedding.weight'"):
        load_pipeline(broken)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "only pipelines of a UNet2DModel"),
        ("model_index.json", {"unet": None}, "only pipelines of a UNet2DModel"),
        ("model_index.json", {"scheduler": [None, None]}, "without a scheduler"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "with vqvae"),
        ("unet/config.json", {"sample_size": None}, "sample_size None"),
        ("unet/config.json", {"out_channels": 3}, "takes 1 channels and returns 3"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ],
)
def test_unsupported_pipelines(broken: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(broken / file, **changes)
    with pytest.raises(ModelError, match=message):
        load_pipeline(broken)


def test_unknown_scheduler(broken: Path) -> None:
    (broken / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "KarrasVeScheduler"}')
    with pytest.raises(ScheduleError, match="KarrasVeScheduler"):
        load_pipeline(broken)


@pytest.mark.parametrize("text", ["{", "[]", "nonsense \x00"])
def test_damaged_config(broken: Path, text: str) -> None:
    (broken / "unet" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_pipeline(broken)


def test_null_class_must_be_a_label(plain: Path) -> None:
    with pytest.raises(ModelError, match="no classes"):
        load_pipeline(plain, null_class=4)
