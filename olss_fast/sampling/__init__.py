"""Running plans: `sample` for once, `Sampler` for many times."""
