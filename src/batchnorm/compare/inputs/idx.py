"""MNIST and Fashion-MNIST: four IDX files, read from a folder or downloaded once to the user's cache."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from batchnorm._options import as_clause
from batchnorm.compare.errors import ComparisonError

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
CACHE, MIRROR = "BATCHNORM_CACHE", "BATCHNORM_MIRROR"  # environment variables
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces


@dataclass(frozen=True)
class Source:
    """The origin of a data set.

    Attributes:
        title: Its name in errors.
        mirrors: URLs of folders with the four gzipped files, in the order in which they are tried.
        sha256: Hash of each file's uncompressed content, because the compression differs between mirrors.
    """

    title: str
    mirrors: tuple[str, ...]
    sha256: dict[str, str]


SOURCES = {
    "mnist": Source(
        "MNIST",
        ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"),
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
        ),
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
}


def read(name: str, directory: str | Path | None) -> dict[str, NDArray[Any]]:
    """Return the arrays of a data set for `from_arrays`: images uint8 `[N, 28, 28]` and labels uint8 `[N]`.

    Args:
        name: `mnist` or `fashion-mnist`.
        directory: Folder with the four official files, gzipped or not; None for the user's cache, to which missing
            files are downloaded.

    Raises:
        ComparisonError: If files are missing and cannot be downloaded, or are not the official ones.
    """
    source = SOURCES[name]
    paths = _find(source, Path(directory)) if directory is not None else _fetch(name, source)
    return {key: _array(source, file, paths[file]) for key, file in FILES.items()}


def _find(source: Source, directory: Path) -> dict[str, Path]:
    found = {}
    for file in FILES.values():
        spellings = (spelling + ending for spelling in (file, file.replace("-idx", ".idx")) for ending in ("", ".gz"))
        path = next((path for spelling in spellings if (path := directory / spelling).is_file()), None)
        if path is not None:
            found[file] = path
    missing = [file for file in FILES.values() if file not in found]
    if missing:
        what = f"which has no {' and no '.join(missing)}" if directory.is_dir() else "which does not exist"
        raise ComparisonError(
            f"data_dir must be a folder with {source.title}'s four files ({', '.join(FILES.values())}, each with or "
            f"without .gz), got {directory}, {what}. Check the path."
        )
    return found


def _fetch(name: str, source: Source) -> dict[str, Path]:
    try:
        import pooch  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ComparisonError(
            f"data {name} needs pooch for its download, which cannot be imported. Install with: pip install "
            "'batchnorm[compare]', or set data_dir (--data-dir) to a folder with the four files."
        ) from error
    folder = Path(os.environ.get(CACHE) or pooch.os_cache("batchnorm")) / name
    chosen = os.environ.get(MIRROR)
    mirrors = (f"{chosen.rstrip('/')}/{name}",) if chosen else source.mirrors
    places = [
        pooch.create(
            path=folder,
            base_url=mirror,
            registry={file: f"sha256:{digest}" for file, digest in source.sha256.items()},
            urls={file: f"{mirror}/{file}.gz" for file in source.sha256},
        )
        for mirror in mirrors
    ]
    return {file: _first_that_has(file, places, mirrors, name, folder) for file in FILES.values()}


def _first_that_has(file: str, places: list[Any], mirrors: tuple[str, ...], name: str, folder: Path) -> Path:
    reasons = []
    for place, mirror in zip(places, mirrors, strict=True):
        try:
            return Path(place.fetch(file, downloader=_download))
        except ValueError as error:
            reason = str(error).split(": expected")[0]  # of a checksum
            reasons.append(f"{urlsplit(mirror).netloc or mirror}: {reason}")
        except OSError as error:
            raise ComparisonError(
                f"the cache {folder} must be a writable folder, but: {as_clause(error)}. Name another in the "
                f"environment variable {CACHE}, or set data_dir (--data-dir) to a folder with the four files."
            ) from error
    raise ComparisonError(
        f"data {name} must be downloaded once or given as files, but {file} is not in {folder} and could not be "
        f"downloaded ({'; '.join(reasons)}). Set data_dir (--data-dir) to a folder with the four official files, or "
        f"run once with network access (HTTPS_PROXY names a proxy, {MIRROR} another server)."
    )


def _download(url: str, output_file: str, pooch: object) -> None:
    """Write the uncompressed content of a URL; pooch then checks its hash and renames the file."""
    from pooch import HTTPDownloader

    received = io.BytesIO()
    try:
        HTTPDownloader(timeout=TIMEOUT)(url, received, None)
    except OSError as error:  # the base class of all errors of requests
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise ValueError(type(error).__name__ + (f" {status}" if status else "")) from error
    Path(output_file).write_bytes(_uncompressed(received.getvalue()))


def _uncompressed(content: bytes) -> bytes:
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged gzip data: {error}".rstrip(".")) from error


def _array(source: Source, file: str, path: Path) -> NDArray[np.uint8]:
    """Return the array in an official file, after checking its content."""
    try:
        content = _uncompressed(path.read_bytes())
        array = _parse(content, rank=3 if "images" in file else 1)
        digest = hashlib.sha256(content).hexdigest()
        if digest != source.sha256[file]:
            others = [f"it is {other.title}'s" for other in SOURCES.values() if other.sha256[file] == digest]
            raise ValueError("".join(others) or f"its content has SHA-256 {digest}, not {source.sha256[file]}")
    except (OSError, ValueError) as error:
        raise ComparisonError(
            f"{path} must be {source.title}'s official file {file}, but: {as_clause(error)}. Download the file "
            "again; give other data as an .npz file."
        ) from error
    return array


def _parse(content: bytes, rank: int) -> NDArray[np.uint8]:
    """Return the array in an IDX file of unsigned bytes: 00 00 08, the rank, each size in four bytes, the values."""
    start, head, expected = 4 + 4 * rank, content[:4], bytes([0, 0, 8, rank])
    if head != expected:
        got = head.hex(" ") or "nothing"
        raise ValueError(f"an IDX file of bytes with {rank} axes starts with {expected.hex(' ')}, got {got}")
    if len(content) < start:
        raise ValueError(f"it ends within its header, after {len(content)} bytes")
    shape = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist())
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"its header announces {' × '.join(map(str, shape))} values, but {len(content) - start} bytes follow"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
