"""Mathematics only: schedules, solvers, guidance and windows. Takes callables, never a model."""
