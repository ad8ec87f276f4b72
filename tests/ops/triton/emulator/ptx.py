"""Parse the PTX of one kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.ops.triton.emulator.faults import Unsupported

_DIRECTIVES = (".loc", ".pragma", ".file", ".section", ".reqntid", ".maxntid", ".minnctapersm", ".maxnreg")
_PLACE = re.compile(r"(\w+\.py:\d+):\d+")
_GUARDED = re.compile(r"@(!?)(%?\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"(\$\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard operation operands`."""

    text: str
    operation: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    place: str  # in the kernel's source

    def __str__(self) -> str:
        return f"`{self.text}` ({self.place})"


@dataclass
class Kernel:
    """A parsed kernel."""

    name: str
    parameters: dict[str, str]  # the type of each
    threads: int  # of a program
    registers: dict[str, str] = field(default_factory=dict)  # the type of each
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)

    def uses(self, *prefixes: str) -> bool:
        """Return whether there is an instruction with one of these prefixes."""
        return any(instruction.operation.startswith(prefixes) for instruction in self.code)


def parse(text: str) -> Kernel:
    """Return the only kernel of a PTX module."""
    entries = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if len(entries) != 1:
        raise Unsupported(f"The emulator expects PTX with one kernel, got {len(entries)}.")
    name, parameters, directives = entries[0]
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise Unsupported(f"The emulator expects .reqntid, the number of threads, got none in {name}.")
    kernel = Kernel(name, _parameters(parameters), int(threads[1]))
    body = text[text.index("{", text.index(".entry")) + 1 :]
    for statement, place in _statements(body):
        _add(kernel, statement, place)
    return kernel


def _parameters(text: str) -> dict[str, str]:
    found = re.findall(r"\.param\s+\.(\w+)\b[^,]*?(\w+)\s*(?:,|$)", text.strip())
    return {name: kind for kind, name in found}


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Yield the statements up to the function's closing brace, each with its place in the source."""
    place, depth, rest = "unknown source", 1, ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc") and (found := _PLACE.search(comment)):
            place = found[1]
        if code.strip().startswith(_DIRECTIVES):
            continue
        rest += code + "\n"
        while True:
            rest = rest.lstrip()
            if rest.startswith(("{", "}")):  # a scope, because no statement starts with a list of operands
                depth += 1 if rest[0] == "{" else -1
                rest = rest[1:]
                if depth == 0:
                    return
            elif label := _LABEL.match(rest):
                rest = rest[label.end() :]
                yield label[0], place
            elif ";" in rest:
                statement, rest = rest.split(";", 1)
                yield " ".join(statement.split()), place
            else:
                break


def _add(kernel: Kernel, statement: str, place: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.code)
    elif statement.startswith(".reg"):
        _declare(kernel, statement)
    elif statement.startswith("."):
        raise Unsupported(f"The emulator does not know the directive `{statement}` ({place}).")
    elif statement:
        kernel.code.append(_instruction(statement, place))


def _declare(kernel: Kernel, statement: str) -> None:
    _, kind, names = statement.split(None, 2)
    for name in names.split(","):
        plain, _, count = name.strip().rstrip(">").partition("<")
        for register in [f"{plain}{i}" for i in range(int(count))] if count else [plain]:
            if kernel.registers.setdefault(register, kind[1:]) != kind[1:]:
                raise Unsupported(f"The emulator expects one type for each register, got two for {register}.")


def _instruction(text: str, place: str) -> Instruction:
    guarded = _GUARDED.match(text)
    plain = guarded[3] if guarded else text
    operation, _, operands = plain.partition(" ")
    guard, negated = (guarded[2], guarded[1] == "!") if guarded else (None, False)
    return Instruction(text, operation, _operands(operands), guard, negated, place)


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside of brackets and braces."""
    return tuple(part.strip() for part in re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,])+", text) if part.strip())
