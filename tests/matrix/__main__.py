"""Try the matrix anew, write `table.json`, and put the table into README: `make matrix`.

Without arguments every cell is tried; `make matrix ARGS="wan sdxl"` tries these pipelines alone and keeps the others.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from matrix.bench import Bench, verdict
from matrix.table import put_into_readme, read_table, write_table
from matrix.techniques import columns_of
from tiny_pipelines import TINY


def main(names: list[str]) -> None:
    """Try the pipelines of these names, or all."""
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    table = read_table()
    for name in names or TINY:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bench = Bench(name, Path(folder))
            table[name] = {column: verdict(cell, bench) for column, cell in columns_of(name).items()}
        for column, found in table[name].items():
            if found.status == "fault":
                print(f"{name}, {column}: {found.reason}", flush=True)
        print(name, " ".join(found.status[0] for found in table[name].values()), flush=True)
        torch.compiler.reset()
        write_table({name: table[name] for name in TINY if name in table})
    put_into_readme(read_table())


if __name__ == "__main__":
    main(sys.argv[1:])
