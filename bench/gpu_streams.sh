#!/bin/bash
# Sessions for one GPU, side by side, each on a GPU and on CPU cores of its own: a machine with two GPUs answers twice as
# much in the same ten minutes. What compares servers belongs into one command, on one GPU.
#
#   OUT=DIR bench/gpu_streams.sh 'QUESTIONS=curve bench/gpu_session.sh memory' 'bench/gpu_session.sh soak'
#   OUT=DIR bench/gpu_streams.sh 'bench/gpu_session.sh memory' '2@bench/gpu_parallel.sh pair'
#
# The first command gets GPU 0 and OUT=DIR/0, and so on; N@COMMAND gets the next N of them. Where there is no GPU, its share
# of the cores only.
#
# A machine that is lent for commands of ten minutes, but stays warm between them, keeps what a command left running: start
# it there once, in a copy of the tree, and fetch what there is, again and again. A stream is as many sessions as one wants,
# each with its own OUT and SESSION_SECONDS. Fetch in a loop: a command that is cut off brings back what was copied last.
#   cp -r . /tmp/tree; cd /tmp/tree
#   OUT=/tmp/streams setsid nohup bench/gpu_streams.sh 'OUT=$OUT/a SESSION_SECONDS=800 bench/gpu_session.sh soak; OUT=$OUT/b ...' &
#   timeout 560 sh -c 'while sleep 10; do cp /tmp/streams/* DIR; done'    # DIR: what comes back; again in the next command
set -u
cd "$(dirname "$0")/.." || exit 1
out=$(realpath -m "${OUT:?where the results are to go}")
[ $# -gt 0 ] || { sed -n '2,18s/^# \?//p' "$0"; exit 2; }

gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU')
wanted=0
for command in "$@"; do
  if [[ $command =~ ^([0-9]+)@ ]]; then wanted=$((wanted + BASH_REMATCH[1])); else wanted=$((wanted + 1)); fi
done
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt $wanted ]; then
  echo "the commands want $wanted GPUs, but there are $gpus" >&2
  exit 2
fi
if [ "$gpus" -gt 0 ] && [ ! -f .gpu/env.sh ] && ! "${PYTHON:-python3}" -c '
from importlib.util import find_spec as find
raise SystemExit(not (find("sglang") and find("sgl_vtensor")))'; then
  echo "SGLang and sgl_vtensor are not installed here, and no .gpu/ has come along: run bench/pack_gpu.sh first" >&2
  exit 2
fi
# Here and not in each of them: they would unpack the same files at once.
if [ "$gpus" -gt 0 ] && [ -f .gpu/env.sh ]; then source .gpu/env.sh; fi

cores=$(($(nproc) / wanted))
work=$(mktemp -d /tmp/gpu-streams.XXXXXX)
pids=()
first=0 # GPU of the next command
for number in $(seq 0 $(($# - 1))); do
  mkdir "$work/$number"
  command=$1 most=1
  if [[ $1 =~ ^([0-9]+)@(.*)$ ]]; then most=${BASH_REMATCH[1]} command=${BASH_REMATCH[2]}; fi
  share=()
  [ "$cores" -eq 0 ] || share=(taskset --cpu-list "$((first * cores))-$(((first + most) * cores - 1))")
  OUT=$work/$number CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + most - 1))) "${share[@]}" bash -c "$command" \
    > "$work/$number/output.log" 2>&1 &
  pids+=($!)
  first=$((first + most))
  shift
done
trap 'kill "${pids[@]}" 2> /dev/null' TERM INT

pack() { # few files, since few come back from a machine that is lent; a kill leaves no half of one
  mkdir -p "$out"
  for number in "${!pids[@]}"; do
    tar czf "$out/.new" -C "$work" --exclude=caches.tar.gz "$number" 2> /dev/null
    [ $? -gt 1 ] || mv "$out/.new" "$out/$number.tar.gz"
    caches=$(find "$work/$number" -name caches.tar.gz -size +0 -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
    [ -z "$caches" ] || cp "$caches" "$out/caches.tar.gz"
  done
}
status=0
while jobs -rp | grep -q .; do
  sleep "${PACK_SECONDS:-10}" & wait $!
  pack
done
for number in "${!pids[@]}"; do
  wait "${pids[$number]}" || { echo "command $number: exit status $?"; status=1; }
  tail -n 30 "$work/$number/output.log" | cut -c1-300
done
pack
rm -rf "$work"
exit $status
