"""loader: both modes give the same batches, every sample once, in our order; failures come out, nothing leaks."""
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seresnet import loader, runtime
from seresnet.beton import BetonError, write_beton
from seresnet.loader import BatchLoader, LoaderError, epoch_order, holdout_split

CPU = torch.device("cpu")
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts from /proc")
MODES = ("stream", "resident")


@pytest.fixture(scope="module")
def noise(tmp_path_factory, make_split):
    """(beton, split) of 101 images of 8 x 8 pixels."""
    split = make_split(101, 8)
    path = tmp_path_factory.mktemp("noise") / "noise.beton"
    return write_beton(path, split, classes=("a", "b", "c"), name="noise", source="test", fingerprint="f"), split


def collect(batches):
    """Copies of (images (N, H, W, 3), labels, indices) and the batch sizes."""
    parts = [(b.images.permute(0, 2, 3, 1).clone(), b.labels.clone(), b.indices.clone()) for b in batches]
    return [torch.cat(column).numpy() for column in zip(*parts)], [len(p[1]) for p in parts]


# -- order --------------------------------------------------------------------------------------------------------------

def test_the_order_is_fixed_by_its_definition():
    # first entries, once computed: they have to stay, on every machine and with every numpy, or no run can be repeated
    assert epoch_order(50000, 0, 0)[:4].tolist() == EXPECTED[0]
    assert epoch_order(50000, 7, 3)[:4].tolist() == EXPECTED[1]


EXPECTED = ([18634, 19031, 31749, 40765], [45017, 36162, 47407, 14147])


@pytest.mark.parametrize("samples", [1, 2, 101, 5000])
def test_an_order_is_a_permutation(samples):
    for epoch in range(3):
        order = epoch_order(samples, 5, epoch)
        assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(samples))


def test_seeds_and_epochs_share_no_order():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(12) for epoch in range(12)]
    assert len(set(orders)) == len(orders)


def test_orders_are_uniform():
    where = np.array([np.flatnonzero(epoch_order(10, 3, epoch) == 0)[0] for epoch in range(4000)])
    counts = np.bincount(where, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9    # chi-squared, 9 degrees of freedom, one in a thousand


def test_the_holdout_is_balanced_disjoint_and_fixed():
    labels = np.random.default_rng(0).permutation(np.arange(1000) % 10)
    kept, held = holdout_split(labels, 100)
    assert np.bincount(labels[held]).tolist() == [10] * 10 and len(kept) == 900
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(1000))
    assert np.array_equal(held, np.sort(held)) and np.array_equal(kept, np.sort(kept))
    assert held[labels[held] == 3].tolist() == np.flatnonzero(labels == 3)[-10:].tolist()
    with pytest.raises(LoaderError, match="multiple of the 10 classes"):
        holdout_split(labels, 101)
    with pytest.raises(LoaderError, match="only 100: give at most 990, such as --evaluate.holdout_size 200"):
        holdout_split(labels, 1000)


# -- batches ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size, drop_last", [(10, False), (10, True), (101, True), (100, False), (500, False), (1, True)])
def test_every_sample_once_with_its_own_pixels_and_label(noise, mode, batch_size, drop_last):
    beton, split = noise
    with BatchLoader(beton, batch_size=batch_size, device=CPU, mode=mode, seed=3, drop_last=drop_last) as batches:
        for epoch in (0, 4):
            (images, labels, indices), sizes = collect(batches.epoch(epoch))
            assert len(sizes) == len(batches) and sum(sizes) == len(indices)
            assert len(set(indices.tolist())) == len(indices) == (len(batches) * batch_size if drop_last else 101)
            assert np.array_equal(images, split.images[indices]) and np.array_equal(labels, split.labels[indices])
            assert np.array_equal(indices, epoch_order(101, 3, epoch)[:len(indices)])


@pytest.mark.parametrize("settings", [dict(), dict(drop_last=True), dict(shuffle=False), dict(indices=np.arange(5, 90, 3)),
                                      dict(indices=np.array([7, 3, 3, 100]), shuffle=False), dict(workers=2)])
def test_both_modes_yield_the_same_batches(noise, settings):
    beton, _ = noise
    settings = {**dict(batch_size=4, device=CPU, seed=1), **settings}
    with BatchLoader(beton, mode="stream", **settings) as a, BatchLoader(beton, mode="resident", **settings) as b:
        assert len(a) == len(b)
        for epoch in (2, 0):
            for one, two in zip(a.epoch(epoch), b.epoch(epoch), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(one, two))


