"""Instructions of Triton's passes with GELU, compiled for compute capability 9.0 without a GPU: python records/2026-11-27_se_best/instructions.py

Of the passes of the checkout that it is run in (from its root). For a program of 64 pixels of 32 channels in bfloat16; of `_gradient_sums` those of its loop.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, ".")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seresnet import gpu_kernels

DISASSEMBLER = Path(triton.__path__[0]) / "backends/nvidia/bin/nvdisasm"
IMAGES = {"gradient", "x", "shortcut", "y", "of_x", "of_shortcut"}
NUMBERS = {"rows", "images", "size", "channels", "per_image", "count"}
CONSTANTS = {"ADDED", "PIXELS", "CHANNELS"}


def instructions(kernel, added: bool) -> tuple[int, int]:
    """All of them, and those of the longest loop (0 without one)."""
    kinds = {name: "constexpr" if name in CONSTANTS else "*bf16" if name in IMAGES else "i32" if name in NUMBERS else "fp32" if name == "scale"
             else "*fp32" for name in kernel.arg_names}
    sixteens = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
                if kinds[name].startswith("*") or name in ("channels", "per_image")}
    source = ASTSource(kernel, kinds, {"ADDED": added, "PIXELS": 64, "CHANNELS": 32}, sixteens)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        lines = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout.splitlines()
    labels, waiting, addresses, loops = {}, [], [], [0]
    for line in lines:
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            waiting.append(label[1])
        elif address := re.search(r"/\*([0-9a-f]{4,})\*/", line):
            addresses.append(int(address[1], 16))
            labels.update(dict.fromkeys(waiting, addresses[-1]))
            waiting = []
            branch = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
            if branch and labels.get(branch[1], addresses[-1]) < addresses[-1]:
                loops.append((addresses[-1] - labels[branch[1]]) // 16 + 1)
    return len(addresses), max(loops)


for name in ("_gradient_sums", "_gradients", "_activate"):
    for added in (False, True):
        print(name, "with a shortcut" if added else "", *instructions(getattr(gpu_kernels, name), added))
