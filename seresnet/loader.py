""".beton -> uint8 batches on the device, channels-last, with labels and sample indices; the one FFCV loader.

Sets that stay on the device are read once, raw ones without FFCV. FFCV decodes and nothing else: its own flips and crops take 13
seconds of compilation at the first epoch and cannot be seeded, so they belong to the device (augment.py). The order is ours too:
FFCV's is default_rng(seed + epoch), by which seed 0's second epoch is seed 1's first.
"""
from __future__ import annotations

import functools
import queue
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from seresnet import runtime
from seresnet.beton import Beton, read_in_parts
from seresnet.runtime import UserError

RESIDENT_SHARE = 0.25    # of the free memory: what `auto` lets a resident set take
PART = 1 << 14           # images that pass through main memory at once on their way to the device


class LoaderError(UserError):
    """Batches cannot be delivered: the message names the beton and the reason."""


class Batch(NamedTuple):
    """images: uint8 (B, 3, H, W), channels-last; labels, indices: int64 (B,); all on the device. Valid until the next
    batch is asked for: `stream` uses a batch's memory again."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(samples), int64: the order of the samples in `epoch` of the run with `seed`.

    One 64-bit draw a sample, sorted. The draws are the raw output of Philox (Salmon et al., SC 2011) keyed by numpy's
    SeedSequence of both numbers; both are fixed by their definition, unlike Generator.permutation, so the order is the
    same on every machine and for every numpy, and any epoch can be computed without those before it.
    """
    draws = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(samples)
    return np.argsort(draws, kind="stable")


