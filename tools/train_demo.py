"""Train the embedded demo model: a class-conditional pixel UNet on MNIST and Fashion-MNIST, and what judges it.

    python tools/train_demo.py unet --data DIR --out build/demo     # about an hour on 2 cores, minutes on a GPU
    python tools/train_demo.py classifier --data DIR                # ten minutes on one core
    python tools/train_demo.py statistics --data DIR                # of the classifier's features, on test images
    python tools/train_demo.py export --out build/demo              # checkpoint -> olss_fast/demo/model
    python tools/train_demo.py evaluate --guidance-scale 2          # class agreement, Fréchet distance, a picture

`DIR` holds `mnist_train.npz` and `fashion_mnist_train*.npz`, and the same for `test`, each with `x` uint8 (N, 28, 28)
and `y` uint8 (N,).
A run killed at any moment resumes from its last checkpoint when it is started again with the same arguments.
Loss: E ||eps - eps_theta(alpha_t x0 + sigma_t eps, t, y)||^2 (Ho et al. 2020, eq. 14), t stratified over the batch,
y replaced by the null class with probability 0.1 (Ho & Salimans 2022).
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from tqdm import tqdm

from olss_fast import demo, metrics
from olss_fast.demo.convnet import Classifier

CLASSES = 20  # 0-9 digits, 10-19 garments
NULL_CLASS = CLASSES  # what the network is given as label when it is to ignore the class
CLASS_DROP = 0.1
EMA_DECAY = 0.9995

Data = Annotated[Path, typer.Option(help="Folder with the .npz files.")]
Threads = Annotated[int, typer.Option(help="CPU threads, 0 for torch's default.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def load_images(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of `split` as (N, 1, 32, 32) float32 in [-1, 1] and labels (N,) int64 in 0..19."""
    images, labels = [], []
    for offset, pattern in ((0, f"mnist_{split}*.npz"), (10, f"fashion_mnist_{split}*.npz")):
        (path,) = sorted(data.glob(pattern))
        with np.load(path) as archive:
            images.append(torch.from_numpy(archive["x"]))
            labels.append(torch.from_numpy(archive["y"]).long() + offset)
    x = torch.nn.functional.pad(torch.cat(images), (2, 2, 2, 2))[:, None]
    return x.float() / 127.5 - 1.0, torch.cat(labels)


def build_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=CLASSES + 1,
    )


def build_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
    )


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then a cosine to zero over the last 30 % of the run."""
    cooldown = max(1, int(0.3 * steps))
    progress = max(0.0, (step - (steps - cooldown)) / cooldown)
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def save_atomically(state: dict[str, object], path: Path) -> None:
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def balanced_batch(by_class: list[torch.Tensor], size: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `size` images, every class equally likely whatever its share of the data."""
    classes = torch.randint(CLASSES, (size,), generator=generator)
    uniform = torch.rand(size, generator=generator)
    drawn = zip(classes.tolist(), uniform.tolist(), strict=True)
    return torch.stack([by_class[c][int(u * len(by_class[c]))] for c, u in drawn])


@app.callback()
def main() -> None:
    """Train the embedded demo model."""


