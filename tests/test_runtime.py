"""runtime: exit statuses, the allocator's restart, seeds that do not overlap, choices of device and number format."""
import ctypes
import importlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seresnet import compiled, runtime
from seresnet.runtime import UserError


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("body, status, text", [
    ("return None", 0, ""), ("return 5", 5, ""),
    ("raise runtime.UserError('first', 'second')", 2, "error: first\nerror: second\n"),
    ("raise runtime.NonFiniteLoss('diverged')", 3, "error: diverged\n"),
    ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ("raise OSError(28, 'No space left on device', 'x/y')", 2,
     "error: x/y: No space left on device: free space there, or choose another place\n"),
])
def test_exit_status_and_message(body, status, text):
    done = run_python(f"from seresnet import runtime\ndef main():\n    {body}\nruntime.run_program(main)")
    assert (done.returncode, done.stderr) == (status, text)


@pytest.mark.parametrize("error", ["UserError('said')", "NonFiniteLoss('said')", "Interrupted('said', 15)"])
def test_a_progress_bar_that_is_open_ends_before_anything_is_said(error):
    code = f"""if True:
        import sys
        from seresnet import runtime
        def bar():
            try:
                yield
            finally:
                print("the bar's end", file=sys.stderr)
        def main():
            for _ in bar():
                raise runtime.{error}
        runtime.run_program(main)"""
    assert run_python(code).stderr == "the bar's end\nerror: said\n"


def test_several_processes_stop_where_the_system_has_no_alarm(monkeypatch):
    monkeypatch.delattr(signal, "alarm", raising=False)
    with runtime.StopRequest(runtime.Launch(rank=1, world=2)) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


@pytest.mark.parametrize("world, status", [("1", -signal.SIGABRT), ("2", 0)])
def test_what_aborts_an_interpreter_on_its_way_out_does_not_fail_one_of_several_processes(world, status):
    done = run_python("import atexit, os; from seresnet import runtime; atexit.register(os.abort); "
                      "runtime.run_program(lambda: print('done', flush=True))", WORLD_SIZE=world)
    assert done.returncode == status and done.stdout == "done\n"


@pytest.mark.parametrize("libraries, spared", [("torch", True), ("torch, triton", False)])
def test_a_program_ends_without_a_search_for_garbage_and_without_complaints(libraries, spared):
    if "triton" in libraries:
        pytest.importorskip("triton")
    done = run_python(f"import atexit, gc; from seresnet import runtime\natexit.register(lambda: print(gc.get_freeze_count() > 100_000))\n"
                      f"def main():\n    import {libraries}\nruntime.run_program(main)")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{spared}\n", "")


def test_a_defect_keeps_its_traceback():
    done = run_python("from seresnet import runtime\ndef main():\n    1 / 0\nruntime.run_program(main)")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def test_a_crash_in_machine_code_says_where_it_happened():
    done = run_python("import os, signal\nfrom seresnet import runtime\ndef main():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
                      "runtime.run_program(main)")
    assert done.returncode == -signal.SIGSEGV and "Segmentation fault" in done.stderr and "line 4 in main" in done.stderr


def test_a_program_without_a_place_for_its_errors_runs():
    done = subprocess.run(["sh", "-c", "exec \"$0\" -c \"from seresnet import runtime; runtime.run_program(lambda: print('done'))\" 2>&-", sys.executable],
                          cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_told_to_a_closed_stream_reaches_no_file(tmp_path, closed):
    code = ("import os, sys; from seresnet import runtime\n"
            "def main():\n with open('file', 'w') as file:\n"
            "  print('told', file=sys.stderr); print('said'); os.write(2, b'told'); os.write(1, b'said'); sys.stdin.read(); runtime.tune_allocator()\n"
            "  file.write(str(file.fileno() > 2))\nruntime.run_program(main)")
    done = subprocess.run(["sh", "-c", f"exec \"$0\" -c \"$1\" {closed}", sys.executable, code], cwd=tmp_path, timeout=60, stdin=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "True", done.stderr


def test_a_subclass_may_choose_its_status():
    class Special(UserError):
        status = 4
    with pytest.raises(SystemExit) as caught:
        runtime.run_program(lambda: (_ for _ in ()).throw(Special("x")))
    assert caught.value.code == 4


def test_a_closed_pipe_is_no_traceback():
    code = "from seresnet import runtime\ndef main():\n    for i in range(100000): print(i)\nruntime.run_program(main)"
    done = subprocess.run(f"{sys.executable} -c \"{code}\" | head -n 1", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n" and "Traceback" not in done.stderr


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")


@linux_only
def test_the_allocator_is_tuned_by_one_restart_that_keeps_the_command_line():
    code = "import sys; from seresnet import runtime; runtime.tune_allocator(); print(sys.argv[1:], runtime.allocator_state())"
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "SERESNET_ALLOCATOR")}
    done = subprocess.run([sys.executable, "-c", code, "a b", "--c"], capture_output=True, text=True, timeout=60, env=clean)
    assert done.stdout == "['a b', '--c'] tuned\n", done.stderr


@linux_only
def test_the_allocator_is_tuned_for_a_training_on_the_cpu_alone():
    code = "import sys; from seresnet import runtime; runtime.tune_allocator(sys.argv[1]); print(runtime.allocator_state())"
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "SERESNET_ALLOCATOR")}
    states = {device: subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, timeout=60,
                                     env=clean).stdout for device in ("auto", "cpu", "cuda", "mps")}
    assert states == {"auto": "tuned\n", "cpu": "tuned\n", "cuda": "default\n", "mps": "default\n"}


