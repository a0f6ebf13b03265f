"""The text of LLVM code: one function's blocks and instructions, and what types and constants stand for."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from fsam_core.errors import UserError


class Unreadable(UserError):
    """The generated code has something in it that this version cannot count."""


class Unknown(NamedTuple):
    """A value that is not computed, and the text that made it."""

    text: str


class Instruction(NamedTuple):
    """`result = opcode rest`."""

    result: str | None
    opcode: str
    rest: str
    text: str


class Kernel(NamedTuple):
    """Blocks in the order of the text; the parameters' names."""

    parameters: tuple[str, ...]
    blocks: dict[str, list[Instruction]]


def parse(llvm: str) -> Kernel:
    """The one function that `llvm` defines.

    Raises:
        Unreadable: for text that does not define exactly one.
    """
    body = re.findall(r"^define [^@]*@\"?[\w.$]+\"?\((.*)\)[^\n]*\{\n(.*?)^\}", llvm, re.M | re.S)
    if len(body) != 1:
        raise Unreadable(f"the LLVM code of a kernel should define one function, and defines {len(body)}")
    parameters = tuple(piece.split()[-1] for piece in split(body[0][0]))
    blocks: dict[str, list[Instruction]] = {}
    # The entry's label is not written; it is the number after the last parameter.
    current = blocks.setdefault(f"%{len(parameters)}", [])
    for line in body[0][1].splitlines():
        text = re.sub(r"(, !\w+(\.\w+)* !\d+|, !\w+ !\{\})+$", "", line).strip()
        if not text or text.startswith((";", "#dbg")):
            continue
        label = re.fullmatch(r"(\"?[\w.$-]+\"?):(\s*;.*)?", text)
        if label:
            current = blocks.setdefault(f"%{label[1]}", [])
            continue
        result, _, rest = text.partition(" = ") if re.match(r"%[\w.$\"-]+ = ", text) else ("", "", text)
        rest = re.sub(r"^(tail|musttail|notail) ", "", rest)
        opcode, _, rest = rest.partition(" ")
        current.append(Instruction(result or None, opcode, rest, text))
    return Kernel(parameters, blocks)


@functools.cache
def split(text: str) -> list[str]:
    """At the commas that are inside no bracket or quotation."""
    pieces, depth, start, quoted = [], 0, 0, False
    for i, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "<([{":
            depth += 1
        elif character in ">)]}":
            depth -= 1
        elif character == "," and not depth:
            pieces.append(text[start:i].strip())
            start = i + 1
    return [*pieces, text[start:].strip()] if text[start:].strip() else pieces


@functools.cache
def typed(text: str) -> tuple[str, str]:
    """(type, value) of an operand; attributes of a parameter are left out."""
    text = text.strip()
    if text[:1] in "<[{":
        depth = 0
        for i, character in enumerate(text):
            depth += (character in "<[{") - (character in ">]}")
            if not depth:
                return text[: i + 1], _value(text[i + 1 :])
    kind, _, value = text.partition(" ")
    if kind == "ptr" and value.startswith("addrspace"):
        space, _, value = value.partition(" ")
        kind = f"ptr {space}"
    return kind, _value(value)


def _value(text: str) -> str:
    text = text.strip()
    return text if text[:1] in "<%" or text.startswith("splat") else text.rpartition(" ")[2]


@functools.lru_cache(maxsize=4096)
def constant(kind: str, value: str, threads: int) -> Any:
    if not is_integer(kind):
        return Unknown(f"{kind} {value}")
    width = lanes(kind) if kind.startswith("<") else 0
    if value.startswith("splat"):
        inner = re.fullmatch(r"splat \((\w+) (.+)\)", value)
        numbers = None if inner is None else [_number(inner[2])] * width
    elif value.startswith("<"):
        numbers = [_number(typed(piece)[1]) for piece in split(value[1:-1])]
    else:
        number = _number(value)
        numbers = None if number is None else [number] * max(width, 1)
    if numbers is None or None in numbers:
        return Unknown(f"{kind} {value}")
    array = np.array(numbers, dtype=bool if bits(kind) == 1 else np.int64)
    return np.broadcast_to(array if width else array[0], (threads, width) if width else (threads,))


def _number(text: str) -> int | None:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    # A lane that no one reads may be anything.
    return {"true": 1, "false": 0, "zeroinitializer": 0, "null": 0}.get(
        text, 0 if text in ("poison", "undef") else None
    )


def is_integer(kind: str) -> bool:
    return re.fullmatch(r"i\d+|ptr( addrspace\(\d\))?", last_type(kind)) is not None


def last_type(kind: str) -> str:
    """The element type of a vector, or the type itself."""
    vector = re.search(r"<\d+ x ([^>]+)>", kind)
    return vector[1] if vector and kind.startswith("<") else kind


def lanes(kind: str) -> int:
    vector = re.match(r"<(\d+) x ", kind)
    return int(vector[1]) if vector else 1


def bits(kind: str) -> int:
    element = last_type(kind)
    if element.startswith("ptr"):
        return 64
    known = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
    if element in known:
        return known[element]
    number = re.fullmatch(r"i(\d+)", element)
    if number is None:
        raise Unreadable(f"the type is not counted: {kind!r}")
    return int(number[1])


def size(kind: str) -> int:
    """Bytes of a type; `[2 x i8]` as Triton writes element sizes."""
    array = re.fullmatch(r"\[(\d+) x (.+)\]", kind)
    if array:
        return int(array[1]) * size(array[2])
    return lanes(kind) * bits(kind) // 8
