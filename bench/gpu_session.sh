#!/bin/bash
# All that is to be seen on a GPU, in one go of less than ten minutes: servers on vTensor memory against stock ones (first-
# token logprobs, load, default prefill CUDA graphs), and memcheck of the Hopper kernel.
#
#   OUT=DIR bench/gpu_session.sh [servers] [memcheck] [memory] [soak]      default: servers memcheck
#
# On a machine that has no SGLang, .gpu/ must have come along (bench/pack_gpu.sh). Steps are independent: each has its own
# limit and log, and what there is goes to $OUT every 20 seconds, so that nothing is lost however this ends. In $OUT:
# summary.txt, serving.csv, memory.csv and soak.csv (rows to append to those in bench/results), runs.jsonl, memcheck.log, logs.tar.gz and
# caches.tar.gz (put into .gpu/, it saves compiling at the next start). Without a GPU it is a dry run on a tiny model.
#   SESSION_SECONDS  for all of it (560)      PYTHON  (python3)      WORKLOADS  (gsp)      ROUNDS  (1)
#   QUESTIONS  of memory.py (all)      SOAK  flags of soak.py (--debug)
set -u
cd "$(dirname "$0")/.." || exit 1
out=$(realpath -m "${OUT:?where the results are to go}")
mkdir -p "$out"
work=$(mktemp -d /tmp/gpu-session.XXXXXX)
limit_s=${SESSION_SECONDS:-560}
steps=${*:-servers memcheck}
memcheck_s=80
status=0

left() { echo $((limit_s - SECONDS)); }
say() { echo "[$SECONDS s] $*" >> "$work/summary.txt"; echo "[$SECONDS s] $*"; }

pack() { # files are moved into place whole, so that a kill never leaves half of one
  local new=$work/.$BASHPID.new file
  (cd "$work" && tar czf "$new" --exclude=tiny-llama -- * 2> /dev/null)
  [ $? -gt 1 ] || mv "$new" "$out/logs.tar.gz" # 1: a log grew meanwhile
  for file in summary.txt memcheck.log servers/serving.csv servers/runs.jsonl memory/memory.csv soak/soak.csv soak/soak.json; do
    if [ -f "$work/$file" ]; then cp "$work/$file" "$new" && mv "$new" "$out/$(basename "$file")"; fi
  done
}

step() { # NAME SECONDS COMMAND...: a log of its own, and a limit of its own within what is left
  local name=$1 most=$2 code begin=$SECONDS
  shift 2
  [ "$(left)" -ge "$most" ] || most=$(left)
  if [ "$most" -lt 20 ]; then
    say "$name: left out, $most s are left"
    status=1
    return
  fi
  say "$name: begins, $most s at most"
  timeout --signal=TERM --kill-after=15 "$most" "$@" > "$work/$name.log" 2>&1
  code=$?
  say "$name: exit status $code after $((SECONDS - begin)) s"
  [ $code -eq 0 ] || status=1
  tail -n 45 "$work/$name.log" | cut -c1-400 > "$work/.end"
  cat "$work/.end" >> "$work/summary.txt"
  cat "$work/.end"
  pack
}

# A wait without a child, which would hold our output open after we have ended.
(while ! read -rt 20; do pack; done) <> <(:) > /dev/null 2>&1 &
packer=$!
finish() {
  kill $packer 2> /dev/null
  wait $packer 2> /dev/null
  if [ -d /tmp/sgjit ]; then
    (cd /tmp && tar czf "$work/.caches.tar.gz" sgjit tricache fi 2> /dev/null)
    if [ "$(stat -c %s "$work/.caches.tar.gz")" -lt 16000000 ]; then mv "$work/.caches.tar.gz" "$out/caches.tar.gz"; fi
  fi
  pack
  rm -rf "$work"
}
trap finish EXIT
trap 'say "told to end"; exit 143' TERM INT

if [ -f .gpu/env.sh ] && command -v nvidia-smi > /dev/null; then
  source .gpu/env.sh
  say "the site is unpacked"
fi
python=${PYTHON:-python3}
if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
  # Prefill CUDA graphs are off but for the last server: --name+FLAG=VALUE of bench/servers.py.
  off=+cuda-graph-backend-prefill=disabled
  groups=(--group "stock-fa3$off" "vtensor-auto$off" --group "stock-triton$off" "vtensor-triton$off"
    --group "vtensor-fa3$off" vtensor-auto)
  flags=(--load-format dummy --sampling-backend pytorch --grammar-backend none --mem-fraction-static 0.8
    --max-total-tokens 100000 --skip-server-warmup --cuda-graph-max-bs-decode 64)
  # The pool as large as it gets, since what it takes of it is the question.
  memory_flags=(--load-format dummy --sampling-backend pytorch --grammar-backend none --mem-fraction-static 0.85
    --skip-server-warmup --cuda-graph-max-bs-decode 64 --cuda-graph-backend-prefill disabled)
  model=(--model "${MODEL:-.gpu/llama8b}")
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader >> "$work/summary.txt"
else
  say "no GPU: a dry run"
  groups=(--group stock-default vtensor-auto --group vtensor-auto+vtensor-kernel=torch)
  flags=()
  memory_flags=()
  model=()
  memcheck_s=60
fi

reserve_s=25
case " $steps " in *" memcheck "*) reserve_s=$((reserve_s + memcheck_s)) ;; esac
for name in $steps; do
  case $name in
    servers)
      budget_s=$(($(left) - reserve_s))
      # Its own budget ends it in order; the limit behind it is for the case that it does not.
      step servers $((budget_s + 15)) "$python" bench/compare.py "${model[@]}" "${groups[@]}" \
        --workload ${WORKLOADS:-gsp} --rounds "${ROUNDS:-1}" --budget-seconds "$budget_s" --out "$work/servers" -- "${flags[@]}"
      ;;
    memcheck)
      if command -v compute-sanitizer > /dev/null; then
        step memcheck "$(left)" compute-sanitizer --tool memcheck --error-exitcode 9 \
          "$python" -m pytest tests/kernels -k hopper -v -p no:cacheprovider
      else
        step memcheck $memcheck_s "$python" -m pytest tests/kernels -k hopper -q -p no:cacheprovider
      fi
      ;;
    memory)
      step memory "$(left)" "$python" bench/memory.py "${model[@]}" ${QUESTIONS:+--ask $QUESTIONS} \
        --budget-seconds "$(($(left) - 20))" --out "$work/memory" -- "${memory_flags[@]}"
      ;;
    soak)
      step soak "$(left)" "$python" bench/soak.py "${model[@]}" ${SOAK---debug} --budget-seconds "$(($(left) - 20))" \
        --out "$work/soak" -- "${memory_flags[@]}" --max-total-tokens 100000
      ;;
    *)
      say "no step $name; there are servers, memcheck, memory and soak"
      status=1
      ;;
  esac
done
say "done"
exit $status