@linux_only
def test_the_allocator_is_left_alone_where_the_user_or_a_restart_has_set_it():
    restart = runtime.allocator_command
    tuned = restart({"A": "1"}, sys.executable, ["x.py"])
    assert tuned["A"] == "1" and "glibc.malloc.hugetlb=1" in tuned["GLIBC_TUNABLES"]
    assert restart(tuned, sys.executable, ["x.py"]) is None
    assert restart({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, sys.executable, ["x.py"]) is None
    assert restart({}, sys.executable, []) is None
    other = restart({"GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=512"}, sys.executable, ["x.py"])
    assert other["GLIBC_TUNABLES"].startswith("glibc.rtld.optional_static_tls=512:glibc.malloc.")


@pytest.mark.parametrize("said, waits", [({}, "5000 none"), ({"GOMP_SPINCOUNT": "7"}, "7 none"), ({"OMP_WAIT_POLICY": "active"}, "none active")])
def test_threads_wait_briefly_unless_the_user_says_how(said, waits):
    show = "print(*(os.environ.get(name, 'none') for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')), 'torch' in sys.modules)"
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for call in ("runtime.tune_allocator('cuda')", "runtime.tune_allocator()", f"runtime.run_program(lambda: {show})"):
        code = f"import os, sys; from seresnet import runtime; {call}" + ("" if "lambda" in call else f"; {show}")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**clean, **said})
        assert done.stdout == f"{waits} False\n", done.stderr


def test_seeds_do_not_overlap():
    seeds = {runtime.stream_seed(seed, stream, epoch) for seed in range(20) for stream in range(4) for epoch in range(20)}
    assert len(seeds) == 20 * 4 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.stream_seed(0, 2, 0) == 8597659618385908031    # the same on every machine


def test_devices_that_are_not_there_are_refused():
    assert runtime.pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:x", "meta", ""):
        with pytest.raises(UserError, match="expected auto, cpu, cuda, cuda:N or mps"):
            runtime.pick_device(name)
    with pytest.raises(UserError, match="run.device: cuda:99 is not there"):
        runtime.pick_device("cuda:99")


@pytest.mark.parametrize("version, limit, usage", [("0::", "memory.max", "memory.current"),
                                                   ("4:cpu,memory:", "memory.limit_in_bytes", "memory.usage_in_bytes")])
def test_memory_is_what_the_batch_system_leaves(tmp_path, version, limit, usage):
    place = tmp_path / "mount" / ("memory" if "memory" in version else "") / "jobs/17"
    place.mkdir(parents=True)
    of = tmp_path / "cgroup"
    of.write_text(f"3:cpuset:/other\n{version}/jobs/17\n")
    assert runtime._left_by_cgroups(of, tmp_path / "mount") == runtime._left_by_cgroups(tmp_path / "none", tmp_path) == float("inf")
    (place / limit).write_text("1000000\n")
    (place / usage).write_text("400000\n")
    (place / "memory.stat").write_text("anon 300000\ninactive_file 30000\nactive_file 20000\ntotal_inactive_file 30000\ntotal_active_file 20000\n")
    assert runtime._left_by_cgroups(of, tmp_path / "mount") == 650_000
    for name, text in ((limit, "900000"), (usage, "700000"), ("memory.stat", "anon 1\n")):    # the group around it allows less
        (place.parent / name).write_text(text)
    assert runtime._left_by_cgroups(of, tmp_path / "mount") == 200_000
    for folder in (place, place.parent):
        (folder / limit).write_text("max" if version == "0::" else str(1 << 62))
    assert runtime._left_by_cgroups(of, tmp_path / "mount") > 1 << 40
    (place / limit).write_text("300000")
    assert runtime._left_by_cgroups(of, tmp_path / "mount") < 0 <= runtime.free_memory_of_machine()


