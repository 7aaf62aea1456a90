"""At which rate torch computes every convolution of seed_16's net in bfloat16, and a product of two matrices:
PYTHONPATH=. python records/2026-11-28_rectified_units/convolutions.py"""
import argparse
import statistics
import time
from collections import Counter
from dataclasses import replace

import torch

from seresnet import config, loop

IMAGES = 128
settings, _ = config.parse(["--config-file", "rn_configs/seed_16.yaml"], argparse.ArgumentParser())
net = loop.build_model(replace(settings, model=replace(settings.model, classes=10, image_size=32)))
layers: Counter = Counter()
for module in net.modules():
    if isinstance(module, torch.nn.Conv2d):
        module.register_forward_hook(lambda m, x, _: layers.update([(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0],
                                                                      x[0].shape[2])]))
net(torch.zeros(2, 3, 32, 32))


def seconds(call) -> float:
    """Median of five, after two."""
    found = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


for dtype in (torch.float32, torch.bfloat16):
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    print(f"a product of two 2048 x 2048 matrices, {dtype}: {2 * 2048 ** 3 / seconds(lambda: a @ b) / 1e9:.0f} GFLOP/s")
sums = [0.0, 0.0, 0.0]
for (into, out, kernel, stride, side), count in layers.items():
    x, weight = (torch.randn(*shape).bfloat16().to(memory_format=torch.channels_last)
                 for shape in ((IMAGES, into, side, side), (out, into, kernel, kernel)))
    gradient = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2))
    flop = 2 * weight.numel() * gradient.numel() // out
    ways = [lambda: torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2)]
    # the images themselves want no gradient: the first layer's is told and not added
    for mask in ([True, False, False], [False, True, False]):
        ways.append(lambda mask=mask: torch.ops.aten.convolution_backward(gradient, x, weight, None, [stride] * 2, [kernel // 2] * 2, [1, 1], False,
                                                                         [0, 0], 1, mask))
    times = [seconds(way) for way in ways]
    sums = [total + count * time for total, time in zip(sums, (times[0], times[1] if into > 3 else 0, times[2]))]
    print(f"{count} of {into} to {out} channels, kernel {kernel}, stride {stride}, {side} pixels: "
          + ", ".join(f"{name} {flop / time / 1e9:.0f}" for name, time in zip(("forwards", "images' gradient", "weights' gradient"), times)) + " GFLOP/s")
print("seconds a step: " + ", ".join(f"{time:.3f}" for time in sums))
