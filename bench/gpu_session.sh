#!/bin/bash
# What is to be seen on one GPU, in one go of less than ten minutes.
#
#   OUT=DIR bench/gpu_session.sh [STEP ...]      default: servers memcheck
#
# servers    on vTensor memory against stock ones: first-token logprobs, load, default prefill CUDA graphs (compare.py)
# memcheck   the kernels' tests under compute-sanitizer
# memory     what a server takes and gives back (memory.py)
# soak       overload, aborts, limits, flushes (soak.py)
# tests      that need a GPU: kernels, drivers, core
# commands   doctor, plan, and what looking costs the scheduler's thread there (bench_core.py)
# driver     what each call to the driver costs, idle, under load and beside other processes (bench_driver.py)
# grid       the kernels over all shapes, against all baselines
# profile    where the processes of stock fa3 and vtensor-auto spend their time, function by function (profile_server.py)
# programs   the frontend programs of examples/ (programs.py)
#
# bench/session.sh says how steps are run. In $OUT: summary.txt, rows to append to bench/results by the same names,
# runs.jsonl, memcheck.log, logs.tar.gz and caches.tar.gz (put into .gpu/, it saves compiling at the next start). Without a
# GPU it is a dry run on a tiny model.
#   WORKLOADS  (gsp)      ROUNDS  (1)      STATES  (cold warm)      QUESTIONS  of memory.py (all)
#   SOAK  flags of soak.py (--debug)      MEMORY  flags of memory.py
#   MODEL  (.gpu/llama8b, with dummy weights), or random: a small one of which answers can be compared (soak, servers)
#   PROFILED  workload of profile (shared-few), and its STATE  (warm)
#   POOL  tokens of each server that is compared (100000: two of an 8B shape fit 80 GB; 360000 for one, with SHARE=0.85)
#   SERVERS  of compare.py, groups parted by ";": "stock-fa3 vtensor-auto; vtensor-triton"
#   TOOL  of compute-sanitizer (memcheck), and on which tests: CHECKED  (hopper)
set -u
cd "$(dirname "$0")/.." || exit 1
steps=${*:-servers memcheck}
memcheck_s=80
source bench/session.sh

if [ "$num_gpus" -gt 0 ]; then
  # Prefill CUDA graphs are off but for the last server: --name+FLAG=VALUE of bench/servers.py.
  off=+cuda-graph-backend-prefill=disabled
  groups=(--group "stock-fa3$off" "vtensor-auto$off" --group "stock-triton$off" "vtensor-triton$off"
    --group "vtensor-fa3$off" vtensor-auto)
  if [ -n "${SERVERS:-}" ]; then
    groups=()
    IFS=';' read -ra asked <<< "$SERVERS"
    for group in "${asked[@]}"; do groups+=(--group $group); done
  fi
  shape=${MODEL:-.gpu/llama8b}
  model=(--model "$shape") weights=(--load-format dummy)
  # Its weights are float32, which would be served as float16: FlashAttention-3 in .gpu/ has kernels for bfloat16 only.
  if [ "$shape" = random ]; then shape=.gpu/llama8b model+=(--tokenizer .gpu/llama8b) weights=(--dtype bfloat16); fi
  flags=("${weights[@]}" --sampling-backend pytorch --grammar-backend none --mem-fraction-static "${SHARE:-0.8}"
    --max-total-tokens "${POOL:-100000}" --skip-server-warmup --cuda-graph-max-bs-decode 64)
  # The pool as large as it gets, since what it takes of it is the question.
  memory_flags=("${weights[@]}" --sampling-backend pytorch --grammar-backend none --mem-fraction-static 0.85
    --skip-server-warmup --cuda-graph-max-bs-decode 64 --cuda-graph-backend-prefill disabled)
else
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
        --workload ${WORKLOADS:-gsp} --states ${STATES:-cold warm} --rounds "${ROUNDS:-1}" --port "$port" \
        --budget-seconds "$budget_s" --out "$work/servers" -- "${flags[@]}"
      ;;
    memcheck)
      if command -v compute-sanitizer > /dev/null; then
        step memcheck "$(left)" compute-sanitizer --tool "${TOOL:-memcheck}" --error-exitcode 9 \
          "$python" -m pytest tests/kernels -k "${CHECKED:-hopper}" -v -p no:cacheprovider
      else
        step memcheck $memcheck_s "$python" -m pytest tests/kernels -k "${CHECKED:-hopper}" -q -p no:cacheprovider
      fi
      ;;
    memory)
      step memory "$(left)" "$python" bench/memory.py "${model[@]}" ${QUESTIONS:+--ask $QUESTIONS} ${MEMORY:-} \
        --port "$port" --budget-seconds "$(($(left) - 20))" --out "$work/memory" -- "${memory_flags[@]}"
      ;;
    soak)
      step soak "$(left)" "$python" bench/soak.py "${model[@]}" ${SOAK---debug} --port "$port" \
        --budget-seconds "$(($(left) - 20))" --out "$work/soak" -- "${memory_flags[@]}" ${memory_flags:+--max-total-tokens 100000}
      ;;
    tests)
      step tests "$(left)" "$python" -m pytest tests/vmm tests/core tests/kernels tests/gpu/test_kernels_unmapped.py -m gpu -q \
        -p no:cacheprovider
      ;;
    commands)
      step doctor 90 "$python" -m sgl_vtensor doctor
      if [ "$num_gpus" -gt 0 ]; then step plan 60 "$python" -m sgl_vtensor plan "$shape"; fi
      step overhead 240 "$python" bench/bench_core.py --steps 30 --trace --no-record
      ;;
    driver)
      step driver 150 "$python" bench/bench_driver.py --out "$work/driver"
      ;;
    profile)
      step profile "$(left)" "$python" bench/profile_server.py "${model[@]}" --workload "${PROFILED:-shared-few}" \
        --state "${STATE:-warm}" --rounds 8 --port "$port" --out "$work/profile" -- "${flags[@]}"
      ;;
    programs)
      step programs 400 "$python" bench/programs.py "${model[@]}" --port "$port" --out "$work/programs" -- "${memory_flags[@]}" \
        ${memory_flags:+--grammar-backend xgrammar}
      ;;
    grid)
      for bench in prefill decode; do
        share_s=$(($(left) / ($([ $bench = prefill ] && echo 2 || echo 1))))
        step "grid-$bench" "$share_s" "$python" "bench/bench_$bench.py" --grid --budget-ms 8 --seconds $((share_s - 40)) \
          --out "$work/grid"
      done
      ;;
    *)
      say "no step $name; there are servers, memcheck, memory, soak, tests, commands, driver, profile, programs and grid"
      status=1
      ;;
  esac
done
say "done"
exit $status
