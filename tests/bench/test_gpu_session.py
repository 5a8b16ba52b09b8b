"""The script for a session on a GPU, with a stand-in for Python: what fails stays alone, and everything comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/bash
# compare.py fails once it has something; pytest passes.
case "$*" in
  *compare.py*)
    while [ "$1" != --out ]; do shift; done
    mkdir -p "$2" && echo row > "$2/serving.csv" && echo '{}' > "$2/runs.jsonl" && echo log > "$2/server-a+b=c.log"
    echo broken >&2; exit 3 ;;
  *memory.py*|*soak.py*|*programs.py*|*profile_server.py*|*--grid*) echo "$*" ;;
  *pytest*) echo 28 passed ;;
  *sgl_vtensor*|*bench_core.py*) echo "$*" ;;
esac
"""


def session(folder: Path, *steps: str, **variables: str) -> tuple[int, str]:
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = folder / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(stub), **variables}
    done = subprocess.run(
        [ROOT / "bench" / "gpu_session.sh", *steps], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_a_step_that_fails_spoils_nothing_else(tmp_path: Path) -> None:
    status, text = session(tmp_path)
    assert status == 1, "a failed step is told"
    assert "servers: exit status 3" in text and "memcheck: exit status 0" in text and "28 passed" in text
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"summary.txt", "serving.csv", "runs.jsonl", "memcheck.log", "logs.tar.gz"} and len(files) <= 8
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        names = set(logs.getnames())
    assert {"servers.log", "servers/server-a+b=c.log"} <= names
    assert "broken" in (tmp_path / "out" / "summary.txt").read_text()


def test_steps_by_name_and_without_time(tmp_path: Path) -> None:
    status, text = session(tmp_path, "memcheck")
    assert status == 0 and "servers" not in text
    status, text = session(tmp_path, "memory", QUESTIONS="limit pair")
    assert status == 0 and re.search(r"bench/memory.py --ask limit pair --port 2\d{4} --budget-seconds", text)
    status, text = session(tmp_path, "soak")
    assert status == 0 and re.search(r"bench/soak.py --debug --port 2\d{4} --budget-seconds", text)
    status, text = session(tmp_path, "programs")
    assert status == 0 and re.search(r"bench/programs.py --port 2\d{4} --out", text)
    status, text = session(tmp_path, "profile", PROFILED="document")
    assert status == 0 and "bench/profile_server.py --workload document" in text
    status, text = session(tmp_path, "tests", "grid")
    assert status == 0 and "28 passed" in text
    for bench in ("prefill", "decode"):
        assert f"bench/bench_{bench}.py --grid --budget-ms 8 --seconds" in text
    status, text = session(tmp_path, "commands")
    assert status == 0 and "-m sgl_vtensor doctor" in text and "bench_core.py --steps 30 --trace" in text
    status, text = session(tmp_path, "memcheck", "nothing", SESSION_SECONDS="10")
    assert status == 1 and "memcheck: left out" in text and "no step nothing" in text


TWO_GPUS = """#!/bin/bash
case "$*" in
  *--list-gpus*) echo "GPU 0: NVIDIA H100"; echo "GPU 1: NVIDIA H100" ;;
  *memory*) echo 81559 ;;
esac
"""
ALL_REDUCE_FAILS = """#!/bin/bash
# No server starts with SGLang's own all-reduce.
case "$*" in
  -*) exec python3 "$@" ;;
esac
env | grep -E '^(NCCL_NVLS|TORCH_SYMM_MEM|NVSHMEM|SGLANG_OPT)'
echo "$*"
case "$*" in
  *compare.py*--disable-custom-all-reduce*)
    while [ $# -gt 0 ]; do
      [ "$1" != --out ] || { mkdir -p "$2"; printf 'date,case\\nrow,%s\\n' "$(basename "$2")" > "$2/serving.csv"; }
      [ "$1" != --model ] || cat "$2/config.json" 2>&1
      shift
    done ;;
  *compare.py*) exit 3 ;;
esac
"""