@app.command()
def unet(
    data: Data,
    out: Annotated[Path, typer.Option(help="Checkpoint and finished pipeline folder.")] = Path("build/demo"),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 5500,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 128,
    peak_lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1.5e-3,
    threads: Threads = 0,
) -> None:
    """Train the UNet and write a diffusers folder with its EMA weights in float16."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_images(data, "train")
    by_class = [torch.nonzero(labels == c).flatten() for c in range(CLASSES)]
    torch.manual_seed(0)
    model = build_unet().to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.99))
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.sqrt().to(device)
    sigmas = (1.0 - scheduler.alphas_cumprod).sqrt().to(device)

    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]

    running = float("nan")
    progress = tqdm(range(first, steps), initial=first, total=steps, mininterval=10)
    for step in progress:
        generator = torch.Generator().manual_seed(step)  # a resumed run draws what an unbroken one would have drawn
        index = balanced_batch(by_class, batch, generator)
        drop = torch.rand(batch, generator=generator) < CLASS_DROP
        stratified = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        noise = torch.randn((batch, *images.shape[1:]), generator=generator).to(device)
        x0 = images[index].to(device)
        y = torch.where(drop, NULL_CLASS, labels[index]).to(device)
        timestep = (stratified * 1000).long().clamp(max=999).to(device)
        noisy = alphas[timestep].view(-1, 1, 1, 1) * x0 + sigmas[timestep].view(-1, 1, 1, 1) * noise

        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps=steps, peak=peak_lr)
        with torch.autocast(device, torch.bfloat16):
            predicted = model(noisy, timestep, class_labels=y, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - decay)
        running = loss.item() if math.isnan(running) else 0.99 * running + 0.01 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict()}
            save_atomically({**state, "step": step + 1}, checkpoint)
    write_pipeline(ema, out / "pipeline")


def write_pipeline(unet: UNet2DModel, folder: Path) -> None:
    """A diffusers folder: `unet/` in float16 safetensors, and the scheduler that the 100-step teacher is run with."""
    from diffusers import DDIMPipeline, DDIMScheduler

    scheduler = DDIMScheduler.from_config(build_scheduler().config, timestep_spacing="trailing", set_alpha_to_one=True)
    DDIMPipeline(copy.deepcopy(unet).cpu().half(), scheduler).save_pretrained(folder)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder with the checkpoint that `unet` wrote.")] = Path("build/demo"),
    model: Annotated[Path, typer.Option(help="Diffusers folder to write.")] = demo.MODEL_FOLDER,
) -> None:
    """Turn the newest checkpoint's EMA weights into the diffusers folder of the package."""
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    unet = build_unet()
    unet.load_state_dict(state["ema"])
    write_pipeline(unet, model)
    print(f"step {state['step']} -> {model}")


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 2 pixels, blur a little, add a little noise: a generated image is judged by what it shows."""
    shift_y, shift_x = torch.randint(0, 5, (2,), generator=generator).tolist()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    shifted = padded[..., shift_y : shift_y + 32, shift_x : shift_x + 32]
    blur = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])).view(1, 1, 3, 3) / 16.0
    amount = (torch.rand((len(images), 1, 1, 1), generator=generator) - 0.5).clamp(min=0.0)
    blurred = shifted + amount * (torch.nn.functional.conv2d(shifted, blur, padding=1) - shifted)
    level = 0.15 * torch.rand((len(images), 1, 1, 1), generator=generator)
    return blurred + level * torch.randn(images.shape, generator=generator)


@app.command()
def classifier(
    data: Data,
    model: Annotated[Path, typer.Option(help="Folder to write the classifier to.")] = demo.MODEL_FOLDER,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1800,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 128,
    threads: Threads = 0,
) -> None:
    """Train the classifier on balanced classes, write it in float16, and tell its accuracy on the test images."""
    if threads:
        torch.set_num_threads(threads)
    images, labels = load_images(data, "train")
    by_class = [torch.nonzero(labels == c).flatten() for c in range(CLASSES)]
    torch.manual_seed(0)
    module = Classifier()
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), mininterval=10):
        generator = torch.Generator().manual_seed(step)
        index = balanced_batch(by_class, batch, generator)
        logits, _ = module(augment(images[index], generator))
        loss = torch.nn.functional.cross_entropy(logits, labels[index], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        decay.step()
    model.mkdir(parents=True, exist_ok=True)
    floating = {name: value.half() for name, value in module.state_dict().items() if value.is_floating_point()}
    save_file(floating, model / demo.CLASSIFIER_FILE)
    module.load_state_dict(floating)  # judge what was written, not what was rounded
    images, labels = load_images(data, "test")
    right = torch.from_numpy(metrics.predict_classes(images, module.eval())) == labels
    digits, garments = right[labels < 10].float().mean(), right[labels >= 10].float().mean()
    print(f"test accuracy: digits {digits:.4f}, garments {garments:.4f}")


@app.command()
def statistics(
    data: Data, model: Annotated[Path, typer.Option(help="Folder to write the statistics to.")] = demo.MODEL_FOLDER
) -> None:
    """Mean and covariance of the classifier's features on all test images, weighted so that classes count alike."""
    images, labels = load_images(data, "test")
    weights = 1.0 / labels.bincount()[labels]
    features = metrics.extract_features(images, demo.classifier("cpu"))
    reference = metrics.feature_statistics(features, weights)
    about = {"images": f"test, {len(images)}, classes weighted alike", "features": "demo classifier, 64"}
    save_arrays(reference._asdict(), model / demo.STATISTICS_FILE, metadata=about)
    print(f"{len(images)} images -> {model / demo.STATISTICS_FILE}")


def teacher_samples(labels: torch.Tensor, *, guidance_scale: float, steps: int, seed: int) -> torch.Tensor:
    """DDIM samples (P, 1, 32, 32) of the package's model for `labels` (P,), with diffusers' own scheduler."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(demo.MODEL_FOLDER / "scheduler")
    scheduler.set_timesteps(steps)
    model = demo.load()
    noise = torch.randn((len(labels), *model.shape), generator=torch.Generator().manual_seed(seed))
    samples = []
    for x, y in tqdm(list(zip(noise.split(50), labels.split(50), strict=True)), desc=f"guidance {guidance_scale:g}"):
        both = torch.cat([torch.full_like(y, model.null_class), y])
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                doubled = model.network(x.repeat(2, 1, 1, 1), timestep.expand(2 * len(y)), class_labels=both)
            unconditional, conditional = doubled.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            x = scheduler.step(guided, timestep, x).prev_sample
        samples.append(x)
    return torch.cat(samples)


@app.command()
def evaluate(
    guidance_scale: Annotated[list[float], typer.Option(help="May be given several times.")] = (demo.GUIDANCE_SCALE,),
    samples: Annotated[int, typer.Option(help="Images, in equal numbers of every class.")] = 400,
    steps: Annotated[int, typer.Option(help="Steps of DDIM.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    picture: Annotated[Path, typer.Option(help="Grid of the first samples, 20 a row.")] = Path(
        "build/demo/samples.png"
    ),
    threads: Threads = 0,
) -> None:
    """Class agreement and Fréchet distance of the package's model at some guidance scales, and a picture of each."""
    from PIL import Image

    if threads:
        torch.set_num_threads(threads)
    labels = torch.arange(samples) % CLASSES
    judge = demo.classifier("cpu")
    for scale in guidance_scale:
        images = teacher_samples(labels, guidance_scale=scale, steps=steps, seed=seed)
        agrees = metrics.predict_classes(images, judge) == labels.numpy()
        distance = metrics.frechet_distance(metrics.extract_features(images, judge), demo.reference_statistics())
        print(f"guidance {scale:g}: agreement {agrees.mean():.4f}, Fréchet {distance:.3f}, std {images.std():.4f}")
        print("  by class:", {c: round(float(agrees[labels.numpy() == c].mean()), 2) for c in range(CLASSES)})
        rows = images[: samples - samples % CLASSES][:200].clamp(-1, 1).view(-1, CLASSES, 32, 32)
        pixels = ((rows + 1.0) * 127.5).byte().permute(0, 2, 1, 3).reshape(-1, CLASSES * 32)
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(picture.with_stem(f"{picture.stem}-{scale:g}"))


if __name__ == "__main__":
    app()
