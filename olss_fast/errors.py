"""Every error that olss_fast raises on purpose.

All derive from `OlssError`, and from the built-in error that a caller would expect (`ValueError`, `OSError`).
A message says what came, what was expected and what to do.
"""

from __future__ import annotations


class OlssError(Exception):
    """Base of every error of this package."""


class PlanError(OlssError, ValueError):
    """A plan breaks a rule of the intermediate representation: shape, causality, finiteness."""


class PlanFileError(OlssError, OSError):
    """A plan file cannot be read or written: truncated, altered, too large, of a newer version, or the disk is full."""


class ScheduleError(OlssError, ValueError):
    """A noise schedule, or what is asked of it (a time out of range, an unknown spacing), makes no sense."""


class InputError(OlssError, ValueError):
    """An argument of a public call is unusable: noise, conditioning, guidance, number of steps or samples."""


class NetworkError(OlssError, ValueError):
    """The network returned something unusable: wrong shape or dtype, or a value that is not finite."""


class StoreError(OlssError, OSError):
    """The on-disk store of a recording cannot be read or written, or belongs to another recording."""


class ModelError(OlssError, OSError):
    """A model folder cannot be used (missing weights, a pipeline of an unsupported kind), or a model not be written."""


class EngineFileError(OlssError, OSError):
    """An engine file cannot be read or written: truncated, altered, of another version, or the disk is full."""


class MachineError(OlssError, RuntimeError):
    """An engine was built for another machine, or for other versions, than those that it is loaded on."""


class BuildError(OlssError, RuntimeError):
    """A network cannot be made an engine or an ONNX model: it cannot be exported, or became another function."""


class HookUpWarning(UserWarning):
    """A network does not denoise its own samples as it should: prediction type, sign or timesteps may be mistaken."""
