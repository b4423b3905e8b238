#!/bin/sh
# mini.sh: train mini (1.2 B parameters) and its drafter from text, in stages of at most nine minutes.
# Usage: data/recipes/mini.sh --text DIR [--stage text|pretrain|finish] [options]
#
# text: vocabulary and token shards. pretrain: from random weights, resumable to the same bits. finish: QAT to MXFP4 experts and FP8,
# the quantized model's answers, the drafter on them, tables and pictures. Without --stage all of them, one after the other; what is
# there is skipped, so that a stage that was cut short is run again. The budget is 18 minutes on four H200. The tables and
# pictures are small; the weights stay where they were made.
#
#   --text DIR      what nano_text.py collected (required)
#   --math FILE     grade-school-math train.jsonl: questions, and others derived from them
#   --agent FILE    tau-bench trajectories (*.json): dialogues, and others derived from them
#   --prompts DIR   prompt sets: measured on, and left out of the text; may be repeated (data/prompts is always both)
#   --out DIR       where the results go (out/mini)
#   --device D      cuda, cuda:N or cpu (cuda)
#   --gpus N        GPUs, from --device on (4)
#   --pretrain M    minutes of pretraining (8)
#   --finish M      minutes of what trains and answers afterwards (6.5)
#   --shape NAME    another shape (mini)
#   --vocab N       its vocabulary (16384)
#   --batch N       sequences a pretraining step (128)
#   --threads N     CPU threads (0: all)
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"
. "$US_ROOT/data/recipes/stages.sh"

shape=mini vocab=16384 device=cuda gpus=4 threads=0 pretrain=8 finish=6.5 batch=128 length=1024 scale=4 answer_count=6000 stages=
text='' math='' agent='' out=$US_ROOT/out/mini prompts="--prompts $US_ROOT/data/prompts" sets=$US_ROOT/data/prompts
while [ $# -gt 0 ]; do
  case $1 in
  --stage) stages="$stages ${2:?--stage needs a name}" && shift ;;
  --pretrain) pretrain=${2:?--pretrain needs a number} && shift ;;
  --finish) finish=${2:?--finish needs a number} && shift ;;
  -h | --help) sed -n '2,25s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) recipe_option "$@" || { us_say "mini.sh: unknown option '$1'; see --help" && exit 2; } && shift ;;
  esac
  shift
done
recipe_begin mini.sh

# part MINUTES SHARE: so much of the minutes.
part() { awk -v m="$1" -v s="$2" 'BEGIN { printf "%.3f", m * s }'; }
most_seconds=540
answer_seconds=$(awk -v m="$finish" 'BEGIN { printf "%d", 60 * m * 0.15 + 1 }')
pretrain_options="--steps 0 --minutes $pretrain -b $batch -l $length --lr 0.003 --log-every 10 --eval-windows 64
  --state pretrain.state --save-every 500 --resume"
qat_options="--train experts --steps 0 --minutes $(part "$finish" 0.3) -b 32 -l 512 --lr 0.00005 --floor 0.02 --eval-windows 200"
draft_options="--steps 0 --minutes $(part "$finish" 0.55) -b 16 -l 512 --anchors 128 --text-share 0.25 --layers 3 --block 8 --window 256
  --heads 8 --kv-heads 4 --head-dim 128 --inner 2048 --taps 1,5,10,15 --lr 0.004 --log-every 10 ${US_DRAFT_OPTIONS:-}"

for name in ${stages:-text pretrain finish}; do
  case $name in
  text) recipe_text ;;
  pretrain) recipe_pretrain ;;
  finish) recipe_qat && recipe_draft && recipe_tables ;;
  *) us_say "mini.sh: no stage '$name'; see --help" && exit 2 ;;
  esac
done
