#!/bin/bash
# Makes the git-ignored folder .gpu/ that a machine with a GPU but without a network needs beside the checkout to run
# SGLang: its site directory, a model's config, the plugin's entry points, py-spy, and env.sh, which sets all of it up there.
# Needs pip, strip and xz; two to three minutes and 45 MB the first time. Run it again before each session: that takes a
# second, and notes the commit, which the rows of results will name. SHARED_GPU: where build_site.sh is.
# usage: bench/pack_gpu.sh [--again]     --again: also the site directory
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
shared=${SHARED_GPU:-$root/../shared/gpu}
gpu=$root/.gpu
[ -x "$shared/build_site.sh" ] || { echo "$shared has no build_site.sh; name its folder: SHARED_GPU=DIR $0" >&2; exit 1; }
mkdir -p "$gpu"

if [ ! -s "$gpu/site.tar.xz" ] || [ "${1:-}" = --again ]; then
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
  "$shared/build_site.sh" "$build/site.tar.xz" "$build"
  mv "$build/site.tar.xz" "$gpu/site.tar.xz"
fi

if [ ! -s "$gpu/py-spy.xz" ]; then # for bench/profile_server.py
  tool=$(mktemp -d)
  python3 -m pip install --quiet --no-deps --target "$tool" py-spy
  xz -c "$tool/bin/py-spy" > "$gpu/py-spy.xz"
  rm -rf "$tool"
fi

rm -rf "$gpu/llama8b" "$gpu/plugin"
cp -r "$shared/llama8b" "$gpu/llama8b"
chmod -R u+w "$gpu/llama8b"
git -C "$root" describe --always --dirty --abbrev=9 > "$gpu/commit"

# SGLang finds plugins by their entry points; the code itself is read from the checkout.
python3 - "$root" "$gpu/plugin" <<'PYTHON'
import pathlib, sys, tomllib

root, plugin = map(pathlib.Path, sys.argv[1:])
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
info = plugin / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
info.mkdir(parents=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
groups = [f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
          for name, points in project["entry-points"].items()]
(info / "entry_points.txt").write_text("\n".join(groups))
PYTHON

cat > "$gpu/env.sh" <<'ENV'
# To be sourced in the checkout's folder on the machine with the GPU.
[ -d /tmp/site/sglang ] || python3 -m tarfile -e .gpu/site.tar.xz /tmp/site
[ -x /tmp/py-spy ] || { python3 -c 'import lzma, shutil; shutil.copyfileobj(lzma.open(".gpu/py-spy.xz"), open("/tmp/py-spy", "wb"))'
  chmod +x /tmp/py-spy; }
# What servers compiled at an earlier start, where a session brought it back: starts are a minute shorter with it.
[ ! -f .gpu/caches.tar.gz ] || [ -d /tmp/sgjit ] || tar xzf .gpu/caches.tar.gz -C /tmp
export PYTHONPATH=/tmp/site:$PWD:$PWD/kernels:$PWD/.gpu/plugin
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
export SGLANG_JIT_CACHE_DIR=/tmp/sgjit TRITON_CACHE_DIR=/tmp/tricache FLASHINFER_WORKSPACE_BASE=/tmp/fi
export BENCH_COMMIT=$(cat .gpu/commit) PY_SPY=/tmp/py-spy
ENV
du -sh "$gpu"/*
