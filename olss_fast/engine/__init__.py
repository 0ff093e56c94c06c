"""Engine files: a network compiled ahead of time, its weights and its plans in one file that needs neither the model's
Python code nor diffusers to run, from Python or from a C++ program.

| module | what it knows |
|---|---|
| `manifest` | what a file says about itself; its bytes are a matter of `container`, as those of plan files |
| `machine` | what this machine is, and why an engine may not fit it |
| `shapes`, `arguments`, `inputs` | shapes and conditioning: what is built for, and whether a call keeps to it |
| `compiled`, `weights` | export, compilation, and compiled code that is loaded |
| `cache` | compiled code by what it was compiled from |
| `request`, `building` | `build`: what is asked, checked; how it is done |
| `engine` | `Engine` and `load_engine` |
| `describe`, `timing` | what `olss-fast inspect` shows and `olss-fast bench` measures |
| `runtime` | builds the C++ program `olss-run` |

`manifest` and `machine` need the standard library alone, so that looking at a file costs no start of torch.
"""
