"""Engine files: a network compiled ahead of time, its weights and its plans in one file that needs neither the model's
Python code nor diffusers to run, from Python or from a C++ program.

| module | content |
|---|---|
| `manifest` | the description in a file; its bytes are handled by `container`, as in plan files |
| `machine` | description of this machine, and reasons why an engine may not fit it |
| `inputs` | a call's noise and conditioning, checked against what the engine was built for |
| `compiled`, `weights` | compilation, and loading of compiled code |
| `verifying` | the checks of a file before any of its code is run |
| `cache` | compiled code, keyed by its sources |
| `building` | `build`: its steps; `olss_fast.compiling` has its arguments, shapes and the export |
| `engine` | `Engine` and `load_engine` |
| `describe`, `timing` | `olss-fast inspect` and `olss-fast bench` |
| `runtime` | builds the C++ program `olss-run` |

`manifest` and `machine` need only the standard library: inspecting a file does not import torch.
"""
