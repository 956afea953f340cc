"""``python -m llm2vec_fast.training.settings [FILE]``: print the table, or put it into the training guide."""

from __future__ import annotations

import sys
from pathlib import Path

from .table import table, write_table

if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_table(Path(sys.argv[1]))
    else:
        print(table(), end="")
