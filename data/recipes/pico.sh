#!/bin/sh
# pico.sh: train the bundled model and its drafter from text. Usage: data/recipes/pico.sh --text DIR [options]
#
# Vocabulary, token shards, pretraining, QAT, distillation. data/recipes/collect_text.py makes --text DIR; the sample text is
# added eight times over from another seed. Resumable: every stage is skipped when its file exists. About 20 minutes on 16
# cores.
#
#   --text DIR      text to learn from (required)
#   --prompts DIR   prompt sets that the text must not overlap; may be repeated (data/prompts is always left out)
#   --out DIR       where the results go (out/pico)
#   --threads N     CPU threads (0: all)
set -eu
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"

text='' out=$US_ROOT/out/pico threads=0 prompts="--prompts $US_ROOT/data/prompts"
while [ $# -gt 0 ]; do
  case $1 in
  --text) text=$(realpath "${2:?--text needs a folder}") && shift || exit 2 ;;
  --prompts)
    sets=$(realpath "${2:?--prompts needs a folder}") && us_one_word pico.sh "$sets" || exit 2
    prompts="$prompts --prompts $sets"
    shift
    ;;
  --out) out=${2:?--out needs a folder} && shift ;;
  --threads) threads=${2:?--threads needs a number} && shift ;;
  -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) us_say "pico.sh: unknown option '$1'; see --help" && exit 2 ;;
  esac
  shift
done
[ -n "$text" ] || { us_say "pico.sh: --text is required; see --help" && exit 2; }
us_one_word pico.sh "$US_ROOT" "$text" || exit 2
PATH="$US_ROOT/build/tools:$PATH"
ULTRASPEED_DATA=$US_ROOT/data
export PATH ULTRASPEED_DATA
mkdir -p "$out"
cd "$out"

if [ ! -d sample ]; then
  python3 "$US_ROOT/data/sample/make_sample.py" --out sample.part --scale 8 --seed 1
  mv sample.part sample
fi
all="--text $text --text sample --text $US_ROOT/data/sample/text --template plain"
# shellcheck disable=SC2086 # lists of options
[ -f tokenizer.json ] || us-data $all $prompts --train-vocab 4096 -o tokenizer.json
# shellcheck disable=SC2086
[ -f text.h5 ] || us-data $all $prompts --tokenizer tokenizer.json -o text.h5

us_say "== pretraining: 13.5 M tokens"
[ -f pico.h5 ] || us-pretrain pico --data text.h5 --tokenizer tokenizer.json -o pico.h5 --steps 823 -b 32 -l 512 --lr 0.003 \
  --log pico.tsv --log-every 50 --state pico.state --resume --plot pico.png --threads "$threads"

us_say "== MXFP4 experts"
[ -f q.h5 ] || qat-quant pico.h5 --data text.h5 -o q.h5 --steps 100 --metrics quality.tsv --eval-windows 128 \
  --threads "$threads"

us_say "== drafter: broad first, then on many answers of the model itself, last on what it finds hardest"
# shards NAME TEXT...: token shards of a part of the text
shards() {
  name=$1 && shift
  # shellcheck disable=SC2086
  [ -f "$name.h5" ] || us-data "$@" $prompts --template plain --tokenizer tokenizer.json -o "$name.h5"
}
shards hard --text "$text/code" --text "$text/agent" --text "$text/math/lines.jsonl" --text sample
shards code --text "$text/code" --text "$text/agent/lines.jsonl" --text sample/code.jsonl
distil="dflash-train --target q.h5 --steps 0 --log-every 50 --threads $threads"
[ -f draft1.h5 ] || $distil --data text.h5 -g 600 --temperature 0.3 --text-share 0.2 -b 4 --anchors 512 -l 512 --minutes 2.6 \
  --lr 0.002 --log draft1.tsv -o draft1.h5
[ -f draft2.h5 ] || $distil --init draft1.h5 --data text.h5 -g 5000 --temperature 0.2 --text-share 0.15 -b 4 --anchors 512 \
  -l 512 --minutes 6.5 --lr 0.003 --log draft2.tsv -o draft2.h5
[ -f draft3.h5 ] || $distil --init draft2.h5 --data hard.h5 -g 2500 --temperature 0.3 --text-share 0.25 -b 16 --anchors 96 \
  -l 512 --minutes 2 --lr 0.002 --log draft3.tsv -o draft3.h5
[ -f draft.h5 ] || $distil --init draft3.h5 --data code.h5 -g 2500 --temperature 0.1 --text-share 0.15 -b 16 --anchors 64 \
  -l 320 --minutes 1.5 --lr 0.003 --log draft.tsv -o draft.h5
us_say "pico.h5 and draft.h5 are in $out"
