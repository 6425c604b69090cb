"""DistributedSkellam and DistributedDiscreteGaussian: see `distributed_noise.py`."""

from umbel.strategies.secure.distributed_noise import DistributedNoise


def DistributedSkellam(  # noqa: N802
    noise_multiplier: float | None = None,
    min_cohort: int = 0,
    colluders: int = 0,
    insecure_seed: int | None = None,
) -> DistributedNoise:
    """Skellam shares (Agarwal, Kairouz and Liu 2021): their sum is known exactly."""
    return DistributedNoise(
        "skellam", noise_multiplier, min_cohort, colluders, insecure_seed, name="skellam"
    )


def DistributedDiscreteGaussian(  # noqa: N802
    noise_multiplier: float | None = None,
    min_cohort: int = 0,
    colluders: int = 0,
    insecure_seed: int | None = None,
) -> DistributedNoise:
    """Discrete Gaussian shares (Kairouz, Liu and Steinke 2021)."""
    return DistributedNoise(
        "discrete-gaussian",
        noise_multiplier,
        min_cohort,
        colluders,
        insecure_seed,
        name="discrete-gaussian",
    )
