"""Where a model's files are: a folder here, or one commit of a hub repository, fetched whole into the hub's cache."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llm2vec_fast.errors import ModelLoadError

from .files import CODE_PATTERNS, INDEX, LOADED_PATTERNS, Source, json_of, one_line

PROBE_SECONDS = 10.0  # without an answer in this time the hub counts as out of reach


@dataclass(frozen=True)
class HubOptions:
    """How hub repositories are read: one set for weights, configuration, tokenizer, adapter and settings alike.

    Attributes:
        revision: a branch, a tag or a commit of the model. It has no meaning for a folder here and is refused there.
        adapter_revision: the same of the adapter that is put on top; by default ``revision``, if it is on the hub.
        code_revision: of the repository that a configuration takes its code from, where code is trusted.
        token: for private and gated repositories; True takes the one that was logged in with.
        cache_dir: in place of the hub's own cache.
        local_files_only: take what is in the cache, ask nobody.
        force_download: fetch again what is in the cache.
        subfolder: the model's folder inside its repository or folder.
    """

    revision: str | None = None
    adapter_revision: str | None = None
    code_revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> HubOptions:
        """What of keyword arguments is meant for the hub; they lose it.

        Raises:
            ModelLoadError: an option that no longer exists anywhere is given.
        """
        if options.get("proxies"):
            raise ModelLoadError("proxies is no option of the hub any more: set HTTPS_PROXY in the environment")
        for gone in ("proxies", "resume_download", "mirror"):
            options.pop(gone, None)
        old_token = options.pop("use_auth_token", None)
        known = [item.name for item in fields(cls)]
        given = {name: options.pop(name) for name in known if options.get(name) is not None}
        for name in known:
            options.pop(name, None)
        return cls(**({"token": old_token} | given))

    def of_adapter(self, adapter: str) -> HubOptions:
        """The same for the adapter that is put on top; one that is a folder here has none of the model's revisions."""
        inherited = None if Path(adapter).expanduser().exists() else self.revision
        return replace(self, revision=self.adapter_revision or inherited, subfolder="")

    def of_base(self, revision: str | None) -> HubOptions:
        """The same for a base that an adapter names, at the revision that the adapter names."""
        return replace(self, revision=revision, subfolder="")


def locate(
    name: str | Path, hub: HubOptions | None = None, *, code: bool = False, gguf_file: str | None = None
) -> Source:
    """The folder or file of a model or an adapter.

    Args:
        name: a path, or a name on the hub.
        hub: how the hub is read. Asked for a hub name, it is told by the hub which commit that is now; where the hub
            is out of reach, what the cache holds is taken. Files that are missing there are fetched.
        code: fetch the Python files of the repository, too.
        gguf_file: the file of this name in that folder or repository is meant.

    Raises:
        ModelLoadError: there is no such path, revision or name, it is gated, or the hub is out of reach and the cache
            does not hold it.
    """
    name, hub = str(name), hub or HubOptions()
    path = Path(name).expanduser()
    if path.exists():
        source = _local(name, path, hub)
        return source if gguf_file is None else _local(str(source.place / gguf_file), source.place / gguf_file, hub)
    if not may_be_hub_name(name):
        raise ModelLoadError(f"{_kind(name)} {name} does not exist: check the path{_left_beside(path)}")
    folder = _snapshot(name, hub, [*(CODE_PATTERNS if code else ()), *([gguf_file] if gguf_file else ())])
    place = folder / hub.subfolder / (gguf_file or "")
    if not place.exists():
        raise ModelLoadError(f"{name} has no {gguf_file or hub.subfolder}: check its name")
    return Source(name if gguf_file is None else str(place), place, commit=folder.name, revision=hub.revision)


def may_be_hub_name(name: str) -> bool:
    """Whether a name that is no path here may be that of a hub repository: "owner/name", or "name" of old ones."""
    return not Path(name).is_absolute() and not name.startswith((".", "~")) and name.count("/") < 2 and not _gguf(name)


