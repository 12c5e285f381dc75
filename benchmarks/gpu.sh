#!/bin/sh
# Every committed result of a GPU, the most important first. Answers are checked before they are timed, peers
# are timed beside strobe. Each step has a deadline: a step that overruns is stopped, keeps what it has measured
# where it can, and is named at the end; the others go on.
#   benchmarks/gpu.sh [--quick] [--only STEP,STEP] [--out FOLDER] [--commit ID]
#                     [--prefill-peers fa2,cudnn,fa3,fa4] [--decode-peers fa3,fa3_contiguous,flashinfer]
#                     [--engine-peers vllm,vllm-in-process,transformers] [--engine 'graphs=true overlap=true']
# --quick takes few shapes and short runs, and writes to a folder of its own unless --out names one.
set -u
quick= only= out= commit= prefill_peers=fa2,cudnn decode_peers= engine_peers= engine_options=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1; shift; continue ;;
    --only | --out | --commit | --prefill-peers | --decode-peers | --engine-peers | --engine) ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
  case $1 in
    --only) only=$2 ;;
    --out) out=$2 ;;
    --commit) commit=$2 ;;
    --prefill-peers) prefill_peers=$2 ;;
    --decode-peers) decode_peers=$2 ;;
    --engine-peers) engine_peers=$2 ;;
    --engine) for option in $2; do engine_options="$engine_options --engine $option"; done ;;
  esac
  shift 2
done
if [ -z "$out" ]; then
  slug=$(python3 -c 'from strobe import device; print(device.gpu().slug)') || exit 2
  out=benchmarks/results/$slug
  [ -z "$quick" ] || out=${TMPDIR:-/tmp}/strobe-quick/$slug
fi
mkdir -p "$out"
bad=

# step NAME SECONDS QUICK_SECONDS COMMAND...: run it, unless --only leaves it out
step() {
  name=$1 limit=$2
  [ -z "$quick" ] || limit=$3
  shift 3
  case ",${only:-$name}," in *",$name,"*) ;; *) return 0 ;; esac
  echo "== $name (at most $limit s)" >&2
  start=$(date +%s)
  timeout -s INT -k 10 "$limit" "$@"
  status=$?
  echo "== $name: $(($(date +%s) - start)) s, exit code $status" >&2
  case $status in
    0) ;;
    124 | 137) bad="$bad $name (stopped after $limit s)" ;;
    *) bad="$bad $name (exit code $status)" ;;
  esac
}

# measure NAME SECONDS QUICK_SECONDS FILE ARGS...: a verb of strobe that writes FILE.json
measure() {
  what=$1 long=$2 short=$3 file=$4
  shift 4
  step "$what" "$long" "$short" python3 -m strobe "$@" --save "$out/$file.json" ${commit:+--commit "$commit"}
}

# quickly QUICK FULL: the one that is asked for
quickly() { if [ -n "$quick" ]; then echo "$1"; else echo "$2"; fi; }

engine() {
  measure "$1" "$2" "$3" engine bench engine --suite "$(quickly quick standard)" --add \
    --runs "$(quickly 1 3)" --random "$4" --vs "${5-}" $engine_options
}

step warm 90 90 python3 -m strobe cache warm
measure decode 300 60 decode bench decode --suite "$(quickly quick all)" --vs "$decode_peers"
measure decode-dense 60 60 decode_dense bench decode --suite dense --vs "$prefill_peers"
measure append 45 45 append bench decode --suite append
engine engine-llama3.2-1b 150 60 llama3.2-1b
engine engine-llama3-8b 200 60 llama3-8b
[ -n "$quick" ] || engine engine-llama2-7b 150 60 llama2-7b
measure deterministic 240 60 engine bench engine --suite "$(quickly quick standard)" --add --runs "$(quickly 1 3)" \
  --random llama3-8b --engine deterministic=true $engine_options
measure profile 60 60 profile bench profile --random llama3.2-1b --trace "${TMPDIR:-/tmp}/strobe-decode-step.json" \
  $engine_options
measure prefill 180 45 prefill bench attention --suite "$(quickly prefill-quick prefill)" \
  --kernel cuda_hopper,cuda_async,triton_fused --vs "$prefill_peers"
measure small 90 45 small bench attention --suite small --replay --kernel cuda_hopper --vs "$prefill_peers"
measure host 45 45 host bench attention --suite small --host --vs "$prefill_peers"
measure kernels 60 60 kernels bench startup --rungs
measure startup 180 60 startup bench startup --random "$(quickly llama3.2-1b llama3-8b)" --runs "$(quickly 1 3)" \
  $engine_options
measure verify 300 90 verify verify --random "$(quickly llama3.2-1b,gpt2 all)" --dtype bfloat16 $engine_options
if [ -n "$engine_peers" ]; then
  engine beside-llama3.2-1b 500 300 llama3.2-1b "$engine_peers"
  engine beside-llama3-8b 500 300 llama3-8b "$engine_peers"
  [ -n "$quick" ] || engine beside-llama2-7b 400 300 llama2-7b "$engine_peers"
fi
measure ladder 240 60 ladder bench attention --suite "$(quickly ladder-quick ladder)"
measure memory 60 60 memory bench memory --seq 1k,2k,4k,8k --heads 8 --head-dim 64
measure roofline 120 90 roofline bench roofline --vs "$prefill_peers"
measure engine-ladder 120 60 engine_ladder bench engine-ladder --random "$(quickly llama3.2-1b llama2-7b)" \
  --output 32 --runs 2
measure soak 500 60 soak bench soak --random llama3.2-1b --tokens "$(quickly 50000 1000000)" --in-flight 256 \
  $engine_options

[ -z "$bad" ] || { echo "not whole:$bad" >&2; exit 1; }
