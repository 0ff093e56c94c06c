"""The command line, and what its commands do. `commands.app` is the whole of it."""
