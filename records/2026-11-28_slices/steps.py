"""Steps of a recipe's net, forwards and backwards, with the output's channels in slices and all at once, in turns, in one process:
python records/2026-11-28_slices/steps.py --config-file rn_configs/se94.yaml --side 28 [--rounds 7]"""
import argparse
import statistics
import sys
import time
from dataclasses import replace

from seresnet import config, runtime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    settings, own = config.parse(sys.argv[1:], parser)
    runtime.tune_allocator()
    import torch

    from seresnet import loop, winograd
    torch.manual_seed(0)
    settings = replace(settings, model=replace(settings.model, classes=10, image_size=own.side))
    model = loop.build_model(settings).to(memory_format=torch.channels_last)
    images = torch.randn(settings.loader.batch_size, 3, own.side, own.side).to(memory_format=torch.channels_last)
    labels, seconds, at_once = torch.arange(len(images)) % 10, {"in slices": [], "all at once": []}, winograd.AT_ONCE
    for _ in range(own.rounds + 2):
        for way, taken in seconds.items():
            winograd.AT_ONCE = at_once if way == "in slices" else 1 << 20
            started = time.perf_counter()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            taken.append(time.perf_counter() - started)
            model.zero_grad()
    for way, taken in seconds.items():
        taken = taken[2:]
        print(f"{way}: {statistics.median(taken):.3f} s ({min(taken):.3f} to {max(taken):.3f}; n = {len(taken)})")


if __name__ == "__main__":
    runtime.run_program(main)
