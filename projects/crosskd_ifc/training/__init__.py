"""Training: the trainer, its hooks, exact resuming, preemption, checkpoints, checks before it
starts.

Imports ``modeling`` and what lies below it.
"""
