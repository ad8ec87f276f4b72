"""Exported programs that try to run code, and damaged ones."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm import cli
from batchnorm.cli.inputs import program

Files = dict[str, bytes]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        with torch.no_grad():
            y = self.norm(self.conv(x))
        return {"y": y.reshape(x.shape[0] * 2, -1), "sizes": [(x.shape[2] + 3) // 2]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with sizes that are expressions, guards, a nested graph and a result in containers."""
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    automatic = torch.export.Dim.AUTO
    sizes = ({0: automatic, 2: automatic, 3: automatic},)
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=sizes), path)
    return path


def changed(saved: Path, path: Path, change: Callable[[Files], None]) -> Path:
    """Write the archive again, with a change of its files."""
    with zipfile.ZipFile(saved) as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"net/{name}", content)
    return path


def in_json(name: str, change: Callable[[Any], None]) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        content = json.loads(files[name])
        change(content)
        files[name] = json.dumps(content).encode()

    return apply


def in_model(change: Callable[[Any], None]) -> Callable[[Files], None]:
    return in_json("models/model.json", change)


def first_node(**entries: Any) -> Callable[[Files], None]:
    return in_model(lambda held: held["graph_module"]["graph"]["nodes"][0].update(entries))


def calls(target: str, **argument: Any) -> Callable[[Files], None]:
    return first_node(target=target, inputs=[{"name": "x", "arg": argument, "kind": 1}])


def structure(kind: str, context: Any) -> Callable[[Files], None]:
    spec = json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])
    return in_model(lambda held: held["graph_module"]["module_call_graph"][0]["signature"].update(out_spec=spec))


def expression(held: Any, text: str) -> int:
    """Replace every expression for a size, and return their number."""
    if isinstance(held, dict):
        found = [key for key in held if key == "expr_str"]
        held |= dict.fromkeys(found, text)
        return len(found) + sum(expression(part, text) for part in held.values())
    return sum(expression(part, text) for part in held) if isinstance(held, list) else 0


def put(**files: bytes) -> Callable[[Files], None]:
    return lambda held: held.update({name.replace("__", "/"): content for name, content in files.items()})


def pickled_weight(files: Files) -> None:
    name = "data/weights/model_weights_config.json"
    in_json(name, lambda held: held["config"]["conv.weight"].update(use_pickle=True))(files)
    files["data/weights/" + json.loads(files[name])["config"]["conv.weight"]["path_name"]] = pickle.dumps(Payload())


def pickled_constant(files: Files) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    in_json("data/constants/model_constants_config.json", lambda held: held["config"].update(c=entry))(files)
    files["data/constants/opaque_obj_0"] = pickle.dumps(Payload())


