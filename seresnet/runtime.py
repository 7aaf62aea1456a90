"""The one file that reads the environment: errors, cores, device, number format, seeds, allocator, versions.

It imports nothing of ours, and torch only inside the functions that need it: the allocator has to be settled before
a large library is loaded.
"""
from __future__ import annotations

import atexit
import errno
import faulthandler
import gc
import glob
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

# glibc's defaults give every large tensor back to the kernel when it is freed, and the next one is paid for page by
# page. One arena that keeps what it got, in huge pages, makes a training step about a third shorter on a CPU
# (records/: allocator). glibc reads the variable once, before main(): hence one re-exec.
ALLOCATOR_TUNABLES = {
    "glibc.malloc.hugetlb": "1",                    # madvise(MADV_HUGEPAGE) on what malloc takes
    "glibc.malloc.mmap_threshold": str(1 << 40),    # never a private mapping that free() would unmap
    "glibc.malloc.trim_threshold": str(1 << 40),    # never hand the top of the heap back
    "glibc.malloc.top_pad": str(1 << 28),           # grow the heap 256 MiB at a time
}
# GNU's OpenMP, which torch brings on Linux, has its threads look out 300,000 times, some 16 ms, for each other. Alone they seldom have
# to. Where another program computes on a core, the one that is waited for cannot run while the others look out: two trainings at once
# took six times as long as with this number, which costs a training alone nothing (records/2026-11-27_waiting).
SPINS = "5000"
# What every program imports; terminaltables is what fastargs imports and does not ask for. doctor says how each is installed.
NEEDED = {"torch": "pip install torch", "numpy": "pip install numpy", "fastargs": "pip install fastargs",
          "terminaltables": "pip install terminaltables", "yaml": "pip install PyYAML", "PIL": "pip install pillow"}
DEVICES = r"auto|cpu|mps|cuda(:\d{1,2})?"    # what run.device and --device may be
_TUNED_MARK = "SERESNET_ALLOCATOR"
LOADED = time.perf_counter()


class UserError(ValueError):
    """Something the user can mend. Programs print it without a traceback and exit with status 2.

    Takes one message or several; `problems` is the tuple of them and `str()` gives one a line. A subclass may
    choose another exit `status` where a caller (the Makefile) has to tell its case from the others.
    """

    status = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite. Programs print it without a traceback and exit with status 3."""


class DeviceFailed(UserError):
    """The device, or its driver, failed, and this process can do no more with it. Programs exit with status 5: another may go on."""

    status = 5


class Interrupted(BaseException):
    """A signal asked the program to stop, and what it was doing has been saved. `status` is 128 plus the signal's number.

    Not an Exception, like KeyboardInterrupt: nothing that handles failures may take it for one.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is: torchrun's variables, read once; one process where there are none.

    rank of `world` processes, local_rank of the `local_world` on this machine; `restarts` of the launcher so far; `job` names
    the launcher, the same before and after its restarts ('' without one).
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    restarts: int = 0
    job: str = ""

    @property
    def share(self) -> slice:
        """Of anything that belongs to all processes, an order or a batch, the part that is this one's."""
        return slice(self.rank, None, self.world)

    def share_of(self, count: int) -> int:
        """How many of `count` are this process's."""
        return len(range(self.rank, count, self.world))

    def problem_with_batch(self, batch_size: int) -> str:
        """'' where the processes can share a global batch evenly, else the message, with the nearest sizes that they can."""
        below = batch_size // self.world * self.world
        if below == batch_size:
            return ""
        near = " or ".join(str(size) for size in (below, below + self.world) if size)
        return f"loader.batch_size: got {batch_size}, which {self.world} processes cannot share evenly: choose {near}"