def _local(name: str, path: Path, hub: HubOptions) -> Source:
    owner, commit = _cached_as(path)
    if hub.revision is not None and hub.revision != commit:
        raise ModelLoadError(
            f"revision={hub.revision} has no meaning for {name}, which is a {'folder' if path.is_dir() else 'file'} "
            "here: leave it out, or name a hub repository"
        )
    place = path / hub.subfolder if hub.subfolder and path.is_dir() else path
    if not place.exists():
        raise ModelLoadError(f"{place} does not exist: check the path")
    return Source(owner or name, place, commit=commit, revision=commit)


def _cached_as(path: Path) -> tuple[str | None, str | None]:
    """The repository and the commit of a folder in a hub cache, else None for both."""
    whole = path.absolute()
    if whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--"):
        return whole.parent.parent.name.removeprefix("models--").replace("--", "/"), whole.name
    return None, None


def _snapshot(name: str, hub: HubOptions, also: list[str]) -> Path:
    """The folder of one commit of a repository in the cache, with all that loading reads."""
    from huggingface_hub import constants, snapshot_download

    below = f"{hub.subfolder}/" if hub.subfolder else ""
    options: dict[str, Any] = {
        "revision": hub.revision,
        "token": hub.token,
        "cache_dir": hub.cache_dir,
        "allow_patterns": [below + pattern for pattern in (*LOADED_PATTERNS, *also)],
        "ignore_patterns": [f"{below}*/*", f"{below}consolidated*"],  # whole copies for other programs
    }
    away = "it may not be asked" if hub.local_files_only or constants.HF_HUB_OFFLINE else _out_of_reach(name, hub)
    if away is None:
        try:
            return Path(snapshot_download(name, force_download=hub.force_download, **options))
        except Exception as error:  # the hub client raises many unrelated classes
            raise ModelLoadError(f"{name} cannot be fetched from the hub: {one_line(error)}") from error
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **{**options, "allow_patterns": ["config.json"]}))
    except Exception as error:
        raise ModelLoadError(
            f"{_revised(name, hub)} is neither a folder here nor in the cache of the hub, and {away}: check the name, "
            "or fetch it where the hub can be reached"
        ) from error
    missing = _missing(folder / hub.subfolder)
    if missing:
        raise ModelLoadError(
            f"{_revised(name, hub)} is only partly in the cache of the hub ({missing} is missing), and {away}: fetch "
            "the rest where the hub can be reached"
        )
    return folder


def _out_of_reach(name: str, hub: HubOptions) -> str | None:
    """Why the hub cannot be asked, in words; None where it answers.

    Raises:
        ModelLoadError: it answers that there is no such repository or revision, or that it is not for everybody.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi(token=hub.token).model_info(name, revision=hub.revision, timeout=PROBE_SECONDS)
    except GatedRepoError as error:
        raise ModelLoadError(f"{name} is gated: ask for access on its page, then log in or pass token=…") from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{name} has no revision {hub.revision}: give a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{name} is neither a folder here nor the name of a model on the hub (a private one needs token=…)"
        ) from error
    except HfHubHTTPError as error:
        return f"the hub answers {one_line(error)}"
    except Exception as error:  # names that are none, no network, refused connections, proxies
        if isinstance(error, ValueError):
            raise ModelLoadError(
                f"{name} is neither a folder here nor the name of a model on the hub: {one_line(error)}"
            ) from error
        return f"the hub cannot be reached ({one_line(error)})"
    return None


def _missing(folder: Path) -> str | None:
    """What a model's folder lacks, as far as its own files tell; an adapter's needs its weights alone."""
    if (folder / "adapter_config.json").is_file():
        return None if any(folder.glob("adapter_model.*")) else "adapter_model.safetensors"
    if any(folder.glob("*.gguf")):
        return None
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / INDEX
    if index.is_file():
        shards: Mapping[str, str] = json_of(index).get("weight_map") or {}
        return next((shard for shard in sorted(set(shards.values())) if not (folder / shard).is_file()), None)
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    return None if weights else "model.safetensors"


def _revised(name: str, hub: HubOptions) -> str:
    return name if hub.revision is None else f"{name} at {hub.revision}"


def _gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _kind(name: str) -> str:
    return "the GGUF file" if _gguf(name) else "the model folder"


def _left_beside(path: Path) -> str:
    """A folder that was set aside in the moment in which a save was cut off."""
    left = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.aside")) if path.name and path.parent.is_dir() else []
    return f"; a save into it was cut off, and {left[-1]} holds it as it was before: rename that" if left else ""
