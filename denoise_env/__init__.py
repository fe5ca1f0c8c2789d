"""Denoising with diffusion and flow models as a reinforcement-learning environment."""