@pytest.mark.parametrize("mode", MODES)
def test_batches_keep_the_contract(noise, mode):
    beton, _ = noise
    with BatchLoader(beton, batch_size=32, device=CPU, mode=mode) as batches:
        for batch in batches.epoch(0):
            assert batch.images.shape[1:] == (3, 8, 8) and batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.labels.dtype == batch.indices.dtype == torch.int64 and batch.labels.ndim == 1
            assert batch.images.device == batch.labels.device == batch.indices.device == CPU


@pytest.mark.parametrize("mode", MODES)
def test_a_subset_in_its_own_order(noise, mode):
    beton, split = noise
    wanted = np.array([50, 3, 99, 4, 8])
    with BatchLoader(beton, batch_size=2, device=CPU, mode=mode, shuffle=False, indices=wanted) as batches:
        (images, _, indices), sizes = collect(batches.epoch(7))
    assert indices.tolist() == wanted.tolist() and np.array_equal(images, split.images[wanted]) and sizes == [2, 2, 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_part_of_an_epoch_keeps_the_order_of_all(noise, mode, drop_last):
    beton, split = noise
    only = np.arange(101) % 3 > 0
    with BatchLoader(beton, batch_size=7, device=CPU, mode=mode, seed=3, drop_last=drop_last, indices=np.arange(10, 95)) as batches:
        (images, _, indices), sizes = collect(batches.epoch(2, only=only))
        expected = [i + 10 for i in epoch_order(85, 3, 2).tolist() if only[i + 10]]
        count = len(expected) // 7 * 7 if drop_last else len(expected)
        assert indices.tolist() == expected[:count] and np.array_equal(images, split.images[indices])
        assert len(sizes) == batches.batches(len(expected)) < len(batches)
        assert [batches.whole(number, len(expected)) for number in range(len(sizes))] == sizes
        (_, _, rest), _ = collect(batches.epoch(2, 3, only))
        assert rest.tolist() == indices[21:].tolist()
        assert list(batches.epoch(2, len(sizes), only)) == []


def test_auto_keeps_what_fits(noise, monkeypatch):
    beton, _ = noise
    size = 101 * 8 * 8 * 3
    monkeypatch.setattr(runtime, "free_memory", lambda device: 4 * size)
    assert BatchLoader(beton, batch_size=10, device=CPU).mode == "resident"
    monkeypatch.setattr(runtime, "free_memory", lambda device: 4 * size - 4)
    assert BatchLoader(beton, batch_size=10, device=CPU).mode == "stream"
    assert runtime.free_memory(CPU) > 0


@pytest.mark.parametrize("mode", MODES)
def test_real_cifar10_pixel_for_pixel(cifar10_dir, tmp_path, mode):
    from seresnet.sources import find_source
    images = find_source(cifar10_dir).read()
    beton = write_beton(tmp_path / "x.beton", images.train, classes=images.classes, name="cifar10", source="x", fingerprint="f")
    with BatchLoader(beton, batch_size=500, device=CPU, mode=mode) as batches:
        seen = np.zeros(50000, bool)
        for batch in batches.epoch(0):
            at = batch.indices.numpy()
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images.train.images[at])
            assert np.array_equal(batch.labels.numpy(), images.train.labels[at])
            seen[at] = True
        assert seen.all()


def test_several_passes_at_once_do_not_disturb_each_other(noise):
    beton, split = noise
    with BatchLoader(beton, batch_size=10, device=CPU, mode="stream", workers=2) as batches:
        for one, two in zip(batches.epoch(0), batches.epoch(1)):
            for batch in (one, two):
                assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), split.images[batch.indices.numpy()])


def test_buffers_are_made_outside_the_inference_mode_of_an_evaluation(noise, monkeypatch):
    """FFCV's thread copies to a GPU into buffers that are made with the reader, and it is in no inference mode."""
    modes, build = [], loader._build_ffcv_loader
    reading = loader._reading()

    class Watched(reading):
        def __init__(self, *arguments):
            modes.append(torch.is_inference_mode_enabled())
            super().__init__(*arguments)
    monkeypatch.setattr(loader, "_reading", lambda: Watched)
    monkeypatch.setattr(loader, "_build_ffcv_loader", lambda *a: (modes.append(torch.is_inference_mode_enabled()), build(*a))[1])
    with BatchLoader(noise[0], batch_size=50, device=CPU, mode="stream") as batches, torch.inference_mode():
        assert len(collect(batches.epoch(0))[1]) == 3
        assert torch.is_inference_mode_enabled()
    assert modes == [False, False]