def launch() -> Launch:
    """What the launcher says of this process. Raises UserError where its variables contradict each other."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Launch()
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        fits = 0 <= rank < world and 0 <= local_rank < local_world <= world
    except ValueError:
        fits = False
    if not fits or (world > 1 and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ)):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise UserError(f"the environment names no place among processes ({found}): start with torchrun, or unset RANK and "
                        "WORLD_SIZE")
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if job in ("", "none"):    # torchrun's own where it was given none: the launcher is this process's parent
        job = f"{platform.node()}-{os.getppid()}-{_started(os.getppid())}"
    return Launch(rank, local_rank, world, local_world, restarts, job)


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks; '' where that is not to be had."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


# Which of several processes prints how the program ends. Until they have found each other the first one of each machine:
# their command lines and mistakes are the same. Then seresnet/ranks.py lets one of them.
_voice: bool | None = None


def give_voice(speaks: bool) -> None:
    """Let this process print how the program ends, or keep it from that."""
    global _voice
    _voice = speaks


def _has_voice() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0" if _voice is None else _voice


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class StopRequest:
    """Within its block, SIGINT, SIGTERM and SIGHUP (a terminal was closed) are noted in `signal` (0 until then) instead of ending the
    program; another one, a second and more later, ends it at once: one request may arrive by two ways, from a terminal, or a
    service manager, and from who has started us. Outside the main thread, and where the caller has told us to ignore a
    signal, nothing changes.

    Of several processes, the first announces that it will stop. A second signal changes nothing there: the terminal and the
    launcher both hand one on. A process that has not left LAST_SECONDS after the first is ended, shortly before the launcher
    would kill it (torch/distributed/elastic/multiprocessing/api.py, 30 s): a collective whose peers have gone waits for ever.
    """

    LAST_SECONDS = 25
    ONE_REQUEST = 1.0    # seconds

    def __init__(self, of: Launch = Launch()):
        self.signal = 0
        self._since = 0.0
        self._launch = of
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            try:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
            except ValueError:    # only the main thread may
                return self
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._launch.world > 1 and self._before:
            _end_in(0)

    def _note(self, number: int, frame) -> None:
        if self._launch.world > 1:
            if not self.signal:
                self.signal = number
                _end_in(self.LAST_SECONDS)
                if self._launch.rank == 0:
                    tell(b"stopping after this step\n")
            return
        if self.signal:
            if time.monotonic() - self._since < self.ONE_REQUEST:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal, self._since = number, time.monotonic()
        tell(b"stopping after this step; once more to leave at once\n")


def _end_in(seconds: int) -> None:
    """Have the system end this process in so many seconds, 0 for never. Windows cannot."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def tell(line: bytes) -> None:
    """Write to stderr from a signal's handler: print() may be what was interrupted, and who reads may be gone (`2>&1 | tee`, which Ctrl-C
    ends first; a terminal that was closed), which is no reason not to save."""
    with suppress(OSError):
        os.write(2, line)


def run_program(main: Callable[[], int | None]) -> None:
    """Run an entry point and turn its end into an exit status.

    0 done, 2 something the user can mend (message on stderr, no traceback), 3 the training diverged, 5 the device failed,
    129, 130 or 143 interrupted. Anything else is a defect of ours and keeps its traceback. Of several processes, one speaks.
    """
    wait_briefly()    # most programs load torch in `main`; preview and export, which have it by now, compute little
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:    # closed: the first file to be opened would take its number, and what is told to it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):    # a file's name may be bytes that are no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, AttributeError, RuntimeError):    # errors may go where no file is, or nowhere
            faulthandler.enable()    # where machine code crashes, in a library or a driver, it says at which of our lines
    try:
        status = main() or 0
    except UserError as error:
        status = _complain(error.problems, error.status)
    except NonFiniteLoss as error:
        status = _complain((str(error),), 3)
    except BrokenPipeError:
        # the reader of our output (head, less) has left: nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
                               errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO):
            _raise_or_leave()
        where = f"{error.filename}: " if error.filename else ""
        status = _complain((f"{where}{error.strerror}: free space there, or choose another place",), 2)
    except Interrupted as stop:
        status = _complain((str(stop),), stop.status)
    except KeyboardInterrupt:
        status = _complain(("interrupted",), 130)
    except Exception:
        _raise_or_leave()
    _leave(status)


