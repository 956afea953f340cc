"""Saving: folders that are whole or not there, and encoders that come back as they were."""

from __future__ import annotations

from .base import SaveError
from .content import OLD_FILES, merge, write_encoder
from .folder import write_json, written_beside

__all__ = ["OLD_FILES", "SaveError", "merge", "write_encoder", "write_json", "written_beside"]
