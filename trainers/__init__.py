"""Training: the three stages, distillation, teachers, data, checkpoints and the `train` command."""
