"""Download a model's weights, or repair a folder of them: only what is missing or damaged is fetched.

    scripts/download_weights                                  # the 1.7B model into weights/ms-1.7b, 3.67 GB
    scripts/download_weights --model original weights/original  # ModelScope's own files, to be converted
    scripts/download_weights --from /mnt/copy                 # from a folder instead of the Hub

What to fetch, from where, and what it must be stands in weights/manifests/. An interrupted download goes on where it
stopped: its files wait in FOLDER.partial. Nothing appears in FOLDER before it has been checked. HF_ENDPOINT names
another server than huggingface.co, HF_TOKEN a token.
"""

import argparse
import errno
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t2v.checkpoints import folder as weights  # noqa: E402
from t2v.errors import T2VError, WeightsError  # noqa: E402

MANIFESTS = ROOT / "weights" / "manifests"
WORKERS = 4
DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES)


def download(manifest: dict[str, Any], folder: Path, source: Path | None = None) -> None:
    """Make `folder` hold the manifest's files.

    Args:
        source: a folder to copy from; None is the Hub.

    Raises:
        WeightsError: a file could not be had, or is not what the manifest says; what was fetched is kept for next time.
    """
    needed = [
        name
        for name, expected in manifest["files"].items()
        if not (folder / name).is_file() or ("bytes" in expected and weights.compare(folder, {name: expected}))
    ]
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    missing = sum(manifest["files"][name].get("bytes", 0) for name in needed)
    missing -= sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free
    if free < missing:
        raise WeightsError(
            f"{missing / 1e9:.2f} GB are to be fetched, but {partial.parent} has {free / 1e9:.2f} GB free."
        )
    print(f"{len(needed)} of {len(manifest['files'])} files to fetch, {max(missing, 0) / 1e9:.2f} GB", flush=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(fetch, manifest, name, partial, source) for name in needed[:1]]
        if jobs and not jobs[0].exception():  # one alone first: without a server the others need not wait for theirs
            jobs += [pool.submit(fetch, manifest, name, partial, source) for name in needed[1:]]
    wrong = [str(error) for job in jobs if (error := job.exception())]
    if wrong:
        raise WeightsError(f"{weights.summary(wrong)}. What was fetched waits in {partial}; run this again to go on.")
    for name in needed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)
    if (folder / "model_index.json").is_file():
        weights.write_manifest(folder, f"scripts/download_weights {folder}")
        weights.check(folder)


def fetch(manifest: dict[str, Any], name: str, partial: Path, source: Path | None) -> None:
    """One file into the folder of partial downloads, checked."""
    expected = manifest["files"][name]
    path = partial / name
    if not (path.is_file() and "sha256" in expected and not weights.compare(partial, {name: expected})):
        try:
            expected = expected | (copy(source, name, path) if source else pull(manifest, name, partial))
        except OSError as error:
            raise WeightsError(f"{name} could not be written: {error.strerror}") from error
    problems = weights.compare(partial, {name: {"bytes": path.stat().st_size} | expected})
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
    """Download one file from the first repository that has it; the digest the server states, if any."""
    problem: Exception | None = None
    for repository in manifest["repositories"]:
        where = {"repo_id": repository, "filename": name, "revision": manifest["revision"]}
        try:
            hf_hub_download(**where, local_dir=partial)  # tries again, and goes on in the middle, by itself
            etag = get_hf_file_metadata(hf_hub_url(**where)).etag or ""
            return {"sha256": etag} if re.fullmatch("[0-9a-f]{64}", etag) else {}
        except Exception as error:  # the Hub's client, and what it stands on, have many kinds
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            problem = error
            if isinstance(error, LocalEntryNotFoundError):  # no connection; the next repository is on the same server
                break
    reason = str(problem).strip().split("\n", 1)[0]
    raise WeightsError(f"{name} could not be fetched ({type(problem).__name__}: {reason})") from problem


def main() -> None:
    models = sorted(path.stem for path in MANIFESTS.glob("*.json"))
    parser = argparse.ArgumentParser(
        prog="scripts/download_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="default: weights/MODEL")
    parser.add_argument("--model", default="ms-1.7b", help=f"{', '.join(models)}, or a manifest file of your own")
    parser.add_argument("--from", dest="source", metavar="DIR", type=Path, help="copy from this folder")
    args = parser.parse_args()
    path = MANIFESTS / f"{args.model}.json" if args.model in models else Path(args.model)
    folder = args.folder or ROOT / "weights" / path.stem
    try:
        download(weights.read_json(path), folder.resolve(), args.source)
    except (T2VError, OSError) as error:
        sys.exit(str(error))
    if args.model == "original":
        print(f"Next: scripts/convert_weights {folder} weights/ms-1.7b")
    else:
        print(f"{folder} is complete. To use it: T2V_WEIGHTS={folder}. Research use only: the licence is CC-BY-NC 4.0.")


if __name__ == "__main__":
    main()
