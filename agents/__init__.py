"""Agents that train in the denoising environment: one file per algorithm, one shared loop."""
