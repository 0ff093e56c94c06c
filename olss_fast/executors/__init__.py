"""Ways to run a Plan. Each takes a Plan and knows nothing of the solver that wrote it."""
