"""How far samples lie from a reference: per sample, and as distributions.

A *sampler* is judged against its teacher from the same noise: `rmse` and `psnr` give one figure per sample, `summarise`
their mean and median with bootstrap intervals (the errors are heavy-tailed, so look at both). A *distribution* of
samples is judged by `frechet_distance` on the features of any extractor, and by `class_agreement`.

    features = metrics.extract_features(images, olss_fast.demo.classifier())
    metrics.frechet_distance(features, olss_fast.demo.reference_statistics())     # to real images
    metrics.frechet_distance(features, metrics.extract_features(teacher, olss_fast.demo.classifier()))

With Inception-v3's 2048 pooled features the same call is the true FID (Heusel et al. 2017). Any callable works:

    from torchmetrics.image.fid import NoTrainInceptionV3                         # brings the weights you supply
    inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="weights.pth")
    def extractor(images):                                                        # (B, 3, H, W) in [-1, 1]
        return inception((images.clamp(-1, 1) * 127.5 + 127.5).byte())
    metrics.frechet_distance(metrics.extract_features(images, extractor), metrics.extract_features(real, extractor))

Images are numpy arrays or torch tensors of any dtype and device, samples along the first axis. All arithmetic is
float64. Everything raises `InputError` for shapes that do not fit, too few samples and values that are not finite.

torchmetrics has these metrics too, and the tests compare ours with it. Its Fréchet distance takes neither stored nor
weighted statistics and its PSNR rounds to float32, so calling it would take more code than these formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from olss_fast.errors import InputError

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = ArrayLike | torch.Tensor
    Moments: TypeAlias = tuple[ArrayLike, ArrayLike] | Array  # mean and covariance, or features
    Extractor: TypeAlias = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]

Floats: TypeAlias = NDArray[np.float64]


class FeatureStatistics(NamedTuple):
    """The Gaussian fitted to a set of features: `mean` (D,) and `covariance` (D, D)."""

    mean: Floats
    covariance: Floats


@dataclass(frozen=True)
class Summary:
    """Mean and median of per-sample figures, each with its bootstrap interval."""

    samples: int
    mean: float
    mean_interval: tuple[float, float]
    median: float
    median_interval: tuple[float, float]


def rmse(sample: Array, reference: Array) -> Floats:
    """Root mean square difference of each sample to its reference: (P, ...) and (P, ...) -> (P,)."""
    first, second = _array(sample, "sample"), _array(reference, "reference")
    if first.shape != second.shape or first.ndim < 2:
        raise InputError(
            f"sample has shape {first.shape} and reference {second.shape}: both must be the same (P, ...), "
            "P samples from the same noises in the same order"
        )
    axes = tuple(range(1, first.ndim))
    return np.asarray(np.sqrt(np.mean(np.square(first - second), axis=axes)), dtype=np.float64)


def psnr(sample: Array, reference: Array, *, data_range: float = 2.0) -> Floats:
    """Peak signal-to-noise ratio of each sample, 20 log10(data_range / rmse) in dB: (P, ...) -> (P,).

    `data_range` is the width of the pixels' interval, 2 for [-1, 1]. Equal images give `inf`.
    """
    if not data_range > 0.0:
        raise InputError(f"data_range is {data_range}; it must be the positive width of the pixels' interval")
    with np.errstate(divide="ignore"):
        return np.asarray(20.0 * np.log10(data_range / rmse(sample, reference)), dtype=np.float64)


def bootstrap_interval(
    values: Array, *, statistic: Callable[..., Any] = np.mean, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of `statistic` over the samples `values` (P,), P >= 2.

    `statistic(values, axis=...)` is any numpy reduction. The same `seed` gives the same interval.
    """
    data = _array(values, "values")
    if data.ndim != 1 or len(data) < 2:
        raise InputError(f"values has shape {data.shape}: an interval needs at least 2 values in one dimension")
    if not 0.0 < level < 1.0 or resamples < 1:
        raise InputError(f"level is {level} and resamples {resamples}: expected 0 < level < 1 and resamples >= 1")
    # scipy.stats.bootstrap does the same, but importing scipy.stats alone takes a second.
    drawn = np.random.default_rng(seed).integers(len(data), size=(resamples, len(data)))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(statistic(data[drawn], axis=-1), (tail, 1.0 - tail))
    return float(low), float(high)


