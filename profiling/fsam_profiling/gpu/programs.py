"""The memory addresses that a compiled Triton kernel touches: its LLVM code, executed for the addresses alone.

`run` executes one program (a block of threads) of the LLVM code that Triton hands to NVIDIA's or AMD's compiler.
Integers, pointers and masks are computed for all threads at once; floating-point values are not computed. The bytes of
a launch are therefore those of the addresses that its own code forms, masks and branches included.

Unknown text raises `Unreadable` as soon as an address, a mask or a branch depends on it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fsam_profiling.gpu import llvm
from fsam_profiling.gpu.llvm import Instruction, Kernel, Unknown, Unreadable

# Argument i is an array that starts at (i + 1) · REGION, so that an address identifies its array.
REGION = 1 << 40
STEPS = 200_000  # instructions of one program, after which it is assumed not to end


class Access(NamedTuple):
    """One load or store of one instruction: its width in bytes a thread, and the addresses of the active threads."""

    argument: int
    store: bool
    width: int
    addresses: NDArray[np.int64]


Value = Any  # NDArray of int64 or bool, [threads] or [threads, n] for a vector; or Unknown
Contents = Callable[[int, NDArray[np.int64]], Any]  # (argument, byte offsets) -> integers there, or None


def run(
    kernel: Kernel, arguments: list[int | None], program: int, threads: int, wavefront: int, contents: Contents
) -> list[Access]:
    """Every access to memory that one program makes.

    Args:
        kernel: from `llvm.parse`.
        arguments: of the launch; a pointer is given as the base of its region, a floating-point number as None.
        program: program_id(0).
        threads: of a program.
        wavefront: threads that run in step: 32 or 64.
        contents: integers that loads find in memory.

    Raises:
        Unreadable: where an address, a mask or a branch cannot be computed.
    """
    machine = _Machine(kernel, arguments, program, threads, wavefront, contents)
    machine.run()
    return machine.accesses


class _Machine:
    def __init__(
        self,
        kernel: Kernel,
        arguments: list[int | None],
        program: int,
        threads: int,
        wavefront: int,
        contents: Contents,
    ) -> None:
        self.kernel, self.program, self.threads, self.wavefront = kernel, program, threads, wavefront
        self.contents = contents
        self.values: dict[str, Value] = {}
        for i, name in enumerate(kernel.parameters):  # trailing ones are scratch that Triton adds
            value = arguments[i] if i < len(arguments) else None
            self.values[name] = Unknown(name) if value is None else np.full(threads, value, dtype=np.int64)
        self.accesses: list[Access] = []
        self.came_from: dict[str, list[tuple[str, NDArray[np.bool_]]]] = {}

    def run(self) -> None:
        """Blocks in the order of the text, the earliest that has waiting threads first, so that threads rejoin."""
        order = list(self.kernel.blocks)
        waiting = {order[0]: np.ones(self.threads, dtype=bool)}
        steps = 0
        while waiting:
            block = min(waiting, key=order.index)
            active = waiting.pop(block)
            edges = self.came_from.pop(block, [])
            for instruction in self.kernel.blocks[block]:
                steps += 1
                if instruction.opcode == "br":
                    for target, mask in self.branch(instruction, active):
                        waiting[target] = waiting[target] | mask if target in waiting else mask
                        self.came_from.setdefault(target, []).append((block, mask))
                elif instruction.opcode == "phi":
                    self.keep(instruction, self.phi(instruction, edges), active)
                else:
                    self.keep(instruction, self.execute(instruction, active), active)
            if steps > STEPS:
                raise Unreadable(f"a program did not end within {STEPS} instructions")

    def keep(self, instruction: Instruction, value: Value, active: NDArray[np.bool_]) -> None:
        name = instruction.result
        if name is None:
            return
        old = self.values.get(name)
        if isinstance(old, np.ndarray) and isinstance(value, np.ndarray) and old.shape == value.shape:
            value = np.where(active if value.ndim == 1 else active[:, None], value, old)
        self.values[name] = value

    def branch(self, instruction: Instruction, active: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.bool_]]]:
        targets = re.findall(r"label (%[\w.$\"-]+)", instruction.rest)
        if len(targets) == 1:
            return [(targets[0], active)]
        condition = self.operand(llvm.split(instruction.rest)[0])
        if isinstance(condition, Unknown):  # a matter of values: harmless where neither side touches memory
            alone = self.reached_from(targets[0]) ^ self.reached_from(targets[1])
            if any(_touches_memory(x) for block in alone for x in self.kernel.blocks[block]):
                raise Unreadable(f"what memory is touched depends on what is not counted: {condition.text!r}")
            return [(targets[0], active), (targets[1], active)]
        both = [(targets[0], active & condition), (targets[1], active & ~condition)]
        return [(target, mask) for target, mask in both if mask.any()]

    def reached_from(self, block: str) -> set[str]:
        found, waiting = {block}, [block]
        while waiting:
            last = self.kernel.blocks[waiting.pop()][-1]
            new = set(re.findall(r"label (%[\w.$\"-]+)", last.rest)) - found
            found |= new
            waiting += new
        return found

    def phi(self, instruction: Instruction, edges: list[tuple[str, NDArray[np.bool_]]]) -> Value:
        kind = instruction.rest.partition(" [")[0]
        incoming = {block: value for value, block in re.findall(r"\[ (.+?), (%[\w.$\"-]+) \]", instruction.rest)}
        result: Value = None
        for block, mask in edges:
            value = self.operand(f"{kind} {incoming[block]}")
            if isinstance(value, Unknown):
                return value
            mask = mask if value.ndim == 1 else mask[:, None]
            result = value if result is None else np.where(mask, value, result)
        return result

    def known(self, text: str) -> Any:
        value = self.operand(text)
        if isinstance(value, Unknown):
            raise Unreadable(f"an address, a mask or a branch depends on what is not counted: {value.text!r}")
        return value

    def operand(self, text: str) -> Value:
        """The value of `type value`."""
        kind, value = llvm.typed(text)
        if value.startswith("%"):
            return self.values.get(value, Unknown(value))
        return llvm.constant(kind, value, self.threads)

    def execute(self, instruction: Instruction, active: NDArray[np.bool_]) -> Value:
        opcode, rest = instruction.opcode, instruction.rest
        unknown = Unknown(instruction.text)
        if opcode in ("call", "load", "store"):
            return self.memory(instruction, active)
        if opcode in ("atomicrmw", "cmpxchg", "switch", "indirectbr", "invoke"):
            raise Unreadable(f"the instruction is not counted: {instruction.text!r}")
        if opcode in _BINARY or opcode == "icmp":
            rest = re.sub(r"^((nsw|nuw|exact|disjoint|samesign) )+", "", rest)
            predicate, _, rest = rest.partition(" ") if opcode == "icmp" else ("", "", rest)
            first, second = llvm.split(rest)
            kind = llvm.typed(first)[0]
            a, b = self.operand(first), self.operand(f"{kind} {second}")
            if isinstance(a, Unknown) or isinstance(b, Unknown):
                return unknown
            bits = llvm.bits(kind)
            return _compare(predicate, a, b, bits) if opcode == "icmp" else _binary(opcode, a, b, bits)
        if opcode == "select":
            condition, a, b = (self.operand(x) for x in llvm.split(rest))
            if any(isinstance(x, Unknown) for x in (condition, a, b)):
                return unknown
            return np.where(condition if condition.ndim == a.ndim else condition[:, None], a, b)
        if opcode in ("sext", "zext", "trunc", "freeze", "bitcast", "ptrtoint", "inttoptr", "addrspacecast"):
            return self.cast(instruction)
        if opcode == "getelementptr":
            return self.address(instruction)
        if opcode in ("extractelement", "insertelement", "shufflevector"):
            return self.vector(instruction)
        if opcode == "extractvalue" and llvm.split(rest)[1:] == ["0"]:
            return self.operand(llvm.split(rest)[0])
        return unknown

    def cast(self, instruction: Instruction) -> Value:
        source, _, target = instruction.rest.rpartition(" to ")
        if instruction.opcode == "freeze":
            return self.operand(instruction.rest)
        kind = llvm.typed(re.sub(r"^((nneg|nuw|nsw) )+", "", source))[0]
        value = self.operand(re.sub(r"^((nneg|nuw|nsw) )+", "", source))
        if isinstance(value, Unknown):
            return Unknown(instruction.text)
        if instruction.opcode == "bitcast":
            same = llvm.lanes(kind) * llvm.bits(kind) == llvm.bits(target) and "i" in target and llvm.lanes(target) == 1
            return value.reshape(self.threads) if same and llvm.lanes(kind) == 1 else Unknown(instruction.text)
        if instruction.opcode == "zext":
            return _unsigned(value, llvm.bits(kind))
        if instruction.opcode == "sext" and value.dtype == bool:
            return -value.astype(np.int64)
        return _wrap(value, llvm.bits(target)) if instruction.opcode == "trunc" else value

    def address(self, instruction: Instruction) -> Value:
        rest = re.sub(r"^((inbounds|nuw|nusw) )+", "", instruction.rest)
        kind, pointer, *index = llvm.split(rest)
        base = self.operand(pointer)
        offsets = [self.operand(x) for x in index]
        if len(offsets) != 1 or isinstance(base, Unknown) or isinstance(offsets[0], Unknown):
            return Unknown(instruction.text)
        offset = offsets[0]
        if base.ndim < offset.ndim:
            base = base[:, None]
        elif offset.ndim < base.ndim:
            offset = offset[:, None]
        return base + offset * llvm.size(kind)

    def vector(self, instruction: Instruction) -> Value:
        values = [self.operand(x) for x in llvm.split(instruction.rest)]
        kind = llvm.typed(llvm.split(instruction.rest)[0])[0]
        if instruction.opcode == "insertelement" and isinstance(values[0], Unknown) and "poison" in values[0].text:
            values[0] = np.zeros((self.threads, llvm.lanes(kind)), dtype=np.int64)
        if instruction.opcode == "shufflevector" and isinstance(values[1], Unknown) and "poison" in values[1].text:
            values[1] = np.zeros((self.threads, llvm.lanes(kind)), dtype=np.int64)
        if any(isinstance(x, Unknown) for x in values) or not llvm.is_integer(kind):
            return Unknown(instruction.text)
        if instruction.opcode == "extractelement":
            return values[0][np.arange(self.threads), values[1]]
        if instruction.opcode == "insertelement":
            result = values[0].astype(values[1].dtype) if values[1].dtype == bool else values[0].copy()
            result[np.arange(self.threads), values[2]] = values[1]
            return result
        return np.concatenate(values[:2], axis=1)[:, values[2][0]]

    def memory(self, instruction: Instruction, active: NDArray[np.bool_]) -> Value:
        """Calls, loads and stores: those of memory are noted, others are not computed."""
        text = instruction.text
        if instruction.opcode == "load":
            kind, pointer = llvm.split(instruction.rest)[:2]
            if "addrspace(1)" not in pointer:
                return Unknown(text)
            width = llvm.size(kind)
            value = self.touch(self.known(pointer), active, width, instruction, store=False)
            if isinstance(value, Unknown) or not kind.startswith("<"):
                return value
            return value[:, None] if llvm.lanes(kind) == 1 else Unknown(text)
        if instruction.opcode == "store":
            value, pointer = llvm.split(instruction.rest)[:2]
            if "addrspace(1)" in pointer:
                width = llvm.size(llvm.typed(value)[0])
                self.touch(self.known(pointer), active, width, instruction, store=True)
            return None
        if " asm " in f" {instruction.rest} ":
            return self.assembly(instruction, active)
        found = re.search(r"@\"?([\w.$]+)\"?\((.*)\)", instruction.rest)
        if found is None:
            raise Unreadable(f"the call is not counted: {text!r}")
        return self.intrinsic(found[1], llvm.split(found[2]), instruction, active)

    def intrinsic(self, name: str, arguments: list[str], instruction: Instruction, active: NDArray[np.bool_]) -> Value:
        unknown = Unknown(instruction.text)
        if name in ("llvm.nvvm.read.ptx.sreg.ctaid.x", "llvm.amdgcn.workgroup.id.x"):
            return np.full(self.threads, self.program, dtype=np.int64)
        if name in ("llvm.nvvm.read.ptx.sreg.tid.x", "llvm.amdgcn.workitem.id.x"):
            return np.arange(self.threads)
        if re.match(r"llvm\.[su](min|max)\.", name):
            pair = [self.operand(x) for x in arguments]
            if any(isinstance(x, Unknown) for x in pair):
                return unknown
            if name[5] == "u":
                pair = [_unsigned(x, llvm.bits(llvm.typed(y)[0])) for x, y in zip(pair, arguments, strict=True)]
            return (np.minimum if name[6:9] == "min" else np.maximum)(*pair)
        if name.startswith("llvm.amdgcn.readfirstlane"):
            value = self.operand(arguments[0])
            if isinstance(value, Unknown):
                return unknown
            return np.repeat(value[:: self.wavefront], self.wavefront)
        if name.startswith("llvm.amdgcn.make.buffer.rsrc"):
            return self.operand(arguments[0])
        if name.startswith("llvm.amdgcn.raw.ptr.buffer."):
            return self.buffer(name, arguments, instruction, active)
        if re.search(r"global|atomic|bulk|tensor|\btma|memcpy|memset|image", name):
            raise Unreadable(f"the call is not counted: {instruction.text!r}")
        return unknown

    def buffer(self, name: str, arguments: list[str], instruction: Instruction, active: NDArray[np.bool_]) -> Value:
        """AMD's buffer access: base, 32-bit offset of the thread, offset of the wavefront. Masked threads are given an
        offset beyond 2³¹, which the hardware drops."""
        operation = name.split(".")[5]
        if operation not in ("load", "store") or "lds" in name:
            raise Unreadable(f"the call is not counted: {instruction.text!r}")
        kind = llvm.typed(instruction.rest if operation == "load" else arguments[0])[0]
        resource, offset, scalar = arguments[operation == "store" :][:3]
        base, thread, wave = (self.known(x) for x in (resource, offset, scalar))
        inside = active & (_unsigned(thread, 32) < 2**31 - 1)
        at = base + _unsigned(thread, 32) + _unsigned(wave, 32)
        return self.touch(at, inside, llvm.size(kind), instruction, store=operation == "store")

    def assembly(self, instruction: Instruction, active: NDArray[np.bool_]) -> Value:
        """Inline PTX: `@$5 ld.global.v4.b32 { $0, $1, $2, $3 }, [ $4 + 0 ];` and the like."""
        code, constraints = re.findall(r"\"((?:[^\"\\]|\\.)*)\"", instruction.rest)[:2]
        if "global" not in code:
            return Unknown(instruction.text)
        outputs = sum(part.startswith("=") for part in constraints.split(","))
        arguments = llvm.split(re.search(r"\"\s*\((.*)\)", instruction.rest)[1])  # type: ignore[index]
        result: Value = Unknown(instruction.text)
        for line in re.split(r";|\\0A", code):
            if "global" not in line:
                continue
            found = re.fullmatch(
                r"(?:\\09|\s)*(?:@\$(\d+) )?(ld|st)\.(?:\w+\.)*?global((?:[.:]{1,2}\w+)*?)(?:\.v(\d))?\.[bfsu](\d+) "
                r".*?\[ ?\$(\d+)(?: \+ (-?\d+))? ?\].*",
                line,
            )
            if found is None or "shared" in line:
                raise Unreadable(f"the assembly is not counted: {line!r}")
            mask, operation, _, lanes, bits, pointer, offset = found.groups()
            at = self.known(arguments[int(pointer) - outputs]) + int(offset or 0)
            inside = active if mask is None else active & self.known(arguments[int(mask) - outputs])
            width = int(lanes or 1) * int(bits) // 8
            result = self.touch(at, inside, width, instruction, store=operation == "st")
        return result

    def touch(self, at: Any, active: NDArray[np.bool_], width: int, instruction: Instruction, *, store: bool) -> Value:
        """Note the access; the value is what `contents` has for it, else unknown."""
        addresses = at[active]
        if not addresses.size:
            return Unknown(instruction.text)
        owners = np.unique(addresses // REGION)
        if owners.size != 1 or owners[0] < 1:
            raise Unreadable(f"an address lies in no argument: {instruction.text!r}")
        argument = int(owners[0]) - 1
        self.accesses.append(Access(argument, store, width, addresses))
        found = None if store else self.contents(argument, at - (argument + 1) * REGION)
        return Unknown(instruction.text) if found is None else np.asarray(found, dtype=np.int64)


def _touches_memory(instruction: Instruction) -> bool:
    return bool(re.search(r"addrspace\(1\)|\.global\.|buffer", instruction.text)) and instruction.opcode in (
        "load",
        "store",
        "call",
    )


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": operator.lshift,
    "ashr": operator.rshift,
    "lshr": operator.rshift,
    "sdiv": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),
    "srem": lambda a, b: np.fmod(a, b),
    "udiv": operator.floordiv,
    "urem": operator.mod,
}


def _binary(opcode: str, a: Any, b: Any, bits: int) -> Any:
    if a.dtype == bool:
        if opcode not in ("and", "or", "xor"):
            return Unknown(opcode)
        return _BINARY[opcode](a, b.astype(bool))
    if opcode in ("lshr", "udiv", "urem"):
        a, b = _unsigned(a, bits), _unsigned(b, bits)
    if opcode in ("udiv", "urem", "sdiv", "srem"):
        b = np.where(b == 0, 1, b)
    return _wrap(_BINARY[opcode](a, b), bits)


def _compare(predicate: str, a: Any, b: Any, bits: int) -> Any:
    if predicate[0] == "u":
        a, b = _unsigned(a, bits), _unsigned(b, bits)
    return getattr(operator, predicate if predicate in ("eq", "ne") else predicate[1:])(a, b)


def _unsigned(value: Any, bits: int) -> Any:
    """Of a value kept as a signed number; 64-bit ones are taken to be below 2⁶³."""
    return value.astype(np.int64) if bits >= 64 else value.astype(np.int64) & ((1 << bits) - 1)


def _wrap(value: Any, bits: int) -> Any:
    if bits >= 64:
        return value
    if bits == 1:
        return (value & 1).astype(bool)
    low = value.astype(np.int64) & ((1 << bits) - 1)
    return low - ((low >> (bits - 1)) << bits)
