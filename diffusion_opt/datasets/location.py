"""Where shipped data and weights lie: the `data/` folder of the repository, or `DIFFUSION_OPT_DATA`."""

import os
from pathlib import Path


def data_dir() -> Path:
    """The folder of shipped data and weights. Raises FileNotFoundError, with the fix, if it does not exist."""
    override = os.environ.get("DIFFUSION_OPT_DATA")
    folder = Path(override) if override else Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        source = "DIFFUSION_OPT_DATA points to" if override else "the package expects its repository's data in"
        raise FileNotFoundError(
            f"{source} {folder}, which is not a folder; install the clone with `pip install -e .` "
            "or set DIFFUSION_OPT_DATA to the data folder of a clone"
        )
    return folder
