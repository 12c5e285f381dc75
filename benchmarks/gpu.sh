#!/bin/sh
# Every committed result of a GPU, in one run: answers are checked first, peers are timed beside strobe.
#   benchmarks/gpu.sh [fa2,cudnn,fa3,fa4 [fa3,flashinfer [OUT [COMMIT]]]]
# The first list are prefill's peers, the second decode's: those that can be imported here.
set -eu
prefill_peers=${1-fa2,cudnn}
decode_peers=${2-}
out=${3-benchmarks/results/$(python3 -c 'from strobe import device; print(device.gpu().slug)')}
commit=${4-}
bench() { name=$1; shift; python3 -m strobe bench "$@" --save "$out/$name.json" ${commit:+--commit "$commit"}; }

bench prefill attention --suite prefill --kernel cuda_hopper,cuda_async,triton_fused --vs "$prefill_peers"
bench decode attention --suite decode --vs "$decode_peers"
bench ladder attention --suite ladder
bench memory memory --seq 1k,2k,4k,8k --heads 8 --head-dim 64
bench roofline roofline --vs "${prefill_peers}" --plot "$out/roofline.svg"
bench engine_ladder engine-ladder --random llama2-7b --output 32 --runs 2
