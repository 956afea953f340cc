"""``python -m llm2vec_fast.training.settings [FILE]``: print the tables, or put them into the training guide."""

from __future__ import annotations

import sys
from pathlib import Path

from .table import tables, write_tables

if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_tables(Path(sys.argv[1]))
    else:
        print(tables(), end="")
