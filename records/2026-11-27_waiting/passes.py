"""Seconds of 300 short parallel passes beside a busy program on each of two cores: OpenMP's threads looking out 5,000 times, and 300,000."""
import os
import subprocess
import sys

code = """
import time
from seresnet import runtime

def main():
    import torch
    x = torch.ones(200_000)
    x.add_(1)
    start = time.perf_counter()
    for _ in range(300):
        x.add_(1)
    print(time.perf_counter() - start)

runtime.run_program(main)
"""


def seconds(**said):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        return float(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
                                    env={**os.environ, "PYTHONPATH": ".", **said}).stdout)
    finally:
        for program in busy:
            program.kill()
            program.wait()


for _ in range(4):
    print(seconds(GOMP_SPINCOUNT="5000"), seconds(GOMP_SPINCOUNT="300000"))
