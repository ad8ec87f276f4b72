"""MNIST and Fashion-MNIST: read from a folder, or fetched from a server, which here is one on localhost."""

from __future__ import annotations

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from batchnorm.compare import ComparisonError, load
from batchnorm.compare.inputs import idx

OFFICIAL = Path(__file__).parents[3].parent / "shared" / "data" / "mnist"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def contents(monkeypatch) -> dict[str, bytes]:
    """Four small files, which for the test are MNIST's official ones."""
    generator = np.random.default_rng(0)
    held = {}
    for split, samples in (("train", 20), ("t10k", 10)):
        held[f"{split}-images-idx3-ubyte"] = idx_bytes(generator.integers(0, 256, (samples, 4, 5), np.uint8))
        held[f"{split}-labels-idx1-ubyte"] = idx_bytes((np.arange(samples) % 10).astype(np.uint8))
    sha256 = {file: hashlib.sha256(content).hexdigest() for file, content in held.items()}
    monkeypatch.setitem(idx.SOURCES, "mnist", idx.Source("MNIST", (), sha256))
    return held


@pytest.fixture
def folder(contents, tmp_path: Path) -> Path:
    for file, content in contents.items():
        (tmp_path / f"{file}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def expected(contents: dict[str, bytes]) -> np.ndarray:
    return np.frombuffer(contents["train-images-idx3-ubyte"], np.uint8, offset=16).reshape(20, 1, 4, 5)


@pytest.mark.parametrize("spelling", ["{}.gz", "{}", "dotted", "dotted.gz"])
def test_the_official_files_are_found_in_each_spelling(contents, tmp_path: Path, spelling: str):
    for file, content in contents.items():
        name = spelling.format(file).replace("dotted", file.replace("-idx", ".idx"))
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = load("mnist", data_dir=tmp_path, standardize=False)
    assert data.name == "mnist"
    assert data.scaling == "bytes, divided by 255"
    np.testing.assert_allclose(data.x_train.numpy(), expected(contents) / 255, rtol=1e-6)
    assert data.y_test.tolist() == list(range(10))


def test_missing_files_are_named(folder: Path):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ComparisonError, match="MNIST's four files .* no t10k-labels-idx1-ubyte. Check the path"):
        load("mnist", data_dir=folder)
    with pytest.raises(ComparisonError, match="got .*elsewhere, which does not exist"):
        load("mnist", data_dir=folder / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:-7], "its header announces 20 × 4 × 5 values, but 393 bytes follow"),
        (lambda b: b[:9], "it ends within its header, after 9 bytes"),
        (lambda b: b"", "starts with 00 00 08 03, got nothing"),
        (lambda b: b"\x00\x00\x0d\x03" + b[4:], "starts with 00 00 08 03, got 00 00 0d 03"),
        (lambda b: gzip.compress(b)[:-20], "damaged gzip data: Compressed file ended"),
        (lambda b: gzip.compress(b)[:60] + b"?" * 40 + gzip.compress(b)[100:], "damaged gzip data"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "its content has SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(contents, folder: Path, spoil, message: str):
    file = "train-images-idx3-ubyte"
    (folder / f"{file}.gz").write_bytes(spoil(contents[file]))
    with pytest.raises(ComparisonError, match=f"{file}.gz must be MNIST's official file .*, but: .*{message}"):
        load("mnist", data_dir=folder)


def test_one_data_set_is_not_taken_for_another(folder: Path):
    with pytest.raises(ComparisonError, match="must be Fashion-MNIST's official file .*, but: it is MNIST's"):
        load("fashion-mnist", data_dir=folder)


class Server(ThreadingHTTPServer):
    """Serves `files`, cuts off what is in `cut`, and notes what is asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path in self.server.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(contents, tmp_path: Path, monkeypatch) -> Iterator[Server]:
    """A server that has the files, and an empty cache."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        monkeypatch.setenv("BATCHNORM_MIRROR", server.url + "/")
        server.files = {f"/mnist/{file}.gz": gzip.compress(content) for file, content in contents.items()}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_files_are_fetched_once_into_the_cache(contents, server: Server, tmp_path: Path):
    data = load("mnist", standardize=False)
    np.testing.assert_allclose(data.x_train.numpy(), expected(contents) / 255, rtol=1e-6)
    assert sorted(server.asked) == sorted(server.files)
    assert cached(tmp_path) == sorted(contents)
    server.files.clear()
    load("mnist")
    assert len(server.asked) == 4


def test_a_damaged_file_in_the_cache_is_fetched_anew(contents, server: Server, tmp_path: Path):
    load("mnist")
    (tmp_path / "cache" / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
    load("mnist")
    assert server.asked[4:] == ["/mnist/t10k-labels-idx1-ubyte.gz"]


def test_the_next_mirror_serves_where_one_fails(contents, server: Server, monkeypatch):
    monkeypatch.delenv("BATCHNORM_MIRROR")
    mirrors = (f"{server.url}/nothing", f"{server.url}/mnist")
    monkeypatch.setitem(idx.SOURCES, "mnist", idx.Source("MNIST", mirrors, idx.SOURCES["mnist"].sha256))
    assert len(load("mnist").y_train) == 20
    assert sum(path.startswith("/nothing/") for path in server.asked) == 4


@pytest.mark.parametrize("what", ["cut", "other", "no gzip"])
def test_a_failed_download_leaves_no_file_and_says_why(server: Server, tmp_path: Path, what: str):
    path = "/mnist/train-images-idx3-ubyte.gz"
    if what == "cut":
        server.cut.add(path)
        reason = "(ChunkedEncodingError|ConnectionError)"
    elif what == "other":
        server.files[path] = gzip.compress(b"something else")
        reason = "SHA256 hash of downloaded file .* does not match the known hash"
    else:
        server.files[path] = server.files[path][:-9]
        reason = "damaged gzip data"
    with pytest.raises(ComparisonError, match=rf"could not be downloaded \(127.0.0.1:\d+: {reason}"):
        load("mnist")
    assert cached(tmp_path) == []


def test_without_network_and_files_both_ways_out_are_named(server: Server, monkeypatch, tmp_path: Path):
    server.files.clear()
    with pytest.raises(ComparisonError, match="HTTPError 404"):
        load("mnist")
    monkeypatch.setenv("BATCHNORM_MIRROR", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(ComparisonError) as raised:
        load("mnist")
    message = str(raised.value)
    assert "\n" not in message
    for part in ("ConnectionError", str(tmp_path / "cache" / "mnist"), "--data-dir", "HTTPS_PROXY", "BATCHNORM_MIRROR"):
        assert part in message


def test_a_cache_that_cannot_be_created_is_an_error(server: Server, tmp_path: Path):
    (tmp_path / "cache").write_text("a file, no folder")
    with pytest.raises(ComparisonError, match="the cache .* must be a writable folder, but: .*BATCHNORM_"):
        load("mnist")


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official MNIST files are not here")
def test_the_official_mnist_is_what_it_is_known_to_be():
    """Mean and deviation of its training pixels are 0.1307 and 0.3081 of 255."""
    data = load("mnist", data_dir=OFFICIAL)
    assert (data.x_train.shape, data.x_test.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.scaling == "bytes, standardized with the training mean 33.3 and deviation 78.6"


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_is_the_official_one():
    arrays = idx.read("fashion-mnist", FASHION)
    assert (arrays["x_train"].shape, arrays["x_test"].shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert np.bincount(arrays["y_train"]).tolist() == [6000] * 10
    assert arrays["y_train"][:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


def test_a_file_has_its_shape_and_values():
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 4) + values.tobytes()
    np.testing.assert_array_equal(idx._parse(content, 3), values)
    with pytest.raises(ValueError, match="an IDX file of bytes with 3 axes starts with"):
        idx._parse(b"\x00\x00\x0d\x03", 3)
