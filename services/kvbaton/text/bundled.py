"""Models that come with kvbaton, by name."""

from pathlib import Path

DEFAULT_MODEL = "baton-tiny"
"""A small model, trained by scripts/train_tiny.py, that recalls facts from short stories."""

_FOLDER = Path(__file__).resolve().parent.parent / "model" / "bundled"


def resolve_model(name: str) -> str:
    """The folder of a bundled model; any other name, or an existing folder, is returned as it is."""
    if not Path(name).is_dir() and name == DEFAULT_MODEL:
        return str(_FOLDER / name)
    return name


def model_name(path: str) -> str:
    """What requests call the model at `path`, unless told otherwise: its last component."""
    return Path(path).expanduser().resolve().name if Path(path).exists() else path
