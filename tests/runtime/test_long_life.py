"""A predictor over time: threads, forks, other processes, closing, memory, and the cores that it may use."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers.micro import MICRO, micro_bundle_at
from helpers.scripts import loaded
from helpers.small_bundle import clip_arrays, make_bundle

from hcmen.base.errors import BackendError, InputError
from hcmen.base.modalities import VARIANTS
from hcmen.runtime import load
from hcmen.runtime.backends.cores import count_cores

ROOT = Path(__file__).resolve().parents[2]
SOAK = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The micro bundle, whose ops run on the kernel library; not to be changed."""
    return micro_bundle_at(tmp_path_factory.mktemp("long") / "micro")


def clips(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Clips of random lengths, the variants in turn."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        sizes = {m: MICRO.modality(m) for m in VARIANTS[i % 7].present}
        lengths = {m: int(rng.integers(1, s.max_steps + 1)) for m, s in sizes.items()}
        made.append({m: rng.standard_normal((lengths[m], s.features), np.float32) for m, s in sizes.items()})
    return made


def script(code: str, *arguments: object, timeout: float = 120) -> list[str]:
    """The lines that a fresh process prints; it fails when the process does, or hangs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_four_threads_get_the_scores_of_one(exported, threads):
    """Bit for bit, with all first loads at once: every thread begins at another variant."""
    work = clips(28)
    single = load(exported, threads=threads)
    expected = [single(c).score for c in work]
    model = load(exported, threads=threads)
    start = threading.Barrier(4)
    got: dict[int, list[float]] = {}

    def run(me: int) -> None:
        start.wait()
        order = [(7 * me + i) % 28 for i in range(28)]
        scores = {i: model(work[i]).score for i in order * 3}
        got[me] = [scores[i] for i in range(28)]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert [got.get(i) for i in range(4)] == [expected] * 4


# --- forks and other processes --------------------------------------------------------------------------------------

FORKING = """
import os, sys, threading, time
import numpy as np
from hcmen.runtime import load

def clip(n=9):
    return {"audio": np.linspace(-1, 1, 3 * n, dtype=np.float32).reshape(n, 3), "vision": np.ones((n, 4), np.float32)}

def child_says(work):
    "What `work` returns in a forked child, which ends as a Python program does: all it holds is freed."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, repr(work()).encode())
        finally:
            os.close(write)
        sys.exit(0)
    os.close(write)
    with open(read) as file:
        answer = file.read()
    assert os.waitpid(pid, 0)[1] == 0, answer
    return answer

