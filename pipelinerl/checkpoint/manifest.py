"""What a checkpoint consists of: every file with its size and sha256, so that damage shows before anything is loaded.

The manifest is written last and carries a checksum of itself. A folder without one was never finished.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelinerl.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 2**22  # bytes


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`metric` is the value that decides which checkpoint is the best one; None when it is not known."""

    step: int
    files: Mapping[str, FileRecord]  # name -> record; no file is in a subfolder
    metric: float | None = None


def secured(path: Path) -> FileRecord:
    """Bring a file that was written to the disk, and record what it is."""
    digest = hashlib.sha256()
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return FileRecord(file.tell(), digest.hexdigest())


def secure_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete the checkpoint in `folder`, whose files are on the disk already."""
    body = {"format": FORMAT, **asdict(manifest)}
    path = folder / MANIFEST
    path.write_text(json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n")
    secured(path)
    secure_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError when the manifest is missing, damaged or of another format."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise DataError(f"{folder}: {MANIFEST} is damaged (its checksum is wrong)")
        if body["format"] != FORMAT:
            raise DataError(
                f"{folder}: format {body['format']} of another version of PipelineRL, this one has {FORMAT}"
            )
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return Manifest(body["step"], files, body["metric"])
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}, the save was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: {MANIFEST} is damaged ({type(error).__name__})") from error


def verify(folder: Path) -> Manifest:
    """The manifest, after every file was found to be what it says. Raises DataError that names the first wrong file."""
    manifest = read_manifest(folder)
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: {name} is missing")
        if path.stat().st_size != wanted.bytes:
            raise DataError(f"{folder}: {name} has {path.stat().st_size:,} bytes instead of {wanted.bytes:,}")
        if _sha256(path) != wanted.sha256:
            raise DataError(f"{folder}: {name} is damaged (its sha256 is not the one in {MANIFEST})")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
