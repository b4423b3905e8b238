#!/bin/sh
# quickstart.sh: the main job on the bundled model, from a fresh clone. Usage: data/recipes/quickstart.sh [options]
#
# Installs what the build needs, builds, then: quantizes pico's experts to MXFP4 with quantization-aware finetuning, adapts
# the block drafter to the quantized model, generates for every scenario with and without the drafter, profiles the tile
# program, and prints a table. About five minutes after the build on two cores.
#
#   --text DIR      text to learn from (data/sample/text)
#   --prompts DIR   prompt sets to generate for (data/prompts)
#   --out DIR       where the results go (out/quickstart)
#   --threads N     CPU threads (0: all)
#   --no-install    do not install packages
#   --no-build      use the tools in build/ as they are
#   --cuda WHAT     auto, enabled or disabled: whether device code is compiled too (auto: if nvcc is there)
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"

text=$US_ROOT/data/sample/text prompts=$US_ROOT/data/prompts out=$US_ROOT/out/quickstart
threads=0 install=yes build=yes cuda=auto
while [ $# -gt 0 ]; do
  case $1 in
  --text) text=${2:?--text needs a folder} && shift ;;
  --prompts) prompts=${2:?--prompts needs a folder} && shift ;;
  --out) out=${2:?--out needs a folder} && shift ;;
  --threads) threads=${2:?--threads needs a number} && shift ;;
  --no-install) install=no ;;
  --no-build) build=no ;;
  --cuda) cuda=${2:?--cuda needs auto, enabled or disabled} && shift ;;
  -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) us_say "quickstart.sh: unknown option '$1'; see --help" && exit 2 ;;
  esac
  shift
done
case $cuda in
auto | enabled | disabled) ;;
*) us_say "quickstart.sh: --cuda: '$cuda' is none of auto, enabled, disabled" && exit 2 ;;
esac

if [ "$install" = yes ]; then
  # shellcheck disable=SC2086 # a list of words
  us_install_packages $US_BUILD_PACKAGES
fi
if [ "$build" = yes ]; then
  if [ "$cuda" != disabled ] && us_find_nvcc; then
    us_say "nvcc is here: device code is compiled too, for many minutes; '--cuda disabled' leaves it out"
  fi
  us_build "$US_ROOT/build" "-Dcuda=$cuda" -Dtests=false
fi
PATH="$US_ROOT/build/tools:$PATH"
ULTRASPEED_DATA=$US_ROOT/data
export PATH ULTRASPEED_DATA
mkdir -p "$out"
model=$US_ROOT/data/models/pico/pico.h5 draft=$US_ROOT/data/models/pico/draft.h5
started=$(date +%s)

us_say "== 1. text to tokens, without what overlaps with the prompts"
us-data --text "$text" --prompts "$prompts" --template plain --heldout 0.1 --tokenizer "$model" -o "$out/text.h5" >"$out/text.record"

us_say "== 2. MXFP4 experts: quantize, and finetune through the rounding"
qat-quant "$model" -o "$out/q.h5" --precision experts=mxfp4 --data - --steps 120 --gptq 256 --routers 0.3 \
  --lr 0.00015 --schedule linear --floor 0 --threads "$threads" \
  --report "$out/tensors.tsv" --metrics "$out/quality.tsv" --plot "$out/qat.png" <"$out/text.record" >"$out/q.record"

us_say "== 3. the drafter: adapt it to the quantized model, on text that this model writes"
dflash-train --target - --init "$draft" --data "$out/text.h5" --generate 300 --temperature 0 --steps 60 --batch 8 --length 320 \
  --anchors 48 --lr 0.0007 --threads "$threads" --plot "$out/draft.png" -o "$out/d.h5" <"$out/q.record" >"$out/d.record"

us_say "== 4. generate for every scenario: plain, then with the drafter"
# 256 tokens a prompt whatever the model says (--ignore-end), cut where it loops. Questions and chats are user turns; code
# and dialogues are continued as they stand.
answer() { # answer raw|turns OPTION...: what us-serve gives to the sets of a kind
  kind=$1 && shift
  options=$#
  for file in "$prompts"/*.jsonl; do
    case $file in
    */math.jsonl | */chat.jsonl) of=turns ;;
    *) of=raw ;;
    esac
    [ "$of" != "$kind" ] || set -- "$@" "$file"
  done
  [ $# -eq "$options" ] || us-serve "$@"
}
generate() { # generate RUN.jsonl OPTION...
  run=$1 && shift
  set -- --model "$out/q.h5" --plain-turns --cut-loops --ignore-end --max-tokens 256 --threads "$threads" "$@"
  answer raw "$@" >"$run.part"
  answer turns --chat "$@" >>"$run.part"
  mv "$run.part" "$run"
}
generate "$out/plain.jsonl"
generate "$out/speculative.jsonl" --draft "$out/d.h5"
python3 "$US_ROOT/data/recipes/same_tokens.py" "$out/plain.jsonl" "$out/speculative.jsonl"
us-eval "$out/plain.jsonl" >"$out/plain.tsv"
us-eval "$out/speculative.jsonl" --plot "$out/acceptance.png" >"$out/speculative.tsv"

us_say "== 5. where the time goes"
tile-profile --model "$out/q.h5" --draft "$out/d.h5" --threads "$threads" --window 3 --plot "$out/timeline.png" \
  --perfetto "$out/timeline.json" -o "$out/trace.h5" >"$out/profile.tsv"

us_say "== done in $(($(date +%s) - started)) s after the build"
python3 "$US_ROOT/data/recipes/quickstart_table.py" "$out"
