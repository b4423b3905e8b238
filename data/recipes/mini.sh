#!/bin/sh
# mini.sh: train mini (1.2 B parameters) and its drafter from text, in stages of at most nine minutes.
# Usage: data/recipes/mini.sh --text DIR [--stage text|pretrain|finish] [options]
#
# text: code of --site, derived text, vocabulary, token shards. pretrain: from random weights; the prompts to answer are made meanwhile.
# finish: QAT to MXFP4 experts and FP8, the quantized model's answers, an MXFP4 drafter on them, tables and pictures. Without --stage all
# of them, one after the other; what is there is skipped, so that a stage that was cut short is run again. finish goes on with what there
# is: without QAT the model is rounded, without a drafter there are plain answers. Made for two H200 and 17 minutes. Tables and pictures are
# small; the weights stay where they were made.
#
#   --text DIR      what nano_text.py collected (required)
#   --site DIR      folder of installed Python packages: more code
#   --math FILE     grade-school-math train.jsonl: questions, and others derived from them
#   --agent FILE    tau-bench trajectories (*.json): dialogues, and others derived from them
#   --prompts DIR   prompt sets: measured on, and left out of the text; may be repeated (data/prompts is always both)
#   --out DIR       where the results go (out/mini)
#   --device D      cuda, cuda:N or cpu (cuda)
#   --gpus N        GPUs, from --device on (2)
#   --pretrain M    minutes of pretraining (5.75)
#   --finish M      minutes of what trains and answers afterwards (6.25)
#   --shape NAME    another shape (mini)
#   --vocab N       its vocabulary (16384)
#   --tokenizer F   a vocabulary that is there already
#   --batch N       sequences a pretraining step (16)
#   --length N      their tokens (4096; a quarter of it afterwards)
#   --save N        steps between saves of pretraining's state, to be resumed (0: not saved; a state of mini has 14 GB)
#   --threads N     CPU threads (0: all)
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"
. "$US_ROOT/data/recipes/stages.sh"

shape=mini vocab=16384 device=cuda gpus=2 threads=0 pretrain=5.75 finish=6.25 batch=16 length=4096 scale=4 answer_count=90000 save=0 stages=
text='' math='' agent='' site='' most=1 prompt_most=2000 out=$US_ROOT/out/mini prompts="--prompts $US_ROOT/data/prompts" sets=$US_ROOT/data/prompts
while [ $# -gt 0 ]; do
  case $1 in
  --stage) stages="$stages ${2:?--stage needs a name}" && shift ;;
  --pretrain) pretrain=${2:?--pretrain needs a number} && shift ;;
  --finish) finish=${2:?--finish needs a number} && shift ;;
  --save) save=${2:?--save needs a number} && shift ;;
  -h | --help) sed -n '2,31s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) recipe_option "$@" || { us_say "mini.sh: unknown option '$1'; see --help" && exit 2; } && shift ;;
  esac
  shift
done
recipe_begin mini.sh

minutes=$finish short=$((length / 4))
answer_seconds=$(seconds 0.09)
# GPTQ of a million tokens takes five seconds on a GPU, with loading and measuring half a minute; a CPU holds them all at once.
gptq=1024
[ "$device" != cpu ] || gptq=48
qat_options="--train all --gptq $gptq --lr 0.00001 --steps 0 --minutes $(part 0.55) -b $((16 * gpus)) -l $short --across 0.3 --routers 0.3
  --beta2 0.99 --schedule quadratic --warmup 0.1 --floor 0 --log-every 20 --probe-every 200 --eval-windows 200 ${US_QAT_OPTIONS:-}"
draft_options="--steps 0 --minutes $(part 0.31) -b 64 -l $short --anchors 128 --text-share 0.25 --across 0.5 --layers 3 --block 8 --window 256 --heads 8
  --kv-heads 4 --head-dim 128 --inner 2048 --taps 1,5,10,15 --format mxfp4 --lr 0.004 --log-every 20 ${US_DRAFT_OPTIONS:-}"

limit() { most_seconds=$(awk -v m="$1" -v s="$2" 'BEGIN { printf "%d", 60 * m + s }'); }

all_text() {
  limit 0 300
  recipe_code &
  recipe_derived
  wait $!
  recipe_vocabulary
  # shellcheck disable=SC2086
  token_shards text.h5 "$text" derived ${site:+site}
}

# Weights that begin small, steep gates, and choices of experts that do not tip when weights are rounded: what lets finetuning close the gap.
pretraining() {
  limit "$pretrain" 120
  recipe_prompts >prompts.log 2>&1 &
  prepared=$!
  saved=''
  [ "$save" = 0 ] || saved="--state pretrain.state --save-every $save --resume"
  # shellcheck disable=SC2086
  pretrain pretrain "$shape.h5" --data text.h5 --steps 0 --minutes "$pretrain" -b "$batch" -l "$length" --across 0.5 --lr 0.002 --warmup 0.03 \
    --floor 0.02 --deviation 0.006 --score-decay 0.001 --margin 0.5 --margin-weight 0.003 --log-every 20 --eval-windows 32 $saved
  wait $prepared || { cat prompts.log >&2 && exit 1; }
}

finetuning() {
  limit "$(part 0.55)" 300 # beside the steps: GPTQ, placing three models to compare them, reading back
  recipe_qat
}

finish() {
  # shellcheck disable=SC2046,SC2086
  finetuning || stage "rounding, not finetuned" q.h5 qat-quant "$shape.h5" --data text.h5 --steps 0 -o q.h5 $RECIPE_PRECISION --metrics quality.tsv \
    --eval-windows 200 $(on_one)
  limit "$(part 0.45)" 120
  recipe_draft || us_say "there is no drafter: plain answers alone"
  limit 0 120
  recipe_tables
}

for name in ${stages:-text pretrain finish}; do
  case $name in
  text) all_text ;;
  pretrain) pretraining ;;
  finish) finish ;;
  *) us_say "mini.sh: no stage '$name'; see --help" && exit 2 ;;
  esac
done