def holdout_split(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): sorted int64 indices, disjoint and together all. Held out are the last images of each class in
    the beton's order, `size` in all, as many of each class. It depends on nothing else, so that every recipe is tuned on
    the same images.

    Raises LoaderError where a class has too few images to give its share and keep one.
    """
    classes = int(labels.max()) + 1
    a_class, remainder = divmod(size, classes)
    if remainder:
        raise LoaderError(f"evaluate.holdout_size: got {size}, expected a multiple of the {classes} classes")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() <= a_class:
        fewest = int(counts.min())
        way = (f"give at most {(fewest - 1) * classes}, such as --evaluate.holdout_size {max(1, fewest // 5) * classes}" if fewest > 1
               else "it wants more images, or --evaluate.split test")
        raise LoaderError(f"evaluate.holdout_size: got {size}, {a_class} images a class, but class {counts.argmin()} has only {fewest}: {way}")
    held = np.concatenate([np.flatnonzero(labels == c)[-a_class:] for c in range(classes)])
    is_held = np.zeros(len(labels), bool)
    is_held[held] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


class BatchLoader:
    """Batches of a beton, an epoch at a time.

    mode: `stream` reads through FFCV every epoch, for sets of any size; `resident` reads once (raw pixels by beton.py, JPEGs through
    FFCV where it is installed) and keeps the pixels as uint8 on the device, batches being gathers from them; `auto`
    keeps what fits into a quarter of the free memory, or anything where FFCV is missing. All modes yield the same batches
    for the same seed (but for JPEGs read without FFCV, see beton.read_images).
    of, shares: with several processes `batch_size` is theirs together, and divided by them; each gets every n-th sample of
    every batch. With `drawn` the batches together are those of one process, so `resident` keeps a copy of the set in each; with
    `fixed` a process gets the same part of the set in every epoch, in that epoch's order, and keeps or reads that part alone.
    indices: the samples to deliver, int64, all where None; in this order where `shuffle` is off.
    workers: decoding threads of FFCV, 0 for one: copying raw pixels never waits for more, and a second thread takes its
    core from the training (records/: loader). batches_ahead: batches that `stream` prepares in advance.
    timeout_seconds: how long a batch may take before the reader counts as stuck.

    Attributes: `mode` (stream or resident), `indices`, `samples` (their number, before drop_last); len() gives the batches an epoch.
    Raises LoaderError where an epoch would be empty or an index is not in the beton.
    """

    def __init__(self, beton: Beton, *, batch_size: int, device: torch.device, mode: str = "auto", seed: int = 0,
                 shuffle: bool = True, drop_last: bool = False, indices: np.ndarray | None = None, workers: int = 0,
                 batches_ahead: int = 3, timeout_seconds: float = 120.0, of: runtime.Launch = runtime.Launch(),
                 shares: str = "drawn"):
        indices = np.arange(beton.samples) if indices is None else np.asarray(indices, np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= beton.samples):
            raise LoaderError(f"{beton.path}: has {beton.samples} samples, asked for indices from {indices.min()} to "
                              f"{indices.max()}")
        if len(indices) == 0 or (drop_last and len(indices) < batch_size):
            raise LoaderError(f"{beton.path}: {len(indices)} images give no batch of loader.batch_size = {batch_size} with "
                              "loader.drop_last = true: choose a smaller batch, or --loader.drop_last false")
        self.samples, self.indices = len(indices), indices
        self._of, self._fixed = of, shares == "fixed" and of.world > 1
        self._here = indices[of.share] if self._fixed else indices    # what this process reads in the course of time
        held = len(self._here) * (of.local_world if device.type == "cpu" else 1)    # by all that share the memory
        self.mode = _pick_mode(mode, held * beton.height * beton.width * 3, device)
        self._beton, self._device = beton, device
        self._batch_size, self._seed, self._shuffle, self._drop_last = batch_size, seed, shuffle, drop_last
        self._share_size = batch_size // of.world
        self._stream = _Stream(beton, max(1, min(self._share_size, of.share_of(self.samples))), device,
                               min(workers or 1, runtime.available_cores()), batches_ahead, timeout_seconds)
        self._resident: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.batches(self.samples)

    def batches(self, samples: int) -> int:
        """How many batches an epoch of so many samples has."""
        return samples // self._batch_size if self._drop_last else -(-samples // self._batch_size)

    def whole(self, number: int, samples: int) -> int:
        """How many samples batch `number` of an epoch of `samples` has, in all processes together."""
        return min(self._batch_size, samples - number * self._batch_size)

    def epoch(self, epoch: int, first_batch: int = 0, only: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches of `epoch`, counted from 0, from its `first_batch` on; any of them at any time. Leaving the iterator
        early, by break or close(), ends its reader thread and frees its memory.

        only: bool, one for each sample of the beton: those to deliver, in the order in which they stand among all; all where None.
        ValueError with `fixed` shares, of which one could hold more of them than another.
        All processes get as many batches; one that has no sample of the last gets it empty.

        Raises LoaderError where the beton cannot be read any more, within a second of the failure.
        """
        order = epoch_order(self.samples, self._seed, epoch) if self._shuffle else np.arange(self.samples)
        if only is not None:
            if self._fixed:
                raise ValueError("only: shares are fixed, expected drawn")
            order = order[only[self.indices[order]]]
        count = self.batches(len(order))
        if first_batch >= count:
            return iter(())
        of, size = self._of, self._share_size
        if self._fixed:
            order = order[order % of.world == of.rank] // of.world    # places among the samples of this process
        else:
            order = order[of.share]    # processes divide a batch: each has its part of every one
        order = order[first_batch * size:count * size]
        if not len(order):
            batches = iter(())
        else:
            batches = self._gather(order) if self.mode == "resident" else self._stream.read(self._here[order])
        lacking = count - first_batch - -(-len(order) // size)
        return batches if not lacking else self._and_empty(batches)

    def _and_empty(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from batches
        images = torch.empty((0, self._beton.height, self._beton.width, 3), dtype=torch.uint8, device=self._device)
        yield Batch(images.permute(0, 3, 1, 2), *(torch.empty(0, dtype=torch.int64, device=self._device) for _ in range(2)))

    def close(self) -> None:
        """Forget the pixels that are kept on the device, and FFCV's compiled pipeline."""
        self._resident = None
        self._stream.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _gather(self, order: np.ndarray) -> Iterator[Batch]:
        if self._resident is None:
            self._resident = self._keep()
        pixels, labels, indices = self._resident
        positions = torch.from_numpy(order).to(self._device)
        for chosen in positions.split(self._share_size):
            yield Batch(pixels.index_select(0, chosen).permute(0, 3, 1, 2), labels.index_select(0, chosen),
                        indices.index_select(0, chosen))

    def _keep(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All samples of this process in the order of `indices`, on the device: pixels uint8 (N, H, W, 3), labels and indices
        int64 (N,)."""
        shape = len(self._here), self._beton.height, self._beton.width, 3
        pixels, filled = torch.empty(shape, dtype=torch.uint8, device=self._device), 0
        with_ffcv = self._beton.storage == "jpeg" and not runtime.why_no_ffcv()    # FFCV would compile for two seconds to copy raw pixels once
        for images in self._decoded() if with_ffcv else self._read():
            pixels[filled:filled + len(images)] = images
            filled += len(images)
        if filled != len(pixels):
            raise LoaderError(f"{self._beton.path}: read {filled} of {len(pixels)} samples")
        self._stream.close()
        indices = torch.from_numpy(np.ascontiguousarray(self._here))
        return pixels, torch.from_numpy(self._beton.labels[self._here]).to(self._device), indices.to(self._device)

    def _decoded(self) -> Iterator[torch.Tensor]:
        for batch in self._stream.read(self._here):
            yield batch.images.permute(0, 2, 3, 1)

    def _read(self) -> Iterator[torch.Tensor]:
        self._beton.check_unchanged()
        yield from map(torch.from_numpy, read_in_parts(self._beton, self._here, PART))


def _pick_mode(mode: str, size: int, device: torch.device) -> str:
    if mode == "resident" or (mode == "auto" and size <= RESIDENT_SHARE * runtime.free_memory(device)):
        return "resident"
    why = runtime.why_no_ffcv()
    if not why:
        return "stream"
    room = runtime.free_memory(device)
    if mode == "stream" or size > room:
        raise LoaderError(f"loader.mode: {mode}: the images take {size >> 20} MiB of {room >> 20} free, and without FFCV ({why}) they "
                          "are kept in memory: install FFCV (README, \"Install\"; python -m seresnet.doctor says what it lacks), or let "
                          "loader.mode be auto for a set that fits")
    return "resident"


class _Stream:
    """FFCV behind a generator: pixels by FFCV's compiled decoder, labels from the checked beton."""

    def __init__(self, beton: Beton, batch_size: int, device: torch.device, workers: int, batches_ahead: int,
                 timeout_seconds: float):
        self._beton, self._batch_size, self._device, self._workers = beton, batch_size, device, workers
        self._batches_ahead, self._timeout_seconds = batches_ahead, timeout_seconds
        self._loader = None
        self._labels = torch.from_numpy(beton.labels)

    def close(self) -> None:
        if self._loader is not None:    # FFCV's objects refer to one another: the file would stay open until Python looks for circles
            self._loader.memory_manager.context.mmap = None
        self._loader = None

    def read(self, order: np.ndarray) -> Iterator[Batch]:
        """Batches of the samples in `order`, int64."""
        self._beton.check_unchanged()
        order = np.ascontiguousarray(order)
        # The threads are set back after FFCV's loader and iterator are built and before a batch is waited for. Buffers made in the
        # consumer's inference mode would refuse what the reader's thread copies to a GPU.
        with runtime.torch_threads_kept(), torch.inference_mode(False):
            if self._loader is None:
                self._loader = _build_ffcv_loader(self._beton, self._batch_size, self._device, self._workers,
                                                  self._batches_ahead)
            reading = _reading()(self._loader, order)
        done = 0
        try:
            while done < len(order):
                images, = self._next(reading)
                indices = torch.from_numpy(order[done:done + len(images)])
                done += len(images)
                labels = self._labels[indices]
                if self._device.type == "cuda":
                    labels, indices = (v.pin_memory().to(self._device, non_blocking=True) for v in (labels, indices))
                yield Batch(images.permute(0, 3, 1, 2), labels.to(self._device), indices.to(self._device))
        finally:
            reading.stop()

    def _next(self, reading) -> tuple[torch.Tensor, ...]:
        """FFCV's next batch. It waits without end for a thread that may have died; here its exception comes out."""
        give_up = time.monotonic() + self._timeout_seconds
        while True:
            try:
                slot, result = reading.output_queue.get(timeout=0.2)
                break
            except queue.Empty:
                if not reading.is_alive() and reading.output_queue.empty():
                    raise LoaderError(f"{self._beton.path}: FFCV's reader thread ended without a word") from None
                if time.monotonic() > give_up:
                    raise LoaderError(f"{self._beton.path}: no batch for {self._timeout_seconds:.0f} s: FFCV's reader is "
                                      "stuck; is the disk that holds the file still answering?") from None
        if isinstance(result, BaseException):
            raise LoaderError(f"{self._beton.path}: FFCV could not read a batch ({type(result).__name__}: {result})"
                              ) from result
        if self._device.type == "cuda":
            reading.current_stream.wait_stream(reading.cuda_streams[slot])
        return result


def _build_ffcv_loader(beton: Beton, batch_size: int, device: torch.device, workers: int, batches_ahead: int):
    runtime.import_ffcv()
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToDevice, ToTensor
    image = [SimpleRGBImageDecoder(), ToTensor(), *([] if device.type == "cpu" else [ToDevice(device)])]
    try:
        return Loader(str(beton.path), batch_size, num_workers=workers, os_cache=True, drop_last=False,
                      batches_ahead=batches_ahead, pipelines={"image": image, "label": None})
    except Exception as error:    # FFCV and numba raise what the file or the machine leads them to
        raise LoaderError(f"{beton.path}: FFCV cannot open it ({type(error).__name__}: {error})") from error


@functools.cache
def _reading():
    """FFCV's EpochIterator, a running pass of a loader over an order, its thread's loop replaced by one that hands exceptions
    over, ends when told to, and leaves torch's thread count alone."""
    import numba
    from ffcv.loader.epoch_iterator import EpochIterator

    class Reading(EpochIterator):
        def run(self):
            slots = len(self.cuda_streams)    # buffers: one is being filled, one consumed, batches_ahead are waiting
            consumed = [None] * slots         # CUDA events after which a buffer may be filled again
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(self.current_stream.device)    # a new thread's is the first GPU, where it would make a context
            try:
                numba.set_num_threads(self.loader.num_workers)    # this thread's own number
                for number, indices in enumerate(self.iter_ixes):
                    slot = number % slots
                    if cuda:
                        # FFCV fills pinned memory on the host, from which an earlier batch may still wait to be copied; that event
                        # holds up the device alone.
                        self.cuda_streams[slot].synchronize()
                    result = self.run_pipeline(number, indices, slot, consumed[slot])
                    if not self.hand_over((slot, result)):
                        return
                    if cuda:
                        # The queue took this batch, so the consumer has asked for the one `batches_ahead` before it
                        # and is done with the one before that: its buffer is free when what is queued now is done.
                        event = torch.cuda.Event()
                        event.record(self.current_stream)
                        consumed[(slot - self.loader.batches_ahead - 1) % slots] = event
            except BaseException as error:
                self.hand_over((0, error))

        def hand_over(self, item) -> bool:
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    pass
            return False

        def stop(self):
            self.close()    # sets terminate_event and leaves FFCV's memory context
            self.join(timeout=5)

    return Reading
