"""What tests/test_distributed.py runs in several processes, under torchrun.

    python tests/processes.py train --section.key value ...    ffcv_train.py itself, as where FFCV is not installed: streaming, it
                                                               would compile for several seconds in every process
    python tests/processes.py FOLDER

Reads `plan.json` in FOLDER ({name: {section.key: value}}), trains each config of it, checks what one process can check, and
leaves `<name>-<rank>.json` with what the processes have to agree on.
"""
import hashlib
import itertools
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from seresnet import config, loop, ranks, runtime    # noqa: E402
from seresnet.beton import open_beton, read_images    # noqa: E402
from seresnet.loader import BatchLoader    # noqa: E402
from seresnet.synced import synchronise    # noqa: E402


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def train(settings):
    """The run's report, every step's loss and weight, and the net as this process ended with it."""
    seen, whole = {"losses": [], "counts": []}, loop.train_epoch
    nets = []

    def spied(model, batches, **parts):
        loss, weight = parts["loss"], parts["weight"]

        def noted(logits, labels):
            value = loss(logits, labels)
            seen["losses"].append(float(value.detach()))
            seen["counts"].append(len(labels))
            return value
        nets.append(getattr(model, "module", model))
        return whole(model, batches, **{**parts, "loss": noted, "weight": weight})
    loop.train_epoch = spied
    try:
        report = loop.fit(config.build(settings, recipe="stripes"), ["test"])
    finally:
        loop.train_epoch = whole
    [net] = {id(n): n for n in nets}.values()
    kept = ("accuracy", "accuracy_tta", "loss", "loss_tta", "evaluated", "correct", "best_epoch")
    return {**seen, **{name: report[name] for name in kept}, "parameters": digest(net.parameters()), "buffers": digest(net.buffers())}


def check_collectives(group, of):
    rank, world = of.rank, of.world
    assert logging.getLogger("seresnet").disabled is (rank != 0), "the first alone speaks"
    assert group.gather(torch.tensor([rank, 7])).tolist() == [[r, 7] for r in range(world)]
    assert group.broadcast(f"from {rank}".encode()) == b"from 0" and group.broadcast(b"") == b""
    # a wish of one process reaches all at the same call, one later
    answers = [group.agree(15 if rank == world - 1 and call == 3 else 0) for call in range(4)]
    assert answers == [0] * 4 and group.agree(0) == 15
    with group.together():
        pass
    failed = None
    try:
        with group.together():
            if rank == 1:
                raise runtime.UserError("only here")
    except runtime.UserError as error:
        failed = error
    assert isinstance(failed, ranks.FailedElsewhere) is (rank != 1) and failed is not None
    try:
        group.check_same("data", 5 if rank else 6)
        raise AssertionError("differing data went unnoticed")
    except runtime.UserError as error:
        assert "process 1 has another data than process 0" in str(error)


def check_norm(group, of):
    """Normalising shares, of 0 samples too, is normalising the whole: values, gradients and running statistics."""
    rank = of.rank
    generator = torch.Generator().manual_seed(0)
    for count, dtype, atol in ((7, torch.float32, 1e-5), (of.world - 1, torch.float32, 1e-5), (6, torch.bfloat16, 3e-2)):
        x = torch.randn(count, 5, 4, 4, generator=generator).mul(3).add(10).to(dtype).contiguous(memory_format=torch.channels_last)
        outward = torch.randn(count, 5, 4, 4, generator=generator).to(dtype)
        plain, split = torch.nn.BatchNorm2d(5), torch.nn.Sequential(torch.nn.BatchNorm2d(5))
        weights = torch.rand(5, generator=generator) + 0.5
        for norm in (plain, split[0]):
            torch.nn.init.constant_(norm.bias, 0.3)
            norm.weight.data.copy_(weights)
        synchronise(split, group.gather, of.share, norms=True)
        whole, mine = x.clone().requires_grad_(), x[of.share].clone(memory_format=torch.preserve_format).requires_grad_()
        expected, found = plain(whole), split(mine)
        assert found.dtype == expected.dtype and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(found, expected[of.share], atol=atol, rtol=atol)
        expected.backward(outward)
        found.backward(outward[of.share])
        assert torch.allclose(mine.grad, whole.grad[of.share], atol=atol, rtol=atol)
        total = group.gather(torch.stack([split[0].weight.grad, split[0].bias.grad])).sum(0)
        assert torch.allclose(total, torch.stack([plain.weight.grad, plain.bias.grad]), atol=20 * atol, rtol=atol)
        for name, value in plain.named_buffers():
            assert torch.allclose(split[0].get_buffer(name), value, atol=1e-3), name
        split.eval(), plain.eval()
        assert torch.equal(split(x), torch.nn.functional.batch_norm(
            x, split[0].running_mean, split[0].running_var, split[0].weight, split[0].bias)), "in evaluation it is the plain layer"
    dropout = torch.nn.Sequential(torch.nn.Dropout(0.5))
    synchronise(dropout, group.gather, of.share, norms=True)
    x, dropout[0].whole = torch.randn(7, 9, generator=generator), 7
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x[of.share]), expected[of.share])
    norm = torch.nn.BatchNorm2d(3)
    norm.running_mean += rank
    group.equalise(norm)
    assert norm.running_mean.tolist() == [(of.world - 1) / 2] * 3


