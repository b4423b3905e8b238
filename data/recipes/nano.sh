#!/bin/sh
# nano.sh: train nano and its drafter from text. Usage: data/recipes/nano.sh --text DIR [options]
#
# Vocabulary, token shards, pretraining, QAT to MXFP4 experts and FP8, the quantized model's answers, the drafter on them, tables
# and pictures. data/recipes/nano_text.py makes --text DIR. Resumable: every stage is skipped when its file exists. About nine
# minutes at most on one H200; --minutes stretches all that trains.
#
#   --text DIR      text to learn from (required)
#   --math FILE     grade-school-math train.jsonl: questions, and others derived from them
#   --agent FILE    tau-bench trajectories (*.json): dialogues, and others derived from them
#   --prompts DIR   prompt sets: measured on, and left out of the text; may be repeated (data/prompts is always both)
#   --out DIR       where the results go (out/nano)
#   --device D      cuda, cuda:N or cpu (cuda)
#   --gpus N        GPUs, from --device on (1)
#   --minutes M     for what trains and answers together (5.8: 432 seconds in all were measured)
#   --shape NAME    another shape (nano)
#   --vocab N       its vocabulary (8192)
#   --batch N       sequences a pretraining step (64)
#   --length N      their tokens (1024)
#   --threads N     CPU threads (0: all)
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"
. "$US_ROOT/data/recipes/stages.sh"

shape=nano vocab=8192 device=cuda gpus=1 threads=0 minutes=5.8 batch=64 length=1024 scale=4 answer_count=12000
text='' math='' agent='' out=$US_ROOT/out/nano prompts="--prompts $US_ROOT/data/prompts" sets=$US_ROOT/data/prompts
while [ $# -gt 0 ]; do
  case $1 in
  --minutes) minutes=${2:?--minutes needs a number} && shift ;;
  -h | --help) sed -n '2,23s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) recipe_option "$@" || { us_say "nano.sh: unknown option '$1'; see --help" && exit 2; } && shift ;;
  esac
  shift
done
recipe_begin nano.sh

# part SHARE: so much of the minutes.
part() { awk -v m="$minutes" -v s="$1" 'BEGIN { printf "%.3f", m * s }'; }
most_seconds=$(awk -v m="$minutes" 'BEGIN { printf "%d", 60 * m + 60 }')
answer_seconds=$(awk -v m="$minutes" 'BEGIN { printf "%d", 60 * m * 0.12 + 1 }')
pretrain_options="--steps 0 --minutes $(part 0.60) -b $batch -l $length --lr 0.004 --log-every 25 --eval-windows 64"
qat_options="--train all --steps 0 --minutes $(part 0.10) -b 32 -l 512 --lr 0.0001 --floor 0.02 --eval-windows 200"
# 3 layers of 320 over three taps: 3.9 MB in bf16
draft_options="--steps 0 --minutes $(part 0.16) -b 16 -l 512 --anchors 128 --text-share 0.4 --layers 3 --block 8 --window 128
  --heads 4 --kv-heads 2 --head-dim 64 --inner 320 --taps 2,5,8 --lr 0.004 --log-every 25 ${US_DRAFT_OPTIONS:-}"

recipe_text
recipe_pretrain
recipe_qat
recipe_draft
recipe_pack
recipe_tables
us_say "$shape.h5, q.h5 and draft.h5 are in $out; what is bundled is in $out/bundle"
