"""Saving: folders that are whole or not there, and encoders that come back as they were."""

from __future__ import annotations

from .base import SaveError
from .content import OLD_FILES, keep_published_name, merge, write_model, written_settings
from .folder import write_json, written_beside

__all__ = [
    "OLD_FILES",
    "SaveError",
    "keep_published_name",
    "merge",
    "write_json",
    "write_model",
    "written_beside",
    "written_settings",
]
