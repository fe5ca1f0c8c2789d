import pytest
from cases import CASES

from denoise_env.models import load_model
from denoise_env.models.pipeline import save_pipeline


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directories of the cases' pipelines, each built once, by name of case and variant."""
    made = {}

    def checkpoint(name, variant):
        settings = CASES[name].variants[variant].pipeline
        key = name, tuple(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("pipelines") / "tiny"
            save_pipeline(CASES[name].build(**settings), made[key])
        return made[key]

    return checkpoint


@pytest.fixture
def load(checkpoints):
    """Loads a case's model: ``load(name, variant=its first, **options)``."""

    def load(name, variant=None, **options):
        case = CASES[name]
        variant = variant or next(iter(case.variants))
        size = {"height": case.size[0], "width": case.size[1]}
        return load_model(str(checkpoints(name, variant)), **{**size, **case.variants[variant].options, **options})

    return load