def test_windows_says_how_much_memory_is_free(monkeypatch):
    """By the layout of its MEMORYSTATUSEX; not run there."""
    def status(place):
        content = struct.pack("<IIQQQQQQQ", 64, 37, 16 << 30, 5 << 30, 1, 2, 3, 4, 0)
        assert struct.unpack("<I", ctypes.string_at(ctypes.addressof(place), 4)) == (64,)
        ctypes.memmove(place, content, len(content))
        return 1
    kernel = SimpleNamespace(GlobalMemoryStatusEx=lambda reference: status(reference._obj))
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert runtime._memory_of_windows() == (16 << 30, 5 << 30)


def test_number_formats():
    cpu = torch.device("cpu")
    assert runtime.pick_dtype("fp32", cpu) == torch.float32 and runtime.pick_dtype("bf16", cpu) == torch.bfloat16
    assert runtime.pick_dtype("auto", cpu) == (torch.bfloat16 if compiled.has_bf16() else torch.float32)
    with pytest.raises(UserError, match="run.precision: fp16 needs a GPU"):
        runtime.pick_dtype("fp16", cpu)


def test_torchvision_can_be_imported_beside_this_torch():
    done = run_python("from seresnet import runtime; runtime.import_torchvision(); import torchvision.transforms, "
                      "torchvision.datasets; print(torchvision.datasets.CIFAR10.tgz_md5)")
    assert done.stdout == "c58f30108f718f92721af3b95e74349a\n", done.stderr


def test_the_machine_and_versions_are_described():
    machine, versions = runtime.describe_machine(), runtime.describe_versions()
    assert machine["cores"] >= 1 and machine["allocator"] in ("tuned", "user", "default")
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "not installed" not in versions.values()


def test_importing_ffcv_changes_neither_torchs_threads_nor_numba():
    code = """
import torch
torch.set_num_threads(2)
from seresnet import runtime
import numba.typed
before = numba.typed.Dict
ffcv = runtime.import_ffcv()
from ffcv.fields.rgb_image import IMAGE_MODES
print(torch.get_num_threads(), numba.typed.Dict is before, IMAGE_MODES, runtime.import_ffcv() is ffcv)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "2 True {'jpg': 0, 'raw': 1} True\n", done.stderr


@pytest.mark.parametrize("name", ["muon", "sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_training_starts_without_torchs_compiler(name, fused):
    done = run_python(f"name, fused = {name!r}, {fused}\n" + """
import sys, torch
from seresnet import config, loop, optim, runtime
runtime.leave_the_compiler_alone()
settings = config.read_file("rn_configs/se94.yaml")
model = loop.build_model(config.build({**settings, "model.classes": 10, "model.image_size": 32, "model.initialisation": "orthogonal"}))
optimizer = optim.build_optimizer(model, name=name, fused=fused, lr=0.1)
model(torch.randn(2, 3, 32, 32)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
assert optimizer.param_groups[0]["params"][0].grad is None and len(optimizer.state) > 5
if name == "sgd" and fused:    # once will do: it takes ten seconds
    import torch._dynamo
    assert torch.compile(model, backend="eager")(torch.randn(2, 3, 32, 32)).shape == (2, 10)
""")
    assert done.returncode == 0, done.stderr


def test_a_bare_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not runtime.is_installed("a_tracker")
    (tmp_path / "a_tracker/__init__.py").touch()
    importlib.invalidate_caches()
    assert runtime.is_installed("a_tracker") and runtime.is_installed("torch") and not runtime.is_installed("no_such_package")


@pytest.mark.parametrize("program", ["ffcv_train.py", "write_datasets.py", "-m benchmarks.compare",
                                     *(f"-m seresnet.{name}" for name in ("predict", "evaluate", "report", "export", "preview"))])
def test_a_python_without_the_packages_ends_a_program_in_one_line(program):
    done = subprocess.run([sys.executable, "-S", *program.split()], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    assert f"PIL are not installed for {sys.executable}: " in done.stderr and "make setup" in done.stderr


def test_an_environment_that_is_not_active_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "a clone/seresnet/runtime.py"))
    monkeypatch.chdir(tmp_path)
    assert runtime.environment_to_activate() == ""
    (tmp_path / "a clone/.venv/bin").mkdir(parents=True)
    (tmp_path / "a clone/.venv/bin/activate").touch()
    assert runtime.environment_to_activate() == ". 'a clone/.venv/bin/activate'"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "a clone/.venv"))
    assert runtime.environment_to_activate() == ""
