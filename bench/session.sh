# What the scripts for a session on GPUs share; to be sourced in the checkout's folder, with the settings in place. Steps
# are independent: each has its own limit and log, and what there is goes to $OUT every 20 seconds, so that nothing is lost
# however the session ends. Where .gpu/ has come along (bench/pack_gpu.sh), SGLang is unpacked from it.
#   OUT  (a folder)      SESSION_SECONDS  for all of it (560)      PYTHON  (python3)
out=$(realpath -m "${OUT:?where the results are to go}")
mkdir -p "$out"
work=$(mktemp -d /tmp/gpu-session.XXXXXX)
limit_s=${SESSION_SECONDS:-560}
python=${PYTHON:-python3}
status=0
# Of its servers. SGLang takes a port a minute after it has been found free: sessions side by side have others.
port=$((20000 + $$ % 200 * 50))

left() { echo $((limit_s - SECONDS)); }
say() { echo "[$SECONDS s] $*" >> "$work/summary.txt"; echo "[$SECONDS s] $*"; }

pack() { # files are moved into place whole, so that a kill never leaves half of one
  local new=$work/.$BASHPID.new file found
  (cd "$work" && tar czf "$new" --exclude='*-llama' --exclude='llama70b*' -- * 2> /dev/null)
  [ $? -gt 1 ] || mv "$new" "$out/logs.tar.gz" # 1: a log grew meanwhile
  for file in summary.txt memcheck.log gpus.csv serving.csv memory.csv soak.csv programs.csv profile.csv prefill.csv \
    decode.csv driver.csv soak.json runs.jsonl; do
    found=$(ls "$work/$file" "$work"/*/"$file" 2> /dev/null)
    [ -z "$found" ] || { awk 'FNR > 1 || NR == 1 || !/^date,/' $found > "$new" && mv "$new" "$out/$file"; }
  done
}

step() { # NAME SECONDS COMMAND...: a log of its own, and a limit of its own within what is left
  local name=$1 most=$2 code begin=$SECONDS
  shift 2
  [ "$(left)" -ge "$most" ] || most=$(left)
  if [ "$most" -lt 20 ]; then
    say "$name: left out, $most s are left"
    status=1
    return 1
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
  return $code
}

# A wait without a child, which would hold our output open after we have ended.
(while ! read -rt 20; do pack; done) <> <(:) > /dev/null 2>&1 &
helpers=($!)
finish() {
  kill "${helpers[@]}" 2> /dev/null
  wait "${helpers[@]}" 2> /dev/null
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
num_gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU')
if [ "$num_gpus" -gt 0 ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader >> "$work/summary.txt"
else
  say "no GPU: a dry run"
fi