def check_shares(group, of, path):
    """Every sample of an epoch once over all processes; batches together are those of one process, by option."""
    beton, cpu = open_beton(path), torch.device("cpu")
    pixels = read_images(beton)
    odd = np.arange(3, 3 + 47)
    for shares in ("drawn", "fixed"):
        for drop_last, size, mode in itertools.product((True, False), (of.world, 6 * of.world), ("resident", "stream")):
            if mode == "stream" and (drop_last or size == of.world or (shares == "fixed") != (of.world == 2)):
                continue    # FFCV compiles for two seconds each time
            how = dict(batch_size=size, device=cpu, seed=5, drop_last=drop_last, indices=odd)
            with BatchLoader(beton, mode=mode, **how, of=of, shares=shares) as mine, BatchLoader(beton, mode="resident", **how) as one:
                assert len(mine) == len(one)
                for first in (0, 2):
                    everything = []
                    for number, (batch, whole) in enumerate(zip(mine.epoch(3, first), one.epoch(3, first), strict=True), first):
                        assert len(batch.indices) == of.share_of(mine.whole(number, len(odd))) and mine.whole(number, len(odd)) == len(whole.indices)
                        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[batch.indices.numpy()])
                        padded = torch.full((size,), -1)
                        padded[:len(batch.indices)] = batch.indices
                        found = sorted(i for i in group.gather(padded).flatten().tolist() if i >= 0)
                        everything += found
                        if shares == "drawn":
                            assert torch.equal(batch.indices, whole.indices[of.share]) and found == sorted(whole.indices.tolist())
                        else:
                            assert set(batch.indices.tolist()) <= set(odd[of.share].tolist())
                    assert len(set(everything)) == len(everything) and (drop_last or first or sorted(everything) == odd.tolist())
                if mode == "resident":
                    assert len(mine._resident[0]) == (len(odd[of.share]) if shares == "fixed" else len(odd))
    few = np.arange(of.world - 1)
    with BatchLoader(beton, batch_size=4 * of.world, device=cpu, indices=few, shuffle=False, of=of, shares="fixed") as loader:
        batches = list(loader.epoch(0))
        assert len(batches) == 1 and batches[0].indices.tolist() == few[of.share].tolist(), "one process has nothing to evaluate"


def check_arithmetic(settings, of):
    """Processes of unlike machines do not train together. Leaves no group behind that another training could join."""
    runtime.pick_dtype = lambda *_: torch.bfloat16 if of.rank else torch.float32
    try:
        train(settings)
        raise AssertionError("two number formats went unnoticed")
    except runtime.UserError as error:
        assert "process 1 has another kind of device or number format than process 0: give --run.device and --run.precision" in str(error)


def main():
    if sys.argv[1] == "train":
        import ffcv_train
        del sys.argv[1]
        runtime.has_ffcv = lambda: False
        return ffcv_train.main()
    folder = Path(sys.argv[1])
    of = runtime.launch()
    runtime.set_threads(1, of)
    with ranks.join(of, torch.device("cpu")) as group:
        check_collectives(group, of)
        check_norm(group, of)
        check_shares(group, of, folder / "train.beton")
    runtime.has_ffcv = lambda: False
    for name, settings in json.loads((folder / "plan.json").read_text()).items():
        result = train({**settings, "run.folder": str(folder / f"{name}-{of.world}")})
        (folder / f"{name}-{of.world}-{of.rank}.json").write_text(json.dumps(result))
    if of.world > 1:
        check_arithmetic({**settings, "run.folder": str(folder / f"unlike-{of.world}")}, of)


if __name__ == "__main__":
    runtime.run_program(main)
