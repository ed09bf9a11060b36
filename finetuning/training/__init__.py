"""What a training run is made of: the objective, the optimizer, EMA, checkpoints, validation."""
