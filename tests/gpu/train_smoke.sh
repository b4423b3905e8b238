#!/bin/bash
# train_smoke.sh: the training tools on one GPU against themselves on the CPU, end to end. Usage: train_smoke.sh TOOLS DATA [WORK]
#
# TOOLS holds the built tools, DATA token shards text.h5 made with pico's tokenizer, and perhaps pico.h5 (data/models/pico), else
# what was pretrained here is quantized and drafted for. Curves of GPU and CPU are compared line by line, a resumed run with one
# left alone bit by bit. Prints a line a check; exits 1 if one failed, 77 without a GPU. About a minute.
set -u
tools=$(cd "$1" && pwd) data=$(cd "$2" && pwd) work=${3:-$(mktemp -d)}
here=$(cd "$(dirname "$0")" && pwd)
steps=${STEPS:-50} failed=0
mkdir -p "$work" && cd "$work" || exit 4
[ -e /dev/nvidia0 ] || { echo "no GPU: skipped" && exit 77; }

# check NAME COMMAND...: run, say how it went and how long it took
check() {
  name=$1 && shift
  start=${EPOCHREALTIME/./}
  timeout -k 5 "${LIMIT:-30}" "$@" > "$name.out" 2> "$name.err"
  code=$?
  printf '%-22s exit %d, %5d ms' "$name" $code $(((${EPOCHREALTIME/./} - start) / 1000))
  if [ $code -eq "${EXPECT:-0}" ]; then echo " ok"; else echo " FAILED" && tail -3 "$name.err" && failed=1; fi
}
# same NAME A B BOUND COLUMN...: columns of two logs differ by at most BOUND, relative
same() {
  name=$1 && shift
  python3 "$here/compare_logs.py" "$@" > "$name.out" 2>&1 || failed=1
  printf '%-22s %s\n' "$name" "$(tail -1 "$name.out")"
}

base="$tools/us-pretrain pico --data $data/text.h5 --steps $steps -b 8 -l 256 --log-every 1 --eval-windows 8 --seed 3 -v"
check pretrain-cuda $base --device cuda --log cuda.tsv -o cuda.h5
check pretrain-cpu $base --log cpu.tsv -o cpu.h5
same pretrain-curves cuda.tsv cpu.tsv 0.02 loss heldout
check pretrain-again $base --device cuda --log again.tsv -o again.h5
same pretrain-same-bits cuda.tsv again.tsv 0 loss norm heldout
check pretrain-recompute $base --device cuda --recompute --log recompute.tsv -o recompute.h5
same recompute-same-bits cuda.tsv recompute.tsv 0 loss norm heldout
check pretrain-adamw-cuda $base --optimizer adamw --lr 0.001 --device cuda --log adamw.tsv -o adamw.h5
check pretrain-adamw-cpu $base --optimizer adamw --lr 0.001 --log adamw-cpu.tsv -o adamw.h5
same adamw-curves adamw.tsv adamw-cpu.tsv 0.02 loss heldout

model=$data/pico.h5
[ -e "$model" ] || model=$PWD/cpu.h5

# Stopped half way by a signal after a save, then resumed: the same bits as without.
$base --device cuda --state run.state --save-every 5 --log part.tsv -o part.h5 > /dev/null 2> stop.err &
pid=$!
while [ ! -e run.state.1 ] && kill -0 $pid 2> /dev/null; do sleep 0.05; done
kill -9 $pid 2> /dev/null
wait $pid 2> /dev/null
echo "killed after $(wc -l < part.tsv) lines"
check pretrain-resumed $base --device cuda --state run.state --save-every 5 --resume --log part.tsv -o part.h5
same resumed-same-bits cuda.tsv part.tsv 0 loss norm heldout

qat="$tools/qat-quant $model --data $data/text.h5 --steps 12 -b 8 -l 256 --log-every 1 --probe-windows 4 --eval-windows 16 --eval-length 256 -v"
check qat-cuda $qat --device cuda --log qat-cuda.tsv --metrics qat-cuda-metrics.tsv -o q-cuda.h5
check qat-cpu $qat --log qat-cpu.tsv --metrics qat-cpu-metrics.tsv -o q-cpu.h5
same qat-curves qat-cuda.tsv qat-cpu.tsv 0.1 loss heldout
same qat-metrics qat-cuda-metrics.tsv qat-cpu-metrics.tsv 0.02 perplexity top1
check qat-fp8-cuda $qat -p all=fp8,experts=mxfp4,router=f32 --train all --loss ce --device cuda -o q8-cuda.h5

draft="$tools/dflash-train --target $model --data $data/text.h5 --steps 20 -b 8 -l 256 --anchors 32 --log-every 1 --eval-sequences 8 -v"
check dflash-cuda $draft --device cuda --log draft-cuda.tsv -o d-cuda.h5
check dflash-cpu $draft --log draft-cpu.tsv -o d-cpu.h5
same dflash-curves draft-cuda.tsv draft-cpu.tsv 0.05 loss heldout
check dflash-kl-cuda $draft --loss kl --device cuda --log draft-kl-cuda.tsv -o d-kl.h5
check dflash-kl-cpu $draft --loss kl --log draft-kl-cpu.tsv -o d-kl-cpu.h5
same dflash-kl-curves draft-kl-cuda.tsv draft-kl-cpu.tsv 0.05 loss heldout

eval="$tools/us-eval -m q-cpu.h5 --against $model --data $data/text.h5 --windows 16 -l 256"
check eval-cuda $eval --device cuda
check eval-cpu $eval
same eval-metrics eval-cuda.out eval-cpu.out 0.05 perplexity kl top1 overlap

lanes=$tools/../tests/gpu/train_lanes
[ -x "$lanes" ] || lanes=$tools/train_lanes
[ -x "$lanes" ] && LIMIT=60 check lanes "$lanes" "$data/text.h5" && cut -c 1-200 lanes.out

EXPECT=5 check too-many-gpus $base --device cuda:0 --gpus 64 -o no.h5
tail -1 too-many-gpus.err
tail -2 pretrain-cuda.err
cut -f 1,4,7,9,10,12 cuda.tsv | sed -n '1,3p;$p'
cut -f 1,4,7,9,10 cpu.tsv | sed -n '2,3p;$p'
exit $failed
