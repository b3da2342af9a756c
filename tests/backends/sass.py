"""What the machine code of a CUDA object file says about its kernels.

The disassembler is the one that Triton ships.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def find_cuobjdump() -> Path | None:
    try:
        import triton.backends.nvidia as nvidia
    except ImportError:
        return None
    path = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    return path if path.exists() else None


def written(opcode: str, operands: str) -> set[int]:
    """Registers that an instruction of the kinds around HGMMA and QGMMA writes, its first."""
    first = re.match(r"\s*R(\d+)\b", operands)
    if first is None or re.match("[HQ]GMMA|ST|BRA|B?SYNC|BSSY|ISETP", opcode):
        return set()
    count = 4 if ".128" in opcode else 2 if re.search(r"\.64|CS2R|WIDE", opcode) else 1
    return set(range(int(first[1]), int(first[1]) + count))


@dataclass(frozen=True)
class Kernel:
    """The instructions of one kernel: (address, opcode with its modifiers, operands)."""

    name: str
    code: list[tuple[int, str, str]]

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches from its beginning."""
        return sum(re.match(pattern, opcode) is not None for _, opcode, _ in self.code)

    def inner_loop(self, pattern: str) -> list[str]:
        """Opcodes of `loop_code`."""
        return [opcode for opcode, _ in self.loop_code(pattern)]

    def loop_code(self, pattern: str) -> list[tuple[str, str]]:
        """The smallest loop that holds all that match `pattern` within loops."""
        loops = []
        for address, opcode, operands in self.code:
            target = re.search(r"0x([0-9a-f]+)", operands)
            if opcode.startswith("BRA") and target and int(target[1], 16) < address:
                begin = int(target[1], 16)
                loops.append([(op, rest) for at, op, rest in self.code if begin <= at <= address])
        found = [(sum(bool(re.match(pattern, op)) for op, _ in loop), loop) for loop in loops]
        most = max((n for n, _ in found), default=0)
        return min((loop for n, loop in found if n == most and n), key=len, default=[])

    def writes_under_way(self, unit: str = "HGMMA", waits_needed: int = 2) -> list[str]:
        """What writes to the operand registers of a wgmma of the loop that may still read them.

        A product is finished so many waits after its own group ends ("gsb0"): two where the
        kernel waits after each group for the group before.
        """
        loop = self.loop_code(unit)
        found = []
        for i, (opcode, operands) in enumerate(loop):
            if not opcode.startswith(unit):
                continue
            first = int(re.findall(r"\bR(\d+)", operands)[1])
            ended, waits = False, 0
            for op, rest in (loop + loop)[i:]:
                ended |= op.startswith(unit) and "gsb0" in rest
                waits += ended and op.startswith("WARPGROUP.DEPBAR")
                if waits == waits_needed:
                    break
                if written(op, rest) & set(range(first, first + 4)):
                    found.append(f"{op}{rest} after {opcode}{operands}")
            assert waits == waits_needed
        return found


def disassemble(cuobjdump: Path, path: Path) -> list[Kernel]:
    """The kernels of an object file."""
    command = [str(cuobjdump), "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = []
    for part in text.split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        found = INSTRUCTION.findall(part)
        kernels.append(Kernel(name, [(int(at, 16), op, rest) for at, op, rest in found]))
    return kernels
