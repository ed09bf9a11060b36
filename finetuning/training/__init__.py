"""What a training run is made of: session, optimizer, EMA, adapters, checkpoints, evaluation."""
