"""The registered environments, as test parameters."""

IDS = [f"denoise_env/{name}-v0" for name in ("Points", "Shapes", "ShapesFlux", "ShapesVideo", "ShapesI2V")]
