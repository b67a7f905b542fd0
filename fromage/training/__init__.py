"""Training: the step, its losses, the Lightning module and what is around a run."""
