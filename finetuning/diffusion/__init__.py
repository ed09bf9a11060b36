"""The maths of diffusion training: the noise schedule and the objective. torch only."""
