"""Save a tiny pipeline: `python -m tiny_pipelines NAME FOLDER`."""

import sys

from tiny_pipelines import TINY, tiny_pipeline

if len(sys.argv) != 3 or sys.argv[1] not in TINY:
    sys.exit(f"usage: python -m tiny_pipelines NAME FOLDER, with a NAME of: {', '.join(TINY)}")
tiny_pipeline(sys.argv[1]).save_pretrained(sys.argv[2], safe_serialization=True)