def summarise(values: Array, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Summary:
    """Mean and median of per-sample figures `values` (P,), P >= 2, with bootstrap intervals."""
    data = _array(values, "values")
    intervals = [
        bootstrap_interval(data, statistic=statistic, level=level, resamples=resamples, seed=seed)
        for statistic in (np.mean, np.median)
    ]
    return Summary(len(data), float(data.mean()), intervals[0], float(np.median(data)), intervals[1])


def feature_statistics(features: Array, weights: Array | None = None) -> FeatureStatistics:
    """Mean (D,) and unbiased covariance (D, D) of `features` (N, D), N >= 2.

    `weights` (N,), if given, are relative importances of the images: with the reciprocal of the size of an image's
    class, unequal classes count alike.
    """
    data = _array(features, "features")
    if data.ndim != 2 or len(data) < 2:
        raise InputError(f"features has shape {data.shape}: expected (N, D) with at least 2 images")
    importance = None if weights is None else _array(weights, "weights")
    if importance is not None and (importance.shape != data.shape[:1] or not importance.min() > 0.0):
        raise InputError(f"weights has shape {importance.shape}: expected {data.shape[:1]}, all positive")
    mean = np.average(data, axis=0, weights=importance)
    covariance = np.atleast_2d(np.cov(data, rowvar=False, aweights=importance))
    return FeatureStatistics(mean, covariance)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians with these moments (Dowson & Landau 1982).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2. Each side is features (N, D) or, as a tuple, the mean
    (D,) and covariance (D, D). The estimate from N images is biased upward by O(1/N): compare at equal N only.

    The trace of the root is taken as the nuclear norm of S1^1/2 S2^1/2, which needs no root of a non-symmetric
    matrix and stays exact for singular covariances (fewer images than features).
    """
    (mean1, covariance1), (mean2, covariance2) = _moments(first, "first"), _moments(second, "second")
    if mean1.shape != mean2.shape:
        raise InputError(f"first has {mean1.size} features and second {mean2.size}: use the same extractor for both")
    overlap = np.linalg.norm(_root(covariance1) @ _root(covariance2), "nuc")
    spread = np.trace(covariance1) + np.trace(covariance2) - 2.0 * overlap
    return max(0.0, float(np.sum(np.square(mean1 - mean2)) + spread))


def extract_features(images: Array, extractor: Extractor, *, batch_size: int = 256) -> Floats:
    """Features (P, D) of `images` (P, C, H, W), `batch_size` images at a time and without gradients.

    `extractor(batch)` returns (B, D), or a tuple that ends with it, as `demo.classifier()` does.
    """
    return _array(_run(images, extractor, batch_size, pick=-1), "the extractor's output")


def predict_classes(images: Array, classifier: Extractor, *, batch_size: int = 256) -> NDArray[np.int64]:
    """Most likely class (P,) of `images` (P, C, H, W); `classifier(batch)` returns logits, or a tuple of them first."""
    logits = _array(_run(images, classifier, batch_size, pick=0), "the classifier's output")
    return np.asarray(logits.argmax(axis=-1), dtype=np.int64)


def class_agreement(images: Array, labels: Array, classifier: Extractor, *, batch_size: int = 256) -> float:
    """Share of `images` (P, C, H, W) that the classifier assigns to their requested class, `labels` (P,)."""
    predicted = predict_classes(images, classifier, batch_size=batch_size)
    asked = _array(labels, "labels")
    if asked.shape != predicted.shape:
        raise InputError(f"labels has shape {asked.shape} for {len(predicted)} images: expected ({len(predicted)},)")
    return float(np.mean(predicted == asked))


def _run(images: Array, module: Extractor, batch_size: int, *, pick: int) -> torch.Tensor:
    """The output of `module` on all images, on the module's device if it has parameters; `pick` indexes a tuple."""
    import torch

    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    tensor = images.detach() if isinstance(images, torch.Tensor) else torch.as_tensor(images, device="cpu")
    if tensor.ndim < 2 or not len(tensor):
        raise InputError(f"images has shape {tuple(tensor.shape)}: expected (P, C, H, W) with P >= 1")
    parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
    device = tensor.device if parameter is None else parameter.device
    outputs = []
    with torch.no_grad():
        for batch in torch.split(tensor, batch_size):
            output = module(batch.to(device))
            outputs.append((output[pick] if isinstance(output, tuple) else output).double().cpu())
    result = torch.cat(outputs)
    if result.ndim != 2 or len(result) != len(tensor):
        raise InputError(f"the extractor returned {tuple(result.shape)} for {len(tensor)} images: expected (P, D)")
    return result


def _moments(value: Any, name: str) -> FeatureStatistics:
    if not isinstance(value, tuple):
        return feature_statistics(value)
    if len(value) != 2:
        raise InputError(f"{name} is a tuple of {len(value)}: expected (mean, covariance)")
    mean, covariance = _array(value[0], f"{name} mean"), _array(value[1], f"{name} covariance")
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise InputError(f"{name} has mean {mean.shape} and covariance {covariance.shape}: expected (D,) and (D, D)")
    return FeatureStatistics(mean, covariance)


def _root(covariance: Floats) -> Floats:
    """Symmetric square root; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2.0)
    return np.asarray((vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T, dtype=np.float64)


def _array(value: Any, name: str) -> Floats:
    """`value` as a finite float64 array; torch tensors may have any dtype and device."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds {np.count_nonzero(~np.isfinite(array))} values that are not finite")
    return array