def test_two_gpus_where_only_nccl_reduces(tmp_path: Path) -> None:
    """Each question is asked again with NCCL's all-reduce, once; multicast stays off; the large model has its shape."""
    programs = {"python": ALL_REDUCE_FAILS, "nvidia-smi": TWO_GPUS}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bench").mkdir()
    for name in ("session.sh", "gpu_parallel.sh"):
        shutil.copy(ROOT / "bench" / name, tmp_path / "bench")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"num_hidden_layers": 32, "head_dim": 128}))
    done = subprocess.run(
        [tmp_path / "bench/gpu_parallel.sh", "pair", "replicas", "large", "answers"],
        env={
            **os.environ,
            "OUT": str(tmp_path / "out"),
            "PYTHON": str(tmp_path / "python"),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "MODEL": str(tmp_path / "model"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout
    assert [said.count(f"{name}: begins") for name in ("pair", "replicas", "large", "answers")] == [2, 1, 1, 1]
    for variable in ("NCCL_NVLS_ENABLE=0", "TORCH_SYMM_MEM_DISABLE_MULTICAST=1", "NVSHMEM_DISABLE_NVLS=1",
                     "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2=0"):  # fmt: skip
        assert said.count(variable) == 5, variable
    assert "--group stock-fa3 vtensor-auto" in said and "--group stock-fa3 --group vtensor-auto" in said
    assert said.count("-- --tp-size 2") == 4 and said.count("--load-format dummy") == 4
    assert '"num_hidden_layers": 40' in said and "llama70b-40-of-80-layers" in said
    assert (tmp_path / "out/serving.csv").read_text().splitlines() == [
        "date,case",
        "row,answers",
        "row,large",
        "row,pair",
    ]
    assert done.returncode == 1, "the first attempt failed, and that is told"


def streams(folder: Path, *commands: str, root: str = str(ROOT), **variables: str) -> subprocess.CompletedProcess[str]:
    """On a machine of two GPUs, as far as ``nvidia-smi`` says."""
    (folder / "nvidia-smi").write_text(TWO_GPUS)
    (folder / "nvidia-smi").chmod(0o755)
    more = {"OUT": str(folder / "out"), "PATH": f"{folder}:{os.environ['PATH']}", "PACK_SECONDS": "0.1"}
    more |= {"PYTHON": sys.executable} | variables
    return subprocess.run(
        [f"{root}/bench/gpu_streams.sh", *commands],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_streams_have_a_gpu_each_and_one_that_fails_does_not_end_the_other(tmp_path: Path) -> None:
    done = streams(tmp_path, "echo on GPU $CUDA_VISIBLE_DEVICES; exit 3", "sleep 0.5; echo rows > $OUT/serving.csv")
    assert done.returncode == 1 and "command 0: exit status 3" in done.stdout and "on GPU 0" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"0.tar.gz", "1.tar.gz"}
    with tarfile.open(tmp_path / "out/1.tar.gz") as packed:
        rows = packed.extractfile("1/serving.csv")
        assert rows is not None and rows.read() == b"rows\n"


def test_a_stream_of_several_sessions_keeps_the_caches_of_the_last(tmp_path: Path) -> None:
    one, two = (f"mkdir $OUT/{name}; echo {name} | tee $OUT/{name}/caches.tar.gz > $OUT/{name}/rows" for name in "ab")
    assert streams(tmp_path, f"{one}; sleep 0.2; {two}").returncode == 0
    assert (tmp_path / "out/caches.tar.gz").read_text() == "b\n"
    with tarfile.open(tmp_path / "out/0.tar.gz") as packed:
        assert {"0/a/rows", "0/b/rows"} <= set(packed.getnames()) and "0/b/caches.tar.gz" not in packed.getnames()


def test_streams_say_what_they_cannot_do(tmp_path: Path) -> None:
    done = streams(tmp_path, "true", "true", "true")
    assert done.returncode == 2 and "want 3 GPUs, but there are 2" in done.stderr
    assert streams(tmp_path, "true", "2@true").returncode == 2
    assert streams(tmp_path).returncode == 2
    assert streams(tmp_path, "true", "1@true").returncode == 0
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(ROOT / "bench", tmp_path / "elsewhere/bench", ignore=shutil.ignore_patterns("results"))
    done = streams(tmp_path, "true", root=str(tmp_path / "elsewhere"), PYTHON=str(bare))
    assert done.returncode == 2 and "run bench/pack_gpu.sh first" in done.stderr


def test_a_stream_can_have_several_gpus(tmp_path: Path) -> None:
    done = streams(tmp_path, "2@echo on GPUs $CUDA_VISIBLE_DEVICES")
    assert done.returncode == 0 and "on GPUs 0,1" in done.stdout


def test_the_scripts_are_bash() -> None:
    for name in ("session.sh", "gpu_session.sh", "gpu_parallel.sh", "gpu_streams.sh", "pack_gpu.sh"):
        subprocess.run(["bash", "-n", ROOT / "bench" / name], check=True)


def test_packing_says_what_it_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "bench" / "pack_gpu.sh"],
        env={**os.environ, "SHARED_GPU": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "name its folder: SHARED_GPU=DIR" in done.stderr