def _raise_or_leave() -> NoReturn:
    """End with the traceback of the present exception, or without, where another process speaks."""
    if _voice is None:
        raise
    if _voice:
        traceback.print_exc()
    _leave(1)


def _leave(status: int) -> NoReturn:
    """End the program. Among several processes at once: threads of their group may outlive it, or an exception hold it, which
    aborts the interpreter on its way out; the launcher would take a finished training for a failed one."""
    if _voice is not None or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    atexit.register(_leave_the_garbage)
    sys.exit(status)


def _leave_the_garbage() -> None:
    """Spare the interpreter, on its way out, to look several times for garbage among all that torch has made, which takes a second. Not
    where Triton is loaded: it complains of all its objects that live on."""
    if "triton" not in sys.modules:
        gc.freeze()


def _complain(problems: tuple[str, ...], status: int) -> int:
    traceback.clear_frames(sys.exc_info()[2])    # a progress bar that is open ends before anything is said
    for problem in problems if _has_voice() else ():
        # names that strangers chose may hold line ends, or what a terminal takes for commands
        with suppress(OSError):    # nobody reads: the status still tells
            print("error: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in problem), file=sys.stderr)
    return status


def available_cores() -> int:
    """Cores this process may use: its affinity mask where the system has one, else all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(wanted: int, of: Launch = Launch()) -> None:
    """Give torch `wanted` threads on the CPU. With 0, one process keeps torch's own choice, and several on a machine share its
    cores: torchrun sets OMP_NUM_THREADS to 1 where the user has set nothing, so a 1 there is taken for nobody's wish."""
    import torch
    if wanted:
        torch.set_num_threads(wanted)
    elif of.local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, available_cores() // of.local_world))


def wait_briefly() -> None:
    """Let OpenMP's threads look out only SPINS times for the work they wait for before they sleep, unless the user has said how they
    are to wait. Call it before a library that brings GNU's OpenMP is loaded, which reads it once."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def stay_on_this_machine() -> None:
    """Let processes of one machine talk over its loopback device, unless the user has chosen a network: gloo would look for
    the machine's own name in the network, which need not be there."""
    if sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def allocator_command(environment: dict[str, str], executable: str, arguments: list[str]) -> dict[str, str] | None:
    """The environment to start again with so that glibc's allocator is tuned, or None where there is nothing to do.

    Nothing is done outside Linux with glibc, a second time, or where the user has set GLIBC_TUNABLES for malloc.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver(executable)[0] != "glibc":
        return None
    present = environment.get("GLIBC_TUNABLES", "")
    if _TUNED_MARK in environment or "glibc.malloc." in present or not arguments:
        return None
    tunables = ":".join([*([present] if present else []), *(f"{k}={v}" for k, v in ALLOCATOR_TUNABLES.items())])
    return {**environment, "GLIBC_TUNABLES": tunables, _TUNED_MARK: "tuned"}


def tune_allocator(device: str = "cpu") -> None:
    """Start this program once more with glibc's allocator tuned for large tensors; returns where that is not needed.

    device: what `run.device` asks for; only `auto` and `cpu` can end on a CPU, for any other nothing is done. Call it
    before torch is imported: everything done so far is thrown away. `sys.orig_argv` repeats the interpreter's own
    options too. Either way OpenMP's threads `wait_briefly`.
    """
    wait_briefly()
    if device not in ("auto", "cpu"):
        return
    environment = allocator_command(dict(os.environ), sys.executable, sys.orig_argv[1:])
    if environment is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def allocator_state() -> str:
    """'tuned' (by tune_allocator), 'user' (GLIBC_TUNABLES was set already) or 'default', for the run's report."""
    if _TUNED_MARK in os.environ:
        return os.environ[_TUNED_MARK]
    return "user" if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") else "default"


def leave_the_compiler_alone() -> None:
    """Keep torch's optimizers from importing torch's compiler, one to two seconds of a start, when all that they want of it is to be
    left out of what it compiles. For a process in which nothing is compiled."""
    from torch.optim import Optimizer
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        function = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            setattr(function, "__dynamo_disable", function)    # where torch/_compile.py keeps what the compiler made of it


def import_torchvision():
    """torchvision, importable also where its CUDA wheel lies beside a CPU build of torch.

    There is no CPU build of torchvision on the package index; the CUDA one registers fake kernels for
    `torchvision::nms` and `torchvision::qnms` at import and fails where its compiled library, which defines these two
    operators, could not be loaded. Defining the two schemas first (without a kernel: nothing here calls them) is all
    that it needs. Beside a CUDA torch the library loads and defines them itself.

    Raises UserError where torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    import torch
    if torch.version.cuda is None and torch.version.hip is None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                       "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
            try:
                library.define(schema)
            except RuntimeError:    # a CPU build of torchvision from elsewhere has defined it
                pass
        import_torchvision.library = library    # the schemas live as long as this object
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: `make setup`, or pip install torchvision") from error
    return torchvision


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch back the threads it had: `import ffcv` and every FFCV loader set them, for the whole process."""
    import torch
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def import_ffcv():
    """ffcv, imported without its side effects: one thread for all of torch, 2.5 seconds of compilation, and machine code
    that every loader compiles anew.

    ffcv/fields/rgb_image.py fills a numba typed dictionary with two constants at import, for which numba compiles its
    whole dictionary; the constants are only ever read by Python, so a plain dictionary serves them as well.
    """
    if "ffcv" not in sys.modules:
        from seresnet.compiled import set_up_numba
        set_up_numba()    # while numba has compiled nothing yet
        import numba.typed
        typed_dictionary = numba.typed.Dict
        numba.typed.Dict = dict
        try:
            with torch_threads_kept():
                import ffcv
        finally:
            numba.typed.Dict = typed_dictionary
    from ffcv.pipeline.compiler import Compiler
    if not hasattr(Compiler.compile, "once"):    # also where a program has imported FFCV before us
        Compiler.compile = _compile_once(Compiler.compile, lambda: Compiler.num_threads > 1)
    return sys.modules["ffcv"]


def _compile_once(compile_: Callable, parallel: Callable[[], bool]) -> Callable:
    """FFCV's `Compiler.compile`, which gives a function that is equal to an earlier one that one's compiled form. numba never
    frees machine code: 12 MiB a loader, and a second of compilation, add up in a process that trains many times."""
    compiled = {}

    def compile_once(code, signature=None):
        cells = tuple(cell.cell_contents for cell in code.__closure__ or ())
        key = code.__module__, code.__code__, cells, code.__defaults__, signature, parallel()
        try:
            hash(key)
        except TypeError:    # it closes over an array
            return compile_(code, signature)
        if key not in compiled:
            compiled[key] = compile_(code, signature)
        return compiled[key]
    compile_once.once = True
    return compile_once


def lock(file: IO) -> bool:
    """Take the open `file` for this process alone, until it is closed; False where another process has it. Where a
    system has no such locks (Windows) or a file system knows none, True."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power failure; where a system cannot open folders
    (Windows) there is nothing to do."""
    try:    # Windows flushes only what is open for writing
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of `whole_file` for the file `name` in `folder`, or for all, whose process is gone."""
    for stale in folder.glob(f".{name}.tmp-*"):
        owner = re.search(r"\.tmp-(\d{1,9})", stale.name)
        if owner and (int(owner[1]) == os.getpid() or not _is_running(int(owner[1]))):
            with suppress(OSError):
                stale.unlink()


def _is_running(process: int) -> bool:
    if os.name == "nt":    # the signal 0, with which other systems are asked, interrupts there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:    # somebody else's
        return True
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a block that writes a file there; when it has ended well, that file takes the place
    of `path`. At any moment `path` is the old file or the new one, whole, also after a power failure.

    The mode follows the user's umask. A process that is killed leaves its temporary file; the next one that writes to `path`
    removes it. OSErrors come out as they are; `path` is then untouched. Where `path` is a link, it stays one, and what it leads to is
    replaced.
    """
    path = path.resolve()
    remove_abandoned(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):    # a folder that is gone, or read-only: the error that matters is on its way
            temporary.unlink()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory of the machine or of the device did not suffice."""
    told = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in told)


@contextmanager
def memory_explained(device: torch.device, doing: str, way_out: str) -> Iterator[None]:
    """Turn an error of the block that says that memory did not suffice into a UserError with what was done (batch size, size of
    the images), free and total memory, and what to change. Nothing is tried again: a smaller batch is another recipe."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device} with {doing}; {free_memory(device) >> 20:,} of {total_memory(device) >> 20:,} MiB "
                        f"are free: {way_out}; nothing was tried again") from error