def test_on_a_gpu_pinned_memory_is_filled_when_its_last_copy_is_done(monkeypatch):
    """The reader's loop with a GPU that only takes notes: FFCV waits on the device, and fills what the host may still be copying from."""
    log, slots = [], 5
    streams = [SimpleNamespace(synchronize=lambda slot=slot: log.append(("copied", slot))) for slot in range(slots)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    reader = SimpleNamespace(
        cuda_streams=streams, current_stream=SimpleNamespace(device="cuda:1"), loader=SimpleNamespace(num_workers=1, batches_ahead=3),
        iter_ixes=[None] * 12, hand_over=lambda item: not isinstance(item[1], BaseException) or pytest.fail(str(item[1])),
        run_pipeline=lambda number, indices, slot, event: log.append(("filled", slot, event is not None)))
    loader._reading().run(reader)
    assert log[0] == ("device", "cuda:1")
    for number in range(12):
        assert log[1 + 2 * number:3 + 2 * number] == [("copied", number % slots), ("filled", number % slots, number > 0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_host_far_ahead_of_its_gpu_gets_the_right_images(noise):
    beton, split = noise
    with BatchLoader(beton, batch_size=5, device=torch.device("cuda:0"), mode="stream") as batches:
        kept = []
        for batch in batches.epoch(0):
            torch.cuda._sleep(10**8)    # cycles, some 50 ms: the host is soon as far ahead as it may be
            kept.append((batch.images.clone(), batch.indices))
    assert len(kept) == 21
    for images, indices in kept:
        assert np.array_equal(images.permute(0, 2, 3, 1).cpu().numpy(), split.images[indices.cpu().numpy()])


# -- faults -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
def test_torchs_threads_are_untouched(noise, mode):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with BatchLoader(noise[0], batch_size=10, device=CPU, mode=mode, workers=1) as batches:
            for _ in batches.epoch(0):
                assert torch.get_num_threads() == 2
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("settings, message", [
    (dict(batch_size=102, drop_last=True), "101 images give no batch of loader.batch_size = 102"),
    (dict(batch_size=1, indices=np.array([], np.int64)), "0 images give no batch"),
    (dict(batch_size=1, indices=np.array([0, 101])), "101 samples, asked for indices from 0 to 101"),
    (dict(batch_size=1, indices=np.array([-1])), "indices from -1")])
def test_an_empty_pass_is_an_error(noise, settings, message):
    with pytest.raises(LoaderError, match=message):
        BatchLoader(noise[0], device=CPU, **settings)


@pytest.mark.parametrize("mode, storage", [("stream", "raw"), ("stream", "jpeg"), ("resident", "jpeg")])
def test_a_failing_pipeline_comes_out_within_five_seconds(tmp_path, make_split, mode, storage, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator
    written = write_beton(tmp_path / "noise.beton", make_split(101, 8), classes=("a", "b", "c"), name="x", source="x", fingerprint="f",
                          storage=storage)
    whole = EpochIterator.run_pipeline

    def fails(self, b_ix, *arguments):
        if b_ix == 3:
            raise RuntimeError("a broken decoder")
        return whole(self, b_ix, *arguments)
    with BatchLoader(written, batch_size=5, device=CPU, mode=mode) as batches:
        next(batches.epoch(0))    # compiled
        batches._resident = None
        monkeypatch.setattr(EpochIterator, "run_pipeline", fails)
        started = time.perf_counter()
        with pytest.raises(LoaderError, match="noise.beton: FFCV could not read a batch .RuntimeError: a broken decoder"):
            list(batches.epoch(0))
        assert time.perf_counter() - started < 5
        monkeypatch.undo()
        assert len(list(batches.epoch(0))) == len(batches)    # and the loader goes on


def test_a_reader_that_dies_in_silence_is_noticed(noise, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    def dies(self, *_):
        self.terminate_event.set()    # hand_over gives up: the thread ends without a word
        return ()
    with BatchLoader(noise[0], batch_size=5, device=CPU, mode="stream") as batches:
        monkeypatch.setattr(EpochIterator, "run_pipeline", dies)
        with pytest.raises(LoaderError, match="ended without a word"):
            list(batches.epoch(0))


def test_a_stuck_reader_is_given_up(noise, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator
    free = threading.Event()
    with BatchLoader(noise[0], batch_size=5, device=CPU, mode="stream", timeout_seconds=0.5) as batches:
        next(batches.epoch(0))
        monkeypatch.setattr(EpochIterator, "run_pipeline", lambda self, *_: free.wait(3) and ())
        with pytest.raises(LoaderError, match="no batch for 0 s: FFCV's reader is stuck"):
            list(batches.epoch(0))
        free.set()


def reader_threads():
    return [t for t in threading.enumerate() if type(t).__name__ == "Reading"]


@pytest.mark.parametrize("leave_after", [1, 19, 21])
def test_leaving_early_leaks_no_thread(noise, leave_after):
    with BatchLoader(noise[0], batch_size=5, device=CPU, mode="stream") as batches:
        assert len(batches) == 21
        for epoch in range(12):
            for i, _ in enumerate(batches.epoch(epoch), 1):
                if i == leave_after:
                    break
            assert not reader_threads()
        unused = batches.epoch(0)
        next(unused)
        del unused
        assert not reader_threads()


def resources():
    """(threads, open files) of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@linux_only
def test_fifty_epochs_and_fifty_early_breaks_leave_threads_files_and_memory_flat(noise, faults):
    def memory():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10
    with BatchLoader(noise[0], batch_size=20, device=CPU, mode="stream") as batches:
        for epoch in range(20):
            list(batches.epoch(epoch))
        counted, size = resources(), memory()
        for epoch in range(50):
            assert len(list(batches.epoch(epoch))) == 6
        for epoch in range(50):
            for i, _ in enumerate(batches.epoch(epoch)):
                if i == epoch % 6:
                    break
        assert resources() == counted and memory() < size + 4096, "KiB"
    faults(50)


@linux_only
def test_a_closed_loader_keeps_no_file_open_and_the_next_compiles_nothing(noise):
    import gc
    from numba.core import dispatcher
    compiled = []
    whole = dispatcher.Dispatcher.compile

    def counted(self, *arguments):
        compiled.append(self)
        return whole(self, *arguments)
    list(BatchLoader(noise[0], batch_size=10, device=CPU, mode="stream").epoch(0))
    gc.collect()
    gc.disable()    # Python's search for circles would close the files, some time
    try:
        dispatcher.Dispatcher.compile = counted
        before = resources()
        for _ in range(5):
            with BatchLoader(noise[0], batch_size=10, device=CPU, mode="stream") as batches:
                list(batches.epoch(0))
        assert resources() == before and not compiled
    finally:
        dispatcher.Dispatcher.compile = whole
        gc.enable()


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_does_not_change_until_the_next_is_asked_for(noise, mode):
    beton, split = noise
    with BatchLoader(beton, batch_size=5, device=CPU, mode=mode) as batches:
        kept = []
        for batch in batches.epoch(0):
            time.sleep(0.002)    # the reader fills every buffer that it may
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), split.images[batch.indices.numpy()])
            kept.append((batch.images.clone(), batch.indices.clone()))
        for images, indices in kept:
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), split.images[indices.numpy()])


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.touch()])
def test_a_file_that_changed_under_a_training_is_noticed(tmp_path, make_split, change):
    beton = write_beton(tmp_path / "x.beton", make_split(), classes=("a", "b", "c"), name="n", source="s", fingerprint="f")
    with BatchLoader(beton, batch_size=10, device=CPU, mode="stream") as batches:
        list(batches.epoch(0))
        time.sleep(0.02)
        change(beton.path)
        with pytest.raises(BetonError, match="x.beton: .*(No such file|was changed while it was in use)"):
            list(batches.epoch(1))


def test_a_worker_count_above_the_cores_is_cut(noise):
    with BatchLoader(noise[0], batch_size=10, device=CPU, mode="stream", workers=64) as batches:
        assert len(list(batches.epoch(0))) == 11


def test_ffcvs_errors_name_the_file(noise, monkeypatch):
    import ffcv.loader

    def refuses(*_, **__):
        raise AssertionError("file format mismatch")
    monkeypatch.setattr(ffcv.loader, "Loader", refuses)
    with pytest.raises(LoaderError, match="noise.beton: FFCV cannot open it .AssertionError: file format mismatch"):
        list(BatchLoader(noise[0], batch_size=10, device=CPU, mode="stream").epoch(0))


def test_words_of_the_config_are_those_of_the_module():
    from seresnet import config
    assert config.Loader.__dataclass_fields__["mode"].metadata["limits"]["one_of"] == ("auto", *MODES)


@pytest.mark.parametrize("part", [7, 1000])
def test_jpegs_are_kept_as_ffcv_decodes_them_and_raw_pixels_without_it(tmp_path, make_split, monkeypatch, part):
    monkeypatch.setattr("seresnet.loader.PART", part)
    how = dict(batch_size=16, device=CPU, seed=3, indices=np.arange(10, 90))
    for storage in ("jpeg", "raw"):
        written = write_beton(tmp_path / f"{storage}.beton", make_split(100, 8), classes=("a", "b", "c"), name="x", source="x",
                              fingerprint="f", storage=storage)
        with BatchLoader(written, mode="stream", **how) as loader:
            expected = [[part.clone() for part in batch] for batch in loader.epoch(2)]
        if storage == "raw":
            monkeypatch.setattr("seresnet.runtime.import_ffcv", lambda: pytest.fail("FFCV was imported"))
        with BatchLoader(written, mode="resident", **how) as loader:
            found = [list(batch) for batch in loader.epoch(2)]
        assert len(found) == 5 and all(torch.equal(a, b) for x, y in zip(expected, found) for a, b in zip(x, y))


# -- without FFCV -------------------------------------------------------------------------------------------------------

@pytest.fixture
def without_ffcv(monkeypatch):
    monkeypatch.setattr("seresnet.runtime.has_ffcv", lambda: False)
    monkeypatch.setattr("seresnet.runtime.import_ffcv", lambda: pytest.fail("FFCV was imported"))


def test_without_ffcv_the_same_batches_come_from_memory(tmp_path, make_split, request):
    written = write_beton(tmp_path / "x.beton", make_split(100, 8), classes=("a", "b", "c"), name="x", source="x", fingerprint="f")
    how = dict(batch_size=16, device=torch.device("cpu"), seed=3, indices=np.arange(10, 90))
    with BatchLoader(written, mode="stream", **how) as loader:
        expected = [[part.clone() for part in batch] for batch in loader.epoch(2)]
    request.getfixturevalue("without_ffcv")
    with BatchLoader(written, **how) as loader:
        assert loader.mode == "resident"
        found = [[part.clone() for part in batch] for batch in loader.epoch(2)]
    assert len(found) == 5 and all(torch.equal(a, b) for x, y in zip(expected, found) for a, b in zip(x, y))


def test_an_ffcv_that_cannot_be_imported_is_as_none(tmp_path, make_split, monkeypatch):
    """Installed, but a library of the system is missing."""
    def broken():
        raise ImportError("libopencv_core.so.406: cannot open shared object file")
    monkeypatch.setattr("seresnet.runtime.import_ffcv", broken)
    monkeypatch.setattr("seresnet.runtime.has_ffcv", lambda: True)
    about = dict(classes=("a", "b", "c"), name="x", source="x", fingerprint="f")
    written = write_beton(tmp_path / "x.beton", make_split(100, 8), storage="jpeg", **about)
    how = dict(batch_size=16, device=torch.device("cpu"))
    with pytest.raises(LoaderError, match="without FFCV .ImportError: libopencv_core.so.406: cannot open.*seresnet.doctor"):
        BatchLoader(written, mode="stream", **how)
    monkeypatch.setattr("seresnet.runtime.free_memory_of_machine", lambda: 30_000)    # more than all, less than four times as much
    with BatchLoader(written, **how) as loader:
        assert loader.mode == "resident" and sum(len(batch.labels) for batch in loader.epoch(0)) == 100


def test_without_ffcv_streaming_is_refused_with_the_way_out(tmp_path, make_split, without_ffcv, monkeypatch):
    written = write_beton(tmp_path / "x.beton", make_split(100, 8), classes=("a", "b", "c"), name="x", source="x", fingerprint="f")
    how = dict(batch_size=16, device=torch.device("cpu"))
    with pytest.raises(LoaderError, match="loader.mode: stream.*install FFCV"):
        BatchLoader(written, mode="stream", **how)
    monkeypatch.setattr("seresnet.runtime.free_memory_of_machine", lambda: 30_000)
    assert BatchLoader(written, **how).mode == "resident", "more than a quarter of the memory, but it fits"
    monkeypatch.setattr("seresnet.runtime.free_memory_of_machine", lambda: 10_000)
    with pytest.raises(LoaderError, match="kept in memory: install FFCV"):
        BatchLoader(written, **how)
