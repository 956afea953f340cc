"""Adapters that come with the library, a folder each with its model card; their names stand for their folders."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def ready_adapters() -> list[str]:
    """The names of the adapters that come with the library."""
    return sorted(config.parent.name for config in _HERE.glob("*/adapter_config.json"))


def adapter_source(adapter: str | Path) -> str:
    """Where an adapter is: the folder of the ready one that is named, unless there is a folder of that name here.

    Anything that is no ready adapter's name (a path, a hub name) comes back as it is.
    """
    given = str(adapter)
    return str(_HERE / given) if given in ready_adapters() and not Path(given).exists() else given
