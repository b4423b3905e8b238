#!/bin/sh
# reproduce.sh: the tables of docs/results.md, from an unquantized model. Usage: data/recipes/reproduce.sh [options]
#
# Precision by module family; MXFP4 by scale rule, weights, rate, loss, optimizer, batch, schedule and steps, with a control; the drafter by
# optimizer, rate, seed, text, target, loss, block, layers, taps, window, and some together; speed, rules of verification, adaptive length. TSV, PNG and
# results.md in --out. Every step is cached by the hash of its command, its inputs' content and its tool's version: a run that was
# stopped goes on where it was. No step takes more than eight minutes.
#
#   --model FILE      unquantized model (the bundled pico)
#   --data FILE       token shards of its text; without it, shards are made of data/sample/text
#   --served FILE     its quantized model, for drafters; without it one is made
#   --draft FILE      a drafter of that, for speed and verification; without it one is made
#   --prompts DIR     prompt sets (data/prompts)
#   --questions FILE  questions with answers to score; without it 200 are made from templates (8 with --small)
#   --answers FILE    answers that the quantized model gave, to distil on; without it those to --answer-prompts, else to the prompts
#   --answer-prompts FILE  prompts for it to answer (data/recipes/make_prompts.py)
#   --out DIR         where the results go (out/results)
#   --table NAME      precision, qat, drafter or speed; may be repeated (all)
#   --device D        cpu, cuda or cuda:N (cpu)
#   --jobs N          steps beside each other, on one GPU too (1); what is timed runs alone
#   --budget SECONDS  begin nothing that would not end within them; what decides most is begun first (0: no limit)
#   --small           few steps and windows: does every table come out? Minutes on two cores
#   --threads N       CPU threads of a step (0: all)
#   --precision RULES what qat and drafter quantize (experts=mxfp4)
#   --taps L,L,...    tapped layers to compare; may be repeated
#   --draft-options O options of every drafter, as dflash-train takes them
#   --hardware TEXT   for the page
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"

model=$US_ROOT/data/models/pico/pico.h5 data='' questions='' out=$US_ROOT/out/results prompts=$US_ROOT/data/prompts small=''
count=200
PATH="${US_TOOLS:-$US_ROOT/build/tools}:$PATH"
ULTRASPEED_DATA=$US_ROOT/data
export PATH ULTRASPEED_DATA
# Options that the Python part knows are kept as they are; a copy of them goes into the page.
for argument in "$@"; do
  case $argument in
  --small) small=yes count=8 ;;
  -h | --help) sed -n '2,31s/^# \{0,1\}//p' "$0" && exit 0 ;;
  esac
done
n=$#
while [ "$n" -gt 0 ]; do
  option=$1 && shift && n=$((n - 1))
  case $option in
  --small) set -- "$@" "$option" ;;
  --model | --data | --questions | --out | --prompts)
    [ "$n" -gt 0 ] || { us_say "reproduce.sh: $option needs a value" && exit 2; }
    case $option in
    --model) model=$1 ;;
    --data) data=$1 ;;
    --questions) questions=$1 ;;
    --out) out=$1 ;;
    --prompts) prompts=$1 ;;
    esac
    shift && n=$((n - 1))
    ;;
  --*)
    [ "$n" -gt 0 ] || { us_say "reproduce.sh: $option needs a value; see --help" && exit 2; }
    set -- "$@" "$option" "$1"
    shift && n=$((n - 1))
    ;;
  *) us_say "reproduce.sh: unknown argument '$option'; see --help" && exit 2 ;;
  esac
done
mkdir -p "$out"
if [ -z "$data" ]; then
  data=$out/text.h5
  [ -f "$data" ] || us-data -q --text "$US_ROOT/data/sample/text" --prompts "$prompts" --template plain --heldout 0.2 --tokenizer "$model" \
    -o "$data" >/dev/null
fi
if [ -z "$questions" ]; then
  questions=$out/questions.jsonl
  if [ ! -f "$questions" ]; then
    python3 "$US_ROOT/data/sample/make_sample.py" --out "$out/sample" --seed 9
    head -n "$count" "$out/sample/math.jsonl" >"$questions.part"
    mv "$questions.part" "$questions"
    rm -r "$out/sample"
  fi
fi
if [ -n "$small" ]; then # three prompts of each set
  mkdir -p "$out/prompts"
  for set in "$prompts"/*.jsonl; do head -n 3 "$set" >"$out/prompts/$(basename "$set")"; done
  prompts=$out/prompts
fi
exec python3 "$US_ROOT/data/recipes/reproduce.py" --model "$model" --data "$data" --questions "$questions" --prompts "$prompts" --out "$out" "$@"
