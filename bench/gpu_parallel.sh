#!/bin/bash
# What is to be seen on two GPUs: tensor parallelism and replicas, on vTensor memory and stock.
#
#   OUT=DIR bench/gpu_parallel.sh [STEP ...]      default: all, in this order, as far as there is time
#
# pair       Llama-8B shape, --tp-size 2: two servers side by side on the same two GPUs, stock fa3 and vtensor-auto, decode
#            graphs and overlap on; gsp and agents in turn. Ranks compare their decisions at every eighth launch.
# soak       the same on vTensor memory with --vtensor-debug: overload, aborts, limits, flushes (bench/soak.py)
# replicas   --dp-size 2: one load, the limit lowered under it, top and limit of each replica (bench/memory.py)
# large      a 70B shape at --tp-size TP, stock fa3 and then vtensor-auto; gsp. 80 layers are 139 GB: on two cards
#            of 80 GB 40 of them
# answers    first-token logprobs at --tp-size 2 against stock's, of a small random model for which the prompt matters
#
# In ten minutes there is time for two or three of these: pair and soak, then replicas, large and answers. bench/session.sh
# says how steps are run. In $OUT, beside what gpu_session.sh leaves: gpus.csv, each GPU's memory in use, second by second.
#   WORKLOADS  of pair (gsp agent)     PAIR_SECONDS  (300)     SOAK_SECONDS  (150)     ROUNDS  of what is compared (1)
#   SERVERS  of pair, side by side: "vtensor-auto vtensor-auto+vtensor-reserve=8%"
#   TP  of large (2)
#   LAYERS  of large: above 40 on 80 GB cards with a small pool, and no more than its weights leave
set -u
cd "$(dirname "$0")/.." || exit 1
steps=${*:-pair soak replicas large answers}
source bench/session.sh
tp=${TP:-2}

# A program that uses NVLink multicast can put GPUs that others share out of service. SGLang at --tp-size does, to gather
# logits and in its newer all-reduce: PyTorch refuses it by these variables, and the all-reduce is the older one, over CUDA
# IPC. Servers take the variables over.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2=0
# The test of it takes a minute, and two servers would write its result to one file at once: the driver's word is taken.
export SGLANG_SKIP_P2P_CHECK=1
# Servers that start side by side see each other's weights come.
export SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK=0
all_reduce=()

if [ "$num_gpus" -ge 2 ]; then
  nvidia-smi topo -m >> "$work/summary.txt" 2>&1
  nvidia-smi --query-gpu=timestamp,index,memory.used --format=csv,noheader,nounits -l 1 > "$work/gpus.csv" 2>&1 &
  helpers+=($!)
  dummy=(--load-format dummy)
  flags=(--sampling-backend pytorch --grammar-backend none --skip-server-warmup
    --cuda-graph-max-bs-decode 64 --cuda-graph-backend-prefill disabled)
  model=(--model "${MODEL:-.gpu/llama8b}")
  random=(--model random --tokenizer "${MODEL:-.gpu/llama8b}")
  bfloat16=(--dtype bfloat16) # of float16, FlashAttention-3 in .gpu/ has no kernels
  stock=stock-fa3
  pool=(--mem-fraction-static 0.8 --max-total-tokens 200000)
  small=(--mem-fraction-static 0.8 --max-total-tokens 60000)
elif [ "$num_gpus" -eq 0 ]; then
  export SGLANG_CPU_OMP_THREADS_BIND="0|$(($(nproc) > 1 ? 1 : 0))" OMP_NUM_THREADS=1
  dummy=() flags=() model=() random=() bfloat16=() pool=() small=() large=() large_model=()
  stock=stock-default
else
  say "one GPU: these questions need two"
  exit 1
fi

used() { # what each GPU holds now, in MiB
  [ "$num_gpus" -eq 0 ] || say "$1: $(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | paste -sd' ') MiB in use"
}

compare() { # NAME SECONDS ARGUMENTS... -- FLAGS...: and once more with NCCL's all-reduce if no server could be measured
  local name=$1 most=$2
  shift 2
  step "$name" "$most" "$python" bench/compare.py --rounds "${ROUNDS:-1}" --start-seconds 240 --port "$port" \
    --budget-seconds "$(budget "$most")" --out "$work/$name" "$@" "${flags[@]}" "${all_reduce[@]}"
  if [ ! -s "$work/$name/serving.csv" ] && [ "$num_gpus" -gt 0 ] && [ ${#all_reduce[@]} -eq 0 ]; then
    all_reduce=(--disable-custom-all-reduce)
    compare "$name" "$most" "$@"
  fi
}

budget() { # of SECONDS for a command that ends in order by itself, within what is left
  echo $((($1 < $(left) ? $1 : $(left)) - 15))
}

write_large_model() { # the shape of Llama-3-70B, with the small model's vocabulary and tokenizer
  local gib=$(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits --id=0) >> 10)) layers
  local most=$((gib * tp > 240 ? 80 : 40))
  layers=${LAYERS:-$most}
  large=(--mem-fraction-static "$([ "$layers" -le "$most" ] && echo 0.85 || echo 0.93)")
  cp -r "${MODEL:-.gpu/llama8b}" "$work/llama70b"
  "$python" - "$work/llama70b/config.json" "$layers" <<'PYTHON'
import json, pathlib, sys

path, layers = pathlib.Path(sys.argv[1]), int(sys.argv[2])
config = json.loads(path.read_text())
config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
path.write_text(json.dumps(config | {"num_hidden_layers": layers}))
path.parent.rename(path.parent.with_name(f"llama70b-{layers}-of-80-layers"))
PYTHON
  large_model=(--model "$(ls -d "$work"/llama70b-*)")
}

for name in $steps; do
  used "before $name"
  case $name in
    pair)
      compare pair "${PAIR_SECONDS:-300}" "${model[@]}" --group ${SERVERS:-"$stock" vtensor-auto} --longest-probe 0 \
        --workload ${WORKLOADS:-gsp agent} -- --tp-size 2 "${dummy[@]}" "${pool[@]}"
      ;;
    soak)
      soak_s=${SOAK_SECONDS:-150}
      step soak $((soak_s + 220)) "$python" bench/soak.py "${model[@]}" --debug --seconds "$soak_s" --port "$port" \
        --budget-seconds "$(budget $((soak_s + 220)))" --out "$work/soak" -- --tp-size 2 "${dummy[@]}" "${flags[@]}" \
        "${small[@]}" "${all_reduce[@]}"
      ;;
    replicas)
      step replicas 240 "$python" bench/memory.py "${model[@]}" --ask replicas --port "$port" \
        --budget-seconds "$(budget 240)" --out "$work/replicas" -- "${dummy[@]}" "${flags[@]}" "${small[@]}"
      ;;
    large)
      [ "$num_gpus" -eq 0 ] || write_large_model
      compare large 360 "${large_model[@]}" --group "$stock" --group vtensor-auto --longest-probe 0 \
        --workload gsp -- --tp-size "$tp" "${dummy[@]}" "${large[@]}"
      ;;
    answers)
      compare answers 200 "${random[@]}" --group "$stock" vtensor-auto --workload shared-few --states cold \
        --scale 0.02 -- --tp-size 2 "${bfloat16[@]}" "${small[@]}"
      ;;
    *)
      say "no step $name; there are pair, soak, replicas, large and answers"
      status=1
      ;;
  esac
done
used "at the end"
say "done"
exit $status
