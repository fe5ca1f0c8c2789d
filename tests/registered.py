"""The registered environments, as test parameters."""

IDS = ["denoise_env/Points-v0", "denoise_env/Shapes-v0", "denoise_env/ShapesFlux-v0"]
