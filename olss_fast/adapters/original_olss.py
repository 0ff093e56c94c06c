"""Reading the files of the original OLSS scheduler (Duan et al., "Optimal Linear Subspace Search", CIKM 2023).

Its `save` passes `torch.save` the tuple (timesteps, wx, we) for n evaluations of the network:

    timesteps  int [n]       timesteps of the evaluations, falling
    wx         float [n]     weight of the initial noise
    we         float [n, n]  weights of the guided outputs so far; 0 above the diagonal

    x_{k+1} = wx[k] x_0 + sum_{j <= k} we[k, j] e_j,     x_0 unit noise,     e_k = network(x_k, timesteps[k])

so row k+1 of the Plan is [wx[k], we[k]], and row 0 is x_0 alone. The file does not name the noise schedule, the
prediction type or the guidance scale it was fitted at.

Forbidden, each with its own message: a file above 16 MiB; anything but the uncompressed zip archive that torch.save has
written since torch 1.6; pickled objects other than tensors, tuples, lists and numbers (never loaded, so never run);
more than 1,000 evaluations; other types, dtypes or shapes; a non-finite value; a weight for an output that does not
exist yet; timesteps that do not fall or are outside the schedule.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError, PlanError, PlanFileError, ScheduleError
from olss_fast.plan.plan import Floats, Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.container import Refused, refuse
from olss_fast.support.files import read_bounded
from olss_fast.support.text import quoted

MAX_FILE_BYTES = 16 * 2**20
MAX_STEPS = 1000

_EXPECTED = "expected the tuple (timesteps, wx, we) of a saved OLSSScheduler"


def load_original(path: str | os.PathLike[str], *, schedule: object = None) -> Plan:
    """The Plan in a file of the original OLSS scheduler.

    `schedule` is that of the network: a NoiseSchedule, or a diffusers scheduler or its config; by default Stable
    Diffusion's (scaled_linear, 0.00085 to 0.012, epsilon). It gives `alphas`, `sigmas` and the metadata; rows and times
    are the file's. A path that begins below the schedule's noise end, as the published ones do, is kept and noted in
    metadata["note"].

    Raises PlanFileError naming the file, what was found and what was expected; InputError for another `schedule`.
    """
    noise_schedule = _schedule(schedule)
    data = read_bounded(path, MAX_FILE_BYTES)
    try:
        return _plan(*_arrays(_unpickled(data)), noise_schedule)
    except (Refused, PlanError) as cause:
        raise PlanFileError(f"{quoted(str(path), 200)} is not an original OLSS scheduler file: {cause}") from cause


def _schedule(schedule: object) -> NoiseSchedule:
    if schedule is None:
        return NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
    if isinstance(schedule, NoiseSchedule):
        return schedule
    try:
        return NoiseSchedule.from_diffusers(schedule)
    except ScheduleError as cause:
        raise InputError(
            f"schedule is {quoted(schedule)}; expected a NoiseSchedule or a diffusers scheduler: {cause}"
        ) from cause


def _plan(times: Floats, wx: Floats, we: Floats, schedule: NoiseSchedule) -> Plan:
    try:
        alphas, sigmas, _ = schedule.levels(times)
    except ScheduleError as cause:
        raise Refused(f"{cause}; pass the network's own schedule as schedule=") from cause
    first = np.eye(1, 1 + times.size)
    return Plan(
        timesteps=times,
        rows=np.concatenate([first, np.column_stack([wx, we])]),
        alphas=np.append(alphas, 1.0),
        sigmas=np.append(sigmas, 0.0),
        metadata={**schedule.metadata(), "method": "olss", "variant": "original", **_note(times[0], schedule.first)},
    )


def _note(time: float, first: float) -> dict[str, str]:
    if time >= first:
        return {}
    text = f"begins at timestep {time:g} with pure noise, as its teacher did; the network expects some signal there"
    return {"note": f"{text} (the noise end is {first:g}), so contrast is lost"}


# --- from bytes to arrays ------------------------------------------------------------------------------------------


def _unpickled(data: bytes) -> object:
    """The content by torch.load with weights_only: no code of the pickle is run."""
    _check_archive(data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise Refused(f"it holds pickled objects, which are never loaded; {_EXPECTED}") from cause
    except Exception as cause:  # a damaged pickle can make the reader raise anything
        raise Refused(f"torch cannot read it ({quoted(str(cause))}); copy or save the file again") from cause


def _check_archive(data: bytes) -> None:
    """Refuses anything but a zip archive whose content is no larger than the file."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except Exception as cause:  # as above
        raise Refused(
            f"it is not a zip archive of torch.save ({quoted(str(cause))}); copy the file again, or read it with"
            " the torch it was written by and save it with a newer one"
        ) from cause
    size = sum(entry.file_size for entry in entries)
    if size > len(data) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        refuse(f"it is a compressed archive of {size} bytes; torch.save writes uncompressed ones")


def _arrays(content: object) -> tuple[Floats, Floats, Floats]:
    """(n,), (n,), (n, n), all float64 and finite. Shapes are checked before anything is copied.

    Values are described by their types alone: a hostile pickle may hold one whose repr never ends.
    """
    if not isinstance(content, tuple | list) or len(content) != 3:
        length = f" of {len(content)} entries" if isinstance(content, tuple | list) else ""
        refuse(f"it holds a {type(content).__name__}{length}; {_EXPECTED}")
    times = _times(content[0])
    steps = times.size
    wx, we = _weights("wx", content[1], (steps,)), _weights("we", content[2], (steps, steps))
    early = np.argwhere(np.triu(we, 1))
    if len(early):
        k, j = early[0].tolist()
        refuse(f"we[{k}, {j}] is {we[k, j]}; expected 0, because output {j} does not exist yet in step {k}")
    return times, wx, we


def _times(value: object) -> Floats:
    if isinstance(value, list | tuple) and all(type(time) is int and abs(time) < 2**31 for time in value):
        value = torch.tensor(value, dtype=torch.int64, device="cpu")
    if not isinstance(value, Tensor) or value.dtype not in (torch.int16, torch.int32, torch.int64):
        refuse(f"timesteps is {_kind(value)}; expected a tensor or list of integers")
    if value.ndim != 1 or not 1 <= value.numel() <= MAX_STEPS:
        refuse(f"timesteps has shape {tuple(value.shape)}; expected one row of 1 to {MAX_STEPS}")
    times = _numbers("timesteps", value)
    rising = np.flatnonzero(np.diff(times) >= 0)
    if rising.size:
        i = int(rising[0])
        refuse(f"timesteps {i} and {i + 1} are {times[i]:g} and {times[i + 1]:g}; expected falling times")
    return times


def _weights(name: str, value: object, shape: tuple[int, ...]) -> Floats:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        refuse(f"{name} is {_kind(value)}; expected a tensor of real numbers")
    if tuple(value.shape) != shape:
        refuse(f"{name} has shape {tuple(value.shape)}; expected {shape} for {shape[0]} timesteps")
    array = _numbers(name, value)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        refuse(f"{name}[{', '.join(map(str, bad[0]))}] is {array[tuple(bad[0])]}; expected finite numbers")
    return array


def _numbers(name: str, tensor: Tensor) -> Floats:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        refuse(f"{name} is a {tensor.layout} tensor on {tensor.device}; expected a dense one with data")
    return np.array(tensor.detach().to(torch.float64).resolve_conj().resolve_neg().numpy())


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