HOSTILE: dict[str, Callable[[Files], None]] = {
    "sample inputs": lambda files: files.update({"data/sample_inputs/model.pt": pickle.dumps(Payload())}),
    "a pickled weight": pickled_weight,
    "a pickled object": pickled_constant,
    "weights of an older format": lambda files: files.update({"data/weights/model.pt": pickle.dumps(Payload())}),
    "constants of an older format": lambda files: files.update({"data/constants/model.pt": pickle.dumps(Payload())}),
    "a compiled library": lambda files: files.update({"data/aotinductor/model/a.so": b"\x7fELF"}),
    "a function of a module of torch": calls("torch.os.mkdir", as_string="ran"),
    "a library to load": calls("torch.ops.load_library", as_string="ran.so"),
    "an operator that opens a file": calls("torch.ops.aten.from_file.default", as_string="ran"),
    "an operator of another library": calls("torch.ops.image.write_file.default", as_string="ran"),
    "an attribute of a namespace": calls("torch.ops.aten.__class__.mro", as_string="ran"),
    "a call of a method": calls("_operator.methodcaller", as_string="mkdir"),
    "a function as an argument": calls("torch.ops.higher_order.cond", as_operator="torch.os.mkdir"),
    "an expression that calls": in_model(lambda held: expression(held, "__import__('os').mkdir('ran')")),
    "an expression with attributes": in_model(lambda held: expression(held, "().__class__")),
    "an expression in a string": in_model(lambda held: expression(held, 'Symbol("s0\'); print(1)")')),
    "an unknown function": in_model(lambda held: expression(held, "exit(1)")),
    "no expression": in_model(lambda held: expression(held, "import os")),
    "a guard": in_model(lambda held: held.update(guards_code=["__import__('os').mkdir('ran')"])),
    "a guard with a quote": in_model(lambda held: held.update(guards_code=["L['x\"']"])),
    "the name of an argument": in_model(
        lambda held: held["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=["x=__import__('os').mkdir('ran')"]
        )
    ),
    "the name of an input": in_model(
        lambda held: held["graph_module"]["graph"]["inputs"][-1].update(as_tensor={"name": "x, y=print('ran')"})
    ),
    "metadata that hide an expression": in_model(
        lambda held: held["graph_module"]["graph"]["sym_int_values"].update(
            metadata={"as_expr": {"expr_str": "print('ran')", "hint": None}}
        )
    ),
    "a container that imports": structure(
        "collections.defaultdict",
        {"default_factory_module": "this", "default_factory_name": "s", "dict_context": []},
    ),
    "a key that imports": structure("builtins.dict", [{"__enum__": True, "fqn": "this:s", "name": "a"}]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_could_run_code_needs_trust(saved: Path, tmp_path: Path, monkeypatch, capfd, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    changed(saved, tmp_path / "evil.pt2", HOSTILE[case])
    with pytest.raises(program.UntrustedError):
        program.load(Path("evil.pt2"), trust=False)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fold", "evil.pt2", "-o", "f.pt2"])
    out, err = capfd.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert err.startswith("batchnorm fold: evil.pt2 must hold only tensors and operators on them, but it holds ")
    assert "add --trust" in err and err.count("\n") == 1
    assert os.listdir() == ["evil.pt2"]


def test_a_program_of_tensors_loads_without_trust(saved: Path) -> None:
    x = torch.randn(3, 3, 10, 9)
    loaded, expected = (load.module()(x) for load in (program.load(saved, trust=False), torch.export.load(saved)))
    torch.testing.assert_close(loaded["y"], expected["y"], rtol=0, atol=0)


def test_a_trusted_file_is_loaded_as_torch_does(saved: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(saved, tmp_path / "net.pt2", HOSTILE["sample inputs"])
    with pytest.raises(Exception, match="Invalid magic number"):  # after it ran
        program.load(path, trust=True)
    assert os.path.isdir("ran")


def test_trust_is_refused_for_other_models(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fold", "net:build", "--trust", "-o", "no-such-file.pt2"])
    assert "--trust applies only to a .pt2 file" in capsys.readouterr().err


@pytest.mark.parametrize("trust", [[], ["--trust"]])
@pytest.mark.parametrize("part", [0, 1, 100, 0.3, 0.6, 0.95, -1])
def test_a_damaged_file_gives_one_line(saved: Path, tmp_path: Path, monkeypatch, capfd, part: float, trust) -> None:
    monkeypatch.chdir(tmp_path)
    whole = saved.read_bytes()
    Path("bad.pt2").write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fold", "bad.pt2", "-o", "f.pt2", *trust])
    out, err = capfd.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert err.startswith("batchnorm fold: bad.pt2 must be a file of torch.export.save, but loading it failed: ")
    assert err.count("\n") == 1 and os.listdir() == ["bad.pt2"]


@pytest.mark.parametrize(
    "name", ["models/model.json", "data/sample_inputs/model.pt", "archive_format", "archive_version"]
)
@pytest.mark.parametrize("content", [b"", b"nothing", b"{}", None])
def test_a_damaged_member_gives_one_line(saved, tmp_path, monkeypatch, capfd, name: str, content) -> None:
    def damage(files: Files) -> None:
        if content is None:
            del files[name]
        else:
            files[name] = content

    monkeypatch.chdir(tmp_path)
    changed(saved, tmp_path / "bad.pt2", damage)
    for trust in ([], ["--trust"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["fold", "bad.pt2", "-o", "f.pt2", *trust])
        out, err = capfd.readouterr()
        assert exit_.value.code == 2 and out == ""
        assert err.startswith("batchnorm fold: ") and err.count("\n") == 1 and os.listdir() == ["bad.pt2"]


# Other files that a user may have received


def test_no_other_file_runs_code(tmp_path: Path, monkeypatch, capfd) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    Path("net_for_program.py").write_text("from torch import nn\nbuild = lambda: nn.Sequential(nn.BatchNorm1d(3))\n")
    objects = np.empty(1, dtype=object)
    objects[0] = Payload()
    np.save("x.npy", objects, allow_pickle=True)
    np.savez("x.npz", x=objects, x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    torch.save({"0.weight": Payload()}, "w.pth")
    Path("raw.pth").write_bytes(pickle.dumps(Payload()))
    model = "net_for_program:build"
    for words in (
        ["standardize", "x.npy", "-o", "o.npy"],
        ["recalibrate", model, "--data", "x.npz", "-o", "o.pth"],
        ["recalibrate", model, "--weights", "w.pth", "--data", "x.npz", "-o", "o.pth"],
        ["doctor", model, "--weights", "raw.pth"],
        ["doctor", model, "--data", "x.npz"],
        ["compare", "--data", "x.npz", "--out", "o"],
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        err = capfd.readouterr().err
        assert exit_.value.code == 2 and err.count("\n") == 1
        assert "Detected pickle protocol" not in err
        assert not os.path.exists("ran") and not any(name.startswith("o") for name in os.listdir())


@pytest.mark.parametrize("location", ["../secret.bin", "absolute", "link"])
def test_weights_of_an_onnx_file_stay_in_its_folder(tmp_path: Path, monkeypatch, capsys, location: str) -> None:
    onnx = pytest.importorskip("onnx")
    from tests.surgery.fold.onnx.test_files import large

    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path / "net")
    onnx.save_model(large(), "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    Path("w.bin").rename(tmp_path / "secret.bin")
    if location == "link":
        Path("w.bin").symlink_to(tmp_path / "secret.bin")
    else:
        model = onnx.load_model("net.onnx", load_external_data=False)
        given = str(tmp_path / "secret.bin") if location == "absolute" else location
        for entry in (e for t in model.graph.initializer for e in t.external_data if e.key == "location"):
            entry.value = given
        Path("net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fold", "net.onnx", "-o", "f.onnx"])
    assert exit_.value.code == 2 and "must be an ONNX file with all its weights" in capsys.readouterr().err
    assert not Path("f.onnx").exists()
