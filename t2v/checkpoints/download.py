"""Download a model's folder from the Hugging Face Hub, or repair one.

weights/manifests/ says which files to fetch, from which repositories, and their sizes and digests. A file appears in
the folder only after it has been checked. Until then it waits in FOLDER.partial, from where an interrupted download
continues.
"""

import errno
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from t2v.checkpoints.folder import check, compare, summary, write_manifest
from t2v.errors import WeightsError

WORKERS = 4
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)


def download(manifest: dict[str, Any], folder: Path, source: Path | None = None) -> None:
    """Fetch the manifest's files that are missing from `folder` or damaged.

    Args:
        source: a folder to copy from; None is the Hub.

    Raises:
        WeightsError: a file could not be fetched, or differs from the manifest. Good files are kept for the next try.
    """
    needed = [
        name
        for name, expected in manifest["files"].items()
        if not (folder / name).is_file() or ("bytes" in expected and compare(folder, {name: expected}))
    ]
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    missing = sum(manifest["files"][name].get("bytes", 0) for name in needed)
    missing -= sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free
    if free < missing:
        raise WeightsError(
            f"The download takes {missing / 1e9:.2f} GB, but {partial.parent} has {free / 1e9:.2f} GB free."
        )
    print(f"{len(needed)} of {len(manifest['files'])} files to fetch, {max(missing, 0) / 1e9:.2f} GB", flush=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(fetch, manifest, name, partial, source) for name in needed[:1]]
        if (
            futures and not futures[0].exception()
        ):  # the first file alone: if the server cannot be reached, one timeout is enough
            futures += [pool.submit(fetch, manifest, name, partial, source) for name in needed[1:]]
    wrong = [str(error) for future in futures if (error := future.exception())]
    if wrong:
        raise WeightsError(f"{summary(wrong)}. The fetched files wait in {partial}; run this again to continue.")
    for name in needed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)
    if (folder / "model_index.json").is_file():
        write_manifest(folder, f"t2v weights download {folder}")
        check(folder)


def fetch(manifest: dict[str, Any], name: str, partial: Path, source: Path | None) -> None:
    """Fetch one file into the folder of partial downloads and check it."""
    expected = manifest["files"][name]
    path = partial / name
    if not (path.is_file() and "sha256" in expected and not compare(partial, {name: expected})):
        try:
            expected = expected | (copy(source, name, path) if source else pull(manifest, name, partial))
        except OSError as error:
            raise WeightsError(f"{name} could not be written: {error.strerror}") from error
    problems = compare(partial, {name: {"bytes": path.stat().st_size} | expected})
    if problems:
        path.unlink(missing_ok=True)
        raise WeightsError(problems[0])


def copy(source: Path, name: str, path: Path) -> dict[str, Any]:
    if not (source / name).is_file():
        raise WeightsError(f"{source} has no {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, path)
    return {}


def pull(manifest: dict[str, Any], name: str, partial: Path) -> dict[str, Any]:
    """Download one file from the first repository that has it; returns the digest that the server states, if any."""
    problem: Exception | None = None
    for repository in manifest["repositories"]:
        where = {"repo_id": repository, "filename": name, "revision": manifest["revision"]}
        try:
            hf_hub_download(**where, local_dir=partial)  # retries, and continues in the middle of a file
            etag = get_hf_file_metadata(hf_hub_url(**where)).etag or ""
            return {"sha256": etag} if re.fullmatch("[0-9a-f]{64}", etag) else {}
        except Exception as error:  # of many types, the client's and its libraries'
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            problem = error
            if isinstance(
                error, LocalEntryNotFoundError
            ):  # no connection, and the next repository is on the same server
                break
    reason = str(problem).strip().split("\n", 1)[0]
    raise WeightsError(f"{name} could not be fetched ({type(problem).__name__}: {reason})") from problem
