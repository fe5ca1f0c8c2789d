"""The embedded world: rendered scenes with captions, a verifier, and a tiny trained Stable Diffusion."""