def cuda_answers() -> bool:
    """Whether the CUDA device that this process works on still does, true where it works on none: after some errors nothing works there."""
    import torch
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def total_memory(device: torch.device) -> int:
    """Bytes of memory of `device`, or of the machine where it has none of its own."""
    import torch
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        with suppress(OSError, AttributeError):
            return _memory_of_windows()[0]
    return free_memory_of_machine()


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; of the machine's memory where the device has none of its own."""
    import torch
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_of_machine()


def free_memory_of_machine() -> int:
    """Bytes of main memory that this process could allocate now: what the machine has free, within what a batch system or a
    container leaves it."""
    return max(0, min(_free_memory(), _left_by_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))))


def _left_by_cgroups(membership: Path, mount: Path) -> float:
    """Bytes that the control groups of `membership` (a /proc/<pid>/cgroup) still allow, infinite where none limits memory.

    A group's page cache would make room. A container sees its own group as the root.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return math.inf
    left = math.inf
    for _, controllers, name in (line for line in lines if len(line) == 3):
        first, limit, usage, prefix = (("", "memory.max", "memory.current", "") if not controllers else
                                      ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
        if controllers and "memory" not in controllers.split(","):
            continue
        place = Path(name.lstrip("/"))
        for group in (place, *place.parents):
            folder = mount / first / group
            try:
                allowed, used = (folder / limit).read_text(encoding="utf-8").strip(), int((folder / usage).read_text(encoding="utf-8"))
                rows = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
                if allowed != "max":
                    cache = sum(int(rows.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
                    left = min(left, int(allowed) - used + cache)
            except (OSError, ValueError):    # no such group as seen from here, or the root's, which has no limit
                continue
    return left


def _free_memory() -> int:
    try:    # /proc/meminfo counts the page cache that would make room; sysconf does not
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if sys.platform == "win32":
        with suppress(OSError, AttributeError):
            return _memory_of_windows()[1]
    return 4 << 30


def _memory_of_windows() -> tuple[int, int]:
    """Bytes of main memory: all, and what is free. Of MEMORYSTATUSEX, by GlobalMemoryStatusEx of its kernel32."""
    import ctypes
    status = (ctypes.c_uint64 * 8)(64)    # its own size and the load in percent, 32 bits each; then seven numbers of 64
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx has failed")
    return status[1], status[2]


def has_ffcv() -> bool:
    """Whether FFCV is installed. Betons are written, and read into memory, without it; `stream` needs it."""
    return is_installed("ffcv")


def why_no_ffcv() -> str:
    """Why FFCV cannot be used: it is not installed, or what its import says, where a library of the system is missing; '' where it can."""
    if not has_ffcv():
        return "not installed"
    try:
        import_ffcv()
    except Exception as error:    # of the loader, of numba, of what FFCV's modules do as they are imported
        return f"{type(error).__name__}: {error}"
    return ""


def is_installed(package: str) -> bool:
    """Whether `import package` would find something; nothing is imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None    # without: a folder of that name, such as W&B leaves where it ran


