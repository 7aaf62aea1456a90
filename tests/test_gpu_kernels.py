"""gpu_kernels: what an interpreter lets pass on a CPU also compiles for a GPU, which takes none."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILES = """
import ast, inspect, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from seresnet import gpu_kernels

IMAGES = {"gradient", "x", "shortcut", "y", "of_x", "of_shortcut", "pooled", "spread"}
OTHERS = {"taken": "*u8", "tracked": "*i64", "scale": "fp32", "share": "fp32", "momentum": "fp32", "eps": "fp32",
          **dict.fromkeys(("rows", "images", "size", "count", "height", "width", "channels", "per_image", "units"), "i32")}
PASSES = {"_pool": {}, "_unpool": {}, "_sums": {}, "_statistics": {"ROWS": 512, "CHANNELS": 8}, "_gradient_statistics": {"ROWS": 512, "CHANNELS": 8},
          "_activate": {}, "_gradient_sums": {}, "_gradients": {}, "_gates": {"IMAGES": 16, "CHANNELS": 64, "UNITS": 32},
          "_gates_back": {"IMAGES": 16, "CHANNELS": 64, "UNITS": 32}}
launched = {node.id for node in ast.walk(ast.parse(inspect.getsource(gpu_kernels))) if isinstance(node, ast.Name) and node.id.startswith("_")}
kernels = {name for name in launched if hasattr(getattr(gpu_kernels, name, None), "arg_names")}
assert kernels == set(PASSES), f"not told here what their arguments are: {kernels ^ set(PASSES)}"
for name, constants in PASSES.items():
    kernel = getattr(gpu_kernels, name)
    of_images = IMAGES & set(kernel.arg_names)
    for kind in ("*bf16", "*fp32", "*fp16") if of_images else ("*fp32",):
        activations = ((False, None), (True, None), (False, 0.1), (True, 0.0)) if "ADDED" in kernel.arg_names else ((None, None),)
        for added, below in activations:
            values = {"PIXELS": 16, "CHANNELS": 128, "ADDED": added, "BELOW": below, **constants}
            values = {constant: values[constant] for constant in values if constant in kernel.arg_names}
            kinds = {arg: "constexpr" if arg in values else kind if arg in IMAGES else OTHERS.get(arg, "*fp32") for arg in kernel.arg_names}
            compiled = compile(ASTSource(kernel, kinds, values), target=GPUTarget("cuda", int(sys.argv[1]), 32))
            assert len(compiled.asm["cubin"]) > 1000 and compiled.metadata.shared <= 99 << 10, (name, compiled.metadata.shared)
            print(name, kind, added, below)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler comes with its wheels for Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_pass_compiles_for_a_gpu_without_one(capability, tmp_path):
    """Also within the memory that programs share on the smallest GPUs of compute capability 8.x, 99 KiB."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES, str(capability)], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2500:]
    assert len(done.stdout.splitlines()) == 49, done.stdout
