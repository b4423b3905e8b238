#!/bin/sh
# nano.sh: train nano and its drafter from text. Usage: data/recipes/nano.sh --text DIR [options]
#
# Token shards, pretraining in three stretches, QAT to MXFP4 experts and FP8, the quantized model's answers, an MXFP4 drafter with
# its own MXFP4 head on them, tables and pictures. data/recipes/nano_text.py makes --text DIR. Pretraining begins on --text and what is derived from it; meanwhile
# the code of --site is collected, and joins in the second stretch; the third is long windows without that code. Resumable: every stage is
# skipped when its file exists. Nine minutes at most on one H200; --minutes stretches all that trains.
#
#   --text DIR      text to learn from (required)
#   --site DIR      folder of installed Python packages: more code
#   --math FILE     grade-school-math train.jsonl: questions, and others derived from them
#   --agent FILE    tau-bench trajectories (*.json): dialogues, and others derived from them
#   --prompts DIR   prompt sets: measured on, and left out of the text; may be repeated (data/prompts is always both)
#   --out DIR       where the results go (out/nano)
#   --device D      cuda, cuda:N or cpu (cuda)
#   --gpus N        GPUs, from --device on (1)
#   --minutes M     for what trains and answers together (7)
#   --shape NAME    another shape (nano)
#   --vocab N       its vocabulary (8192)
#   --tokenizer F   a vocabulary that is there already, such as data/models/nano/tokenizer.json
#   --batch N       sequences a pretraining step (64)
#   --length N      their tokens (1024; in the third stretch four times as many, and a quarter of the sequences)
#   --threads N     CPU threads (0: all)
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"
. "$US_ROOT/data/recipes/stages.sh"

shape=nano vocab=8192 device=cuda gpus=1 threads=0 minutes=7 batch=64 length=1024 scale=4 answer_count=90000 site='' most=3 prompt_most=16000 data=late.h5
text='' math='' agent='' out=$US_ROOT/out/nano prompts="--prompts $US_ROOT/data/prompts" sets=$US_ROOT/data/prompts
while [ $# -gt 0 ]; do
  case $1 in
  --minutes) minutes=${2:?--minutes needs a number} && shift ;;
  -h | --help) sed -n '2,26s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) recipe_option "$@" || { us_say "nano.sh: unknown option '$1'; see --help" && exit 2; } && shift ;;
  esac
  shift
done
recipe_begin nano.sh

most_seconds=$(awk -v m="$minutes" 'BEGIN { printf "%d", 60 * m + 60 }')
answer_seconds=$(seconds 0.06)
# Of GPTQ: five seconds on a GPU.
gptq=512
[ "$device" != cpu ] || gptq=64
four=$(((batch + 3) / 4))
pretrain_options="--score-decay 0.001 --margin 0.5 --margin-weight 0.003 --steps 0 --log-every 25 --eval-windows 64"
qat_options="--train all --steps 0 --minutes $(part 0.22) -b 32 -l $length --across 0.3 --gptq $gptq --routers 0.3 --freeze 0.05 --lr 0.0001
  --schedule quadratic --beta2 0.99 --warmup 0.03 --floor 0
  --probe-every 500 --log-every 25 --eval-windows 200 ${US_QAT_OPTIONS:-}"
draft_options="--steps 0 --minutes $(part 0.23) -b 64 -l $((2 * length)) --anchors 64 --text-share 0.25 --across 0.5 --layers 3 --block 8 --window 256
  --heads 4 --kv-heads 2 --head-dim 64 --inner 384 --taps 1,3,5 --format mxfp4 --head mxfp4 --lr 0.004 --log-every 25 ${US_DRAFT_OPTIONS:-}"

# The rest of the text, and the prompts to answer, while the GPU is at the first stretch.
prepare() {
  recipe_code
  # shellcheck disable=SC2086
  token_shards text.h5 "$text" derived ${site:+site}
  recipe_prompts
}

recipe_derived
recipe_vocabulary
token_shards late.h5 "$text" derived
prepare >prepare.log 2>&1 &
prepared=$!
# shellcheck disable=SC2086
pretrain pretrain-1 first.h5 --data late.h5 --minutes "$(part 0.12)" -b "$batch" -l "$length" --lr 0.004 --floor 1 --warmup 0.05 --deviation 0.01 $pretrain_options
wait $prepared || { cat prepare.log >&2 && exit 1; }
# shellcheck disable=SC2086
pretrain pretrain-2 second.h5 --init first.h5 --data text.h5 --minutes "$(part 0.23)" -b "$batch" -l "$length" --lr 0.004 --floor 0.35 --warmup 0.01 \
  --seed 2 $pretrain_options
# shellcheck disable=SC2086
pretrain pretrain-3 "$shape.h5" --init second.h5 --data late.h5 --minutes "$(part 0.14)" -b "$four" -l $((4 * length)) --across 0.5 --lr 0.0014 --floor 0.03 \
  --warmup 0.02 --seed 3 $pretrain_options
recipe_qat
recipe_draft
recipe_pack
recipe_tables
us_say "$shape.h5, q.h5 and draft.h5 are in $out; what is bundled is in $out/bundle"