def check_packages(*names: str) -> None:
    """End the program where a package that it is about to import is not installed (`names`; none: NEEDED), which is one line, not a
    traceback: most often `make setup` has made an environment, and this is not its Python."""
    missing = [name for name in names or NEEDED if not is_installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        activate = environment_to_activate()
        mend = f"`{activate}`, the environment that `make setup` has made" if activate else "`make setup`, or README, \"Install\""
        sys.exit(_complain((f"{', '.join(missing)} {verb} not installed for {sys.executable}: {mend}",), 2))


def environment_to_activate() -> str:
    """The command that activates the environment of `make setup`, where there is one and this Python is not its; else nothing."""
    environment = Path(__file__).parents[1] / ".venv"
    script = environment / "bin/activate"
    if not script.is_file() or Path(sys.prefix).resolve() == environment.resolve():
        return ""
    return f". {shlex.quote(os.path.relpath(script))}"


def pick_device(name: str, of: Launch = Launch()) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a torch.device; `auto` takes a CUDA device where there is one, else the CPU.

    The CUDA device is made the current one: FFCV and torch's streams follow the current device. Of several processes on a
    machine each takes the device of its local rank. Raises UserError where the named device is not there.
    """
    import torch
    if not re.fullmatch(DEVICES, name):
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if of.world > 1 and (device.index is not None or device.type == "mps"):
        raise UserError(f"run.device: got {name} for each of {of.world} processes, expected auto, cpu or cuda: every process "
                        "takes a GPU of its own")
    if of.world > 1 and device.type == "cuda":
        if of.local_world > torch.cuda.device_count():    # told by all processes of the machine alike
            raise UserError(f"run.device: cuda: {of.local_world} processes on a machine with {torch.cuda.device_count()} CUDA "
                            "devices: start fewer with --nproc-per-node, or set run.device to cpu")
        device = torch.device("cuda", of.local_rank)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"run.device: {name} is not there ({count} CUDA devices, torch {torch.__version__}): "
                            "use auto or cpu, or install a CUDA build of torch")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("run.device: mps is not there: use auto or cpu")
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format of convolutions: what `precision` names, or for `auto` the fastest that is accurate.

    bf16 where the hardware computes in it (NVIDIA from compute capability 8.0, CPUs with AVX-512 BF16 or AMX),
    fp16 on older GPUs (the loop then scales gradients), else fp32.
    """
    import torch
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in ("auto", *named):
        raise UserError(f"precision: got {precision!r}, expected auto, {', '.join(named)}")
    if precision != "auto":
        if precision == "fp16" and device.type == "cpu":
            raise UserError("run.precision: fp16 needs a GPU: use auto, bf16 or fp32 on a CPU")
        return named[precision]
    from seresnet.compiled import has_bf16
    return torch.bfloat16 if has_bf16(device) else torch.float16 if device.type == "cuda" else torch.float32


def stream_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers (run seed, stream, epoch, ...), without the overlaps of adding them up.

    numpy's SeedSequence hashes its entropy, so (0, 1) and (1, 0) differ, and its output is the same on every machine.
    """
    import numpy as np
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def describe_machine() -> dict[str, str | int]:
    """What a figure was measured on: processor, cores, memory, GPU, system."""
    import torch

    from seresnet.compiled import has_bf16, has_matrix_units
    facts: dict[str, str | int] = {"system": platform.platform(), "processor": _processor_name(),
                                   "cores": available_cores(), "torch_threads": torch.get_num_threads()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    facts["cpu_bf16"] = ("AMX" if has_matrix_units() else "AVX-512") if has_bf16() else "none"
    facts["cpu_vectors"] = torch.backends.cpu.get_cpu_capability()
    facts["allocator"] = allocator_state()
    return facts


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Python's and the libraries' versions as installed (FFCV misreports its own in `__version__`)."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "ffcv", "fastargs", "numpy", "numba"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_commit() -> str:
    """The commit of the code that runs, with '+changes' where files differ from it; '' outside a checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True,
                              encoding="utf-8", check=True, timeout=10).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
