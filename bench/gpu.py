"""Everything that needs a GPU, in one command: what must be right, then what must be fast.

    python bench/gpu.py                       # at most 8 minutes; writes bench/results/gpu.json and gpu.md
    python bench/gpu.py --dry                 # the same on the CPU, at tiny sizes: tries the bench, measures nothing

Runs from the source tree, with torch and Triton and nothing else installed. Networks and schedulers of diffusers take
part if it is installed, or if its wheel (and those of what it needs) lie in `--wheels`. Sections follow each other
until time is up; both files are written after every part. Exit code 1 if a check failed, whatever was measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = ("correctness", "counts", "engines", "step kernel", "loops", "compiled")
RESERVE = 10.0  # seconds of the given minutes that are kept for the last files


def main() -> int:
    options = _options()
    end = time.monotonic() + 60 * options.minutes - RESERVE
    import source_tree

    source_tree.use()
    if options.wheels:
        source_tree.unpack_wheels(options.wheels)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")  # diffusers' deprecations; log(0) at the clean end of its schedules

    import correctness
    import devices
    import engines
    import loops
    import step_kernel
    from results import Bench, OutOfTime

    gc.freeze()  # what is imported stays: collecting garbage between networks need not look through it
    device = devices.choose(options.dry)
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-bench-")) if options.dry else RESULTS)
    bench = Bench(device, out, _about(options, device, devices), end)

    def too_late(*_: Any) -> None:
        if bench.interruptible:
            raise OutOfTime

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, end - time.monotonic()))
    sections = {  # and the seconds that each may take; what they leave is there for the last
        "correctness": (correctness.section, 100.0),
        "counts": (loops.counts_section, 30.0),
        "engines": (engines.section, 60.0),
        "step kernel": (step_kernel.section, 80.0),
        "loops": (loops.section, 180.0),
        "compiled": (loops.compiled_section, 3600.0),
    }
    for name in options.only or sections:
        bench.run_section(name, *sections[name])
    signal.setitimer(signal.ITIMER_REAL, 0)
    bench.about["finished"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    bench.write()
    for row in bench.failed:
        print(f"FAILED {row['section']}: {row['name']} {row['case'] or ''} {row['dtype'] or ''}: {row['note']}")
    print(f"{len(bench.rows)} rows, {len(bench.failed)} failed checks, {len(bench.skipped)} skipped: {out}")
    return 1 if bench.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Correctness and speed on a GPU, in one JSON and one Markdown file.")
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole bench ends by then (default: 8)")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md (default: bench/results)")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels for what is not installed: diffusers, and what it imports"
    )
    parser.add_argument("--commit", help="where the tree has no git: the commit that it is")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be given several times")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny sizes, graphs that are recorded functions")
    options = parser.parse_args()
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes is {options.minutes}; expected more than 0")
    if options.wheels and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels} holds no wheel")
    return options


def _about(options: argparse.Namespace, device: Any, devices: Any) -> dict[str, str]:
    import source_tree

    chosen = ["--dry"] * options.dry + [f"--only={name}" for name in options.only or ()]
    return {
        "command": shlex.join(["python", "bench/gpu.py", *chosen]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "device": device.name,
        "state": device.state(),
        "versions": f"{devices.versions()}, Python {platform.python_version()}",
        "commit": options.commit or devices.commit(str(source_tree.ROOT)),
    }


if __name__ == "__main__":
    sys.exit(main())