model = load(sys.argv[1], threads=2)
expected = repr(model(clip()).score)
"""


def test_a_model_in_use_works_in_a_forked_child_and_in_its_child(exported):
    code = """
    assert child_says(lambda: model(clip()).score) == expected
    def grandchild():
        score = model(clip()).score
        assert child_says(lambda: model(clip()).score) == repr(score)
        return score
    assert child_says(grandchild) == expected
    def without():  # the inherited sessions are freed in vain, the new ones for good
        global model
        path = model.bundle.path
        del model
        import gc; gc.collect()
        return load(path, threads=2)(clip()).score
    assert child_says(without) == expected
    assert repr(model(clip()).score) == expected
    print("done")
    """
    assert script(FORKING + textwrap.dedent(code), exported) == ["done"]


def test_forks_while_other_threads_run_and_load(exported):
    """Eight forks at moments when sessions run and are being opened, and the locks of the model are taken."""
    code = """
    stop = False
    def run():
        while not stop:
            model(clip(5))
    def open_():
        while not stop:
            load(sys.argv[1], threads=2)(clip(3))
    workers = [threading.Thread(target=f) for f in (run, run, open_)]
    for w in workers: w.start()
    for i in range(8):
        time.sleep(0.003 * i)
        assert child_says(lambda: model(clip()).score) == expected
    stop = True
    for w in workers: w.join()
    print("done")
    """
    assert script(FORKING + textwrap.dedent(code), exported, timeout=300) == ["done"]


def test_a_session_on_its_own_refuses_in_the_child_instead_of_hanging(exported):
    code = """
    session = model._sessions["text_missing"]
    def use():
        try:
            session.run({})
        except Exception as error:
            return type(error).__name__ + str(error)
    answer = child_says(use)
    assert "BackendError" in answer and "belongs to the process that this one was forked from" in answer
    print("done")
    """
    assert script(FORKING + textwrap.dedent(code), exported) == ["done"]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_of_processes_score_as_this_one(exported, tmp_path, method):
    """The model goes to the workers both ways: pickled with the task, and inherited where they are forked."""
    path = tmp_path / "pool.py"
    path.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            import numpy as np
            from hcmen.runtime import load

            model = None

            def inherited(clip):
                return None if model is None else model(clip).score

            if __name__ == "__main__":
                clips = [{"audio": np.full((n, 3), n / 9, np.float32)} for n in range(1, 9)]
                model = load(sys.argv[1], threads=2)
                expected = [model(c).score for c in clips]
                with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
                    results = pool.map_async(model, clips).get(90)
                    assert [r.score for r in results] == expected
                    if sys.argv[2] == "fork":
                        assert pool.map_async(inherited, clips).get(90) == expected
                print("done")
            """
        )
    )
    done = subprocess.run(
        [sys.executable, path, exported, method], capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_on_cuda_a_forked_child_is_refused(shared_bundle):
    model = load(shared_bundle)
    model.backend.name = "ort-cuda"
    model.after_fork()
    for use in (lambda: model(clip_arrays(0)), lambda: model.kernels("full")):
        with pytest.raises(BackendError, match="CUDA does not survive a fork: load the model in the child") as told:
            use()
        assert "\n" not in str(told.value)


def test_a_pickled_model_has_its_options_and_opens_its_own_bundle(shared_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(shared_bundle.parent)
    model = load(shared_bundle.name, threads=3, clean=True)
    stored = pickle.dumps(model)
    assert len(stored) < 2000
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(stored)
    assert (again.backend.threads, again.clean, again._sessions) == (3, True, {})
    assert again(clip_arrays(3)).score == model(clip_arrays(3)).score


def test_a_pickled_model_is_not_another_one(tmp_path):
    stored = pickle.dumps(load(make_bundle(tmp_path / "b", ("full",))))
    make_bundle_again(tmp_path / "b")
    with pytest.raises(InputError, match="another bundle than the one that the pickled model had"):
        pickle.loads(stored)


def make_bundle_again(path: Path) -> None:
    import shutil

    shutil.rmtree(path)
    make_bundle(path, ("full",), scale=2.0)


# --- closing and memory ---------------------------------------------------------------------------------------------


def test_a_closed_model_lets_go_and_says_so(shared_bundle):
    with load(shared_bundle) as model:
        model(clip_arrays(0))
        held = weakref.ref(model._sessions["full"])
    assert held() is None
    assert model._weights is None
    for use in (
        lambda: model(clip_arrays(0)),
        lambda: list(model.self_test()),
        lambda: model.stream("audio_only", window=1, hop=1, rates={"audio": 10}),
        lambda: pickle.dumps(model),
    ):
        with pytest.raises(InputError, match="this model was closed: load it again"):
            use()
    model.close()


def test_a_call_under_way_outlives_the_closing(shared_bundle, monkeypatch):
    import hcmen.runtime.backends.ort as ort

    model = load(shared_bundle)
    expected = model(clip_arrays(0)).score
    run, inside, closed = ort.OrtSession.run, threading.Event(), threading.Event()

    def slow(self, inputs):
        inside.set()
        assert closed.wait(30)
        return run(self, inputs)

    monkeypatch.setattr(ort.OrtSession, "run", slow)
    got = []
    worker = threading.Thread(target=lambda: got.append(model(clip_arrays(0)).score))
    worker.start()
    assert inside.wait(30)
    model.close()
    closed.set()
    worker.join(30)
    assert got == [expected]


def test_loading_and_closing_leaves_nothing(exported):
    """Heap bytes that a session leaves behind; each holds some 300 kB while it lives."""
    code = """
    import sys
    sys.path.insert(0, sys.argv[2])
    import numpy as np, soak
    from hcmen.runtime import load
    def once():
        with load(sys.argv[1], threads=1) as model:
            model({"audio": np.ones((5, 3), np.float32)})
            return soak.memory()["heap_bytes"]
    for _ in range(5): open_ = once()
    before = soak.memory()["heap_bytes"]
    for _ in range(20): once()
    print(open_ - before, (soak.memory()["heap_bytes"] - before) / 20)
    """
    held, left = map(float, script(code, exported, SOAK.parent)[0].split())
    assert held > 100_000
    assert left < 0.02 * held


def soak(bundle: Path, *arguments: object) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, SOAK, "--bundle", bundle, "--calls", "2400", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def test_calls_of_every_shape_leave_nothing(exported):
    """Two threads, two models, all variants, thousands of shapes. (ONNX Runtime's memory patterns would leave some.)"""
    code, result = soak(exported)
    assert (code, result["flat"]) == (0, True), result


@pytest.mark.parametrize(("leak", "where"), [(1, "python_blocks"), (64, "heap_bytes")])
def test_the_soak_sees_a_leak(exported, leak, where):
    code, result = soak(exported, "--leak", leak)
    assert (code, result["slopes"][where]["flat"]) == (1, False)


def test_resident_memory_is_judged_by_its_line():
    """On samples made by hand: flat with noise and one step, and rising by 20 bytes a call under the same noise."""
    module = loaded(SOAK, "soak")
    counts = np.linspace(0, 100_000, module.SAMPLES + 1)
    noise = np.random.default_rng(0).normal(scale=4096, size=len(counts)) + np.where(counts > 60_000, 1 << 17, 0)
    for slope, flat in ((0.0, True), (20.0, False)):
        samples = np.stack([counts, counts, 0 * counts, 0 * counts, 5e7 + slope * counts + noise], axis=1)
        result = module.judge(samples)
        assert result["flat"] is flat
        assert result["slopes"]["resident_bytes"]["per_call"] == pytest.approx(slope, abs=0.5)
    steps = 5e7 + (counts // 10_000) ** 2 * 50_000  # rare and large: a cache that grows
    assert module.judge(np.stack([counts, counts, 0 * counts, 0 * counts, steps], axis=1))["flat"] is False
    assert module.judge(samples[:30])["slopes"]["resident_bytes"]["flat"] is None


# --- cores ----------------------------------------------------------------------------------------------------------


def machine(root: Path, files: dict[str, str], cpus: int = 8, threads_per_core: int = 1) -> Path:
    """A tree of /sys and /proc with `cpus` logical CPUs, and more files."""
    for cpu in range(cpus):
        files = {
            f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id": "0\n",
            f"sys/devices/system/cpu/cpu{cpu}/topology/core_id": f"{cpu // threads_per_core}\n",
            **files,
        }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V1 = "12:cpuset:/x\n4:cpu,cpuacct:/docker/1f2e\n0::/\n"
CGROUPS = {
    "none": ({}, 8),
    "v2 at the mount, as in a container": ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
    "v2 without a quota": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "v2 of a service": (
        {"proc/self/cgroup": "0::/system.slice/a\n", "sys/fs/cgroup/system.slice/a/cpu.max": "200000 100000"},
        2,
    ),
    "v2 of a parent": (
        {
            "proc/self/cgroup": "0::/kubepods/pod1/c\n",
            "sys/fs/cgroup/kubepods/pod1/c/cpu.max": "max 100000",
            "sys/fs/cgroup/kubepods/pod1/cpu.max": "50000 100000",
        },
        1,
    ),
    "v1 in a container, whose path is the host's": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "v1 on the host": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/docker/1f2e/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/docker/1f2e/cpu.cfs_period_us": "50000",
        },
        3,
    ),
    "more than there is": ({"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 8),
    "junk": ({"sys/fs/cgroup/cpu.max": "fast\n", "proc/self/cgroup": "x\n0::/../../etc\n"}, 8),
    "a period of none": ({"sys/fs/cgroup/cpu.max": "100000 0\n"}, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", CGROUPS)
def test_quotas_bound_the_cores(tmp_path, name):
    files, expected = CGROUPS[name]
    assert count_cores(range(8), machine(tmp_path, files)) == expected


def test_hyperthreads_count_once_and_cpus_not_allowed_not_at_all(tmp_path):
    root = machine(tmp_path, {}, threads_per_core=2)
    assert count_cores(range(8), root) == 4
    assert count_cores([0, 1], root) == 1
    assert count_cores([1, 2], root) == 2
    assert count_cores([40, 41], root) == 2  # of CPUs that nothing is known of each is a core
    assert count_cores([], root) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_decides_the_threads(shared_bundle):
    code = """
    import os, sys
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from hcmen.runtime import load
    print(load(sys.argv[1]).backend.threads)
    """
    assert script(code, shared_bundle) == ["1"]
