"""An ensemble's folder to and from a model repository. Only what is not on this disk is fetched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cbtm._folder import MANIFEST
from cbtm_common.errors import NotFound

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def pull(name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The folder of that path, or of that repository, downloaded; takes hub options out of `options`.

    Raises NotFound when there is neither.
    """
    hub = {name: value for name in _HUB if (value := options.pop(name, None)) is not None}
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_path), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFound(f"{name_or_path}: no folder with a {MANIFEST}, and no repository: {reason}") from error


def push(folder: Path, repo_id: str, **options: Any) -> str:
    """Uploads all of `folder`, sub-folders too; its address. Options: token, private, revision, commit_message, …"""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    repo_id = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    known = ("commit_message", "commit_description", "revision", "create_pr")
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **{k: options[k] for k in known if k in options}))
