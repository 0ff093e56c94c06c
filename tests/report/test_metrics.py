"""Metrics against closed forms, against torchmetrics and scipy, and what bad input gets."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from olss_fast import metrics
from olss_fast.errors import InputError

RANDOM = np.random.default_rng(0)


def random_covariance(size: int, rank: int | None = None) -> np.ndarray:
    factor = RANDOM.standard_normal((size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def test_rmse_and_psnr_are_per_sample() -> None:
    reference = RANDOM.standard_normal((4, 1, 3, 5))
    offsets = np.array([0.0, 0.1, 0.5, 2.0])
    sample = reference + offsets[:, None, None, None]
    np.testing.assert_allclose(metrics.rmse(sample, reference), offsets, atol=1e-15)
    np.testing.assert_allclose(metrics.psnr(sample, reference)[1:], 20 * np.log10(2.0 / offsets[1:]), rtol=1e-13)
    assert metrics.psnr(sample, reference)[0] == np.inf
    np.testing.assert_allclose(
        metrics.psnr(sample, reference, data_range=1.0)[1:], 20 * np.log10(1.0 / offsets[1:]), rtol=1e-13
    )


def test_psnr_equals_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    first, second = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    expected = functional.peak_signal_noise_ratio(first, second, data_range=2.0, reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(metrics.psnr(first, second), expected.numpy(), rtol=1e-6)  # theirs is float32 inside


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_tensors_of_any_dtype(dtype: torch.dtype) -> None:
    zero = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    np.testing.assert_array_equal(metrics.rmse(zero + 0.5, zero), [0.5, 0.5])


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).exponential(size=(300, 60))
    intervals = np.array([metrics.bootstrap_interval(row, level=0.9, resamples=400) for row in draws])
    covered = np.mean((intervals[:, 0] <= 1.0) & (intervals[:, 1] >= 1.0))
    assert 0.82 <= covered <= 0.95  # binomial standard error is 0.017; a skewed law loses a few per cent


def test_bootstrap_interval_is_reproducible_and_exact_for_constants() -> None:
    values = RANDOM.standard_normal(50)
    assert metrics.bootstrap_interval(values, seed=3) == metrics.bootstrap_interval(values, seed=3)
    assert metrics.bootstrap_interval(values, seed=3) != metrics.bootstrap_interval(values, seed=4)
    assert metrics.bootstrap_interval([2.5] * 5, statistic=np.median) == (2.5, 2.5)


def test_summary() -> None:
    values = np.append(RANDOM.uniform(size=99), 50.0)
    summary = metrics.summarise(values)
    assert summary.samples == 100
    assert summary.mean == pytest.approx(values.mean())
    assert summary.median == pytest.approx(np.median(values))
    for figure, (low, high) in ((summary.mean, summary.mean_interval), (summary.median, summary.median_interval)):
        assert low < figure < high
    assert np.ptp(summary.mean_interval) > 3 * np.ptp(summary.median_interval)  # the outlier moves the mean alone


def test_weighted_statistics_equal_those_of_repeated_rows() -> None:
    data = RANDOM.standard_normal((6, 3))
    repeats = np.array([1, 2, 3, 1, 1, 4])
    weighted = metrics.feature_statistics(data, weights=repeats)
    repeated = np.repeat(data, repeats, axis=0)
    np.testing.assert_allclose(weighted.mean, repeated.mean(axis=0), atol=1e-14)
    biased = weighted.covariance * (1.0 - np.sum((repeats / repeats.sum()) ** 2))
    np.testing.assert_allclose(biased, np.cov(repeated, rowvar=False, bias=True), atol=1e-14)


def test_frechet_distance_of_commuting_gaussians_is_closed_form() -> None:
    basis = np.linalg.qr(RANDOM.standard_normal((7, 7)))[0]
    first, second = RANDOM.uniform(0.1, 4.0, (2, 7))
    first[0] = 0.0
    shift = RANDOM.standard_normal(7)
    distance = metrics.frechet_distance((np.zeros(7), basis * first @ basis.T), (shift, basis * second @ basis.T))
    assert distance == pytest.approx(shift @ shift + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2), rel=1e-7)


def test_frechet_distance_equals_scipys_matrix_root() -> None:
    first, second = random_covariance(12), random_covariance(12)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = np.trace(first + second - 2.0 * root)
    assert metrics.frechet_distance((np.zeros(12), first), (np.zeros(12), second)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("images", [40, 200], ids=["singular covariance", "full rank"])
def test_frechet_distance_equals_torchmetrics(images: int) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    torch.manual_seed(0)
    real, fake = torch.randn(300, 1, 8, 8).double(), 0.3 + 1.2 * torch.randn(images, 1, 8, 8).double()
    metric = fid.FrechetInceptionDistance(feature=Features())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    distance = metrics.frechet_distance(
        metrics.extract_features(fake, Features(), batch_size=33), metrics.extract_features(real, Features())
    )
    # torchmetrics takes roots of eigenvalues of a non-symmetric product: those that should be 0 come out as 1e-8.
    assert distance == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_is_a_squared_metric() -> None:
    features = RANDOM.standard_normal((50, 8))
    other = RANDOM.standard_normal((60, 8)) + 1.0
    assert metrics.frechet_distance(features, features) <= 1e-12
    there, back = metrics.frechet_distance(features, other), metrics.frechet_distance(other, features)
    assert there == pytest.approx(back, rel=1e-12)
    assert metrics.frechet_distance(features, features + 2.0) == pytest.approx(8 * 4.0, rel=1e-12)


def test_class_agreement_and_features_with_custom_callables() -> None:
    images = torch.eye(4).repeat(5, 1).view(20, 4, 1, 1)
    labels = np.arange(20) % 4

    def logits_and_features(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.flatten(1), -batch.flatten(1)[:, :2]

    assert metrics.class_agreement(images, labels, logits_and_features, batch_size=3) == 1.0
    assert metrics.class_agreement(images.numpy(), (labels + 1) % 4, lambda batch: batch.flatten(1)) == 0.0
    features = metrics.extract_features(images, logits_and_features, batch_size=7)
    np.testing.assert_array_equal(features, -images.flatten(1)[:, :2].numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.rmse(np.zeros((2, 3)), np.zeros((3, 3))), r"\(2, 3\).*\(3, 3\)"),
        (lambda: metrics.rmse([1.0, np.nan], [1.0, 2.0]), "1 values that are not finite"),
        (lambda: metrics.rmse(["a"], ["b"]), "not an array of numbers"),
        (lambda: metrics.psnr(np.zeros((2, 3)), np.zeros((2, 3)), data_range=0.0), "data_range is 0"),
        (lambda: metrics.bootstrap_interval([1.0]), "at least 2"),
        (lambda: metrics.bootstrap_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: metrics.feature_statistics(np.zeros(3)), r"expected \(N, D\)"),
        (lambda: metrics.feature_statistics(np.zeros((3, 2)), weights=[1.0, 0.0, 1.0]), "all positive"),
        (lambda: metrics.frechet_distance(np.zeros((3, 2)), np.zeros((3, 4))), "same extractor"),
        (lambda: metrics.frechet_distance((np.zeros(3), np.eye(2)), np.zeros((3, 3))), r"\(D,\) and \(D, D\)"),
        (lambda: metrics.frechet_distance((1, 2, 3), np.zeros((3, 3))), "tuple of 3"),
        (lambda: metrics.class_agreement(np.eye(3), [0, 1], lambda x: x), r"expected \(3,\)"),
        (lambda: metrics.extract_features(np.eye(3), lambda x: x[:1]), r"\(1, 3\) for 3 images"),
        (lambda: metrics.extract_features(np.eye(3), lambda x: x, batch_size=0), "batch_size is 0"),
        (lambda: metrics.extract_features(np.zeros((0, 3)), lambda x: x), "P >= 1"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
