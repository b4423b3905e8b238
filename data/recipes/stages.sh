# shellcheck shell=sh disable=SC2154,SC2034 # sourced: its variables are set and used by others
# stages.sh: the stages that nano.sh and mini.sh are made of; to be sourced after common.sh. Every stage is skipped when its file
# exists, and writes how long it took to stages.tsv.
#
# Set before: $shape $vocab $text $out $device (cpu, cuda, cuda:N), $gpus, $threads, $prompts (options --prompts ...), and the options
# of the tools: $pretrain_options $qat_options $draft_options; $sets, a folder of prompts; seconds: $answer_seconds $most_seconds (a stage's limit).
# Optional: $tokenizer, a vocabulary that is there already; $data, the shards for QAT, top64 and the drafter's text (text.h5).

# What is served: MXFP4 experts, FP8 elsewhere; router and norms stay as they are. Powers of two as FP8 scales: the GPU's embedding
# is bf16, which then holds the same values.
RECIPE_PRECISION='--precision all=fp8,experts=mxfp4 --fp8-scale ue8m0'

# recipe_option NAME VALUE: take an option that every recipe has; false for another.
recipe_option() {
  case $1 in
  --text) text=$(realpath "${2:?--text needs a folder}") || exit 2 ;;
  --math) math=$(realpath "${2:?--math needs a file}") || exit 2 ;;
  --agent) agent=$(realpath "${2:?--agent needs a file}") || exit 2 ;;
  --prompts)
    sets=$(realpath "${2:?--prompts needs a folder}") || exit 2
    prompts="$prompts --prompts $sets"
    ;;
  --out) out=${2:?--out needs a folder} ;;
  --device) device=${2:?--device needs a name} ;;
  --gpus) gpus=${2:?--gpus needs a number} ;;
  --shape) shape=${2:?--shape needs a name} ;;
  --vocab) vocab=${2:?--vocab needs a number} ;;
  --tokenizer) tokenizer=$(realpath "${2:?--tokenizer needs a file}") || exit 2 ;;
  --batch) batch=${2:?--batch needs a number} ;;
  --length) length=${2:?--length needs a number} ;;
  --scale) scale=${2:?--scale needs a number} ;;
  --answers) answer_count=${2:?--answers needs a number} ;;
  --threads) threads=${2:?--threads needs a number} ;;
  *) return 1 ;;
  esac
}

# recipe_begin SCRIPT: once the options are read: into $out, the tools within reach.
recipe_begin() {
  [ -n "$text" ] || { us_say "$1: --text is required; see --help" && exit 2; }
  PATH="${US_TOOLS:-$US_ROOT/build/tools}:$PATH"
  ULTRASPEED_DATA=$US_ROOT/data
  export PATH ULTRASPEED_DATA
  mkdir -p "$out"
  cd "$out" || exit 4
}

# stage NAME FILE COMMAND...: run COMMAND unless FILE exists; a program, unlike a function, within the time limit.
stage() {
  stage_name=$1 stage_file=$2
  shift 2
  if [ -e "$stage_file" ]; then
    us_say "== $stage_name: $stage_file is there"
    return 0
  fi
  us_say "== $stage_name"
  stage_start=$(date +%s)
  case $(command -v "$1") in
  /*) set -- timeout -k 5 "$most_seconds" "$@" ;;
  esac
  "$@" || {
    stage_status=$?
    us_say "$stage_name failed with status $stage_status"
    return $stage_status
  }
  [ -f stages.tsv ] || printf 'stage\tseconds\n' >stages.tsv
  printf '%s\t%s\n' "$stage_name" $(($(date +%s) - stage_start)) >>stages.tsv
}

# Options that say where to compute: on one GPU, on all.
on_one() {
  printf -- '--threads %s' "$threads"
  [ "$device" = cpu ] || printf -- ' --device %s' "$device"
}
on_device() {
  on_one
  [ "$gpus" = 1 ] || printf -- ' --gpus %s' "$gpus"
}

# token_shards FILE FOLDER...: shards of the text in these folders.
token_shards() {
  shards=$1 all='' && shift
  for folder in "$@"; do all="$all --text $folder"; done
  # shellcheck disable=SC2086
  stage "token shards, $shards" "$shards" us-data $all $prompts --template plain --threads "$threads" --tokenizer tokenizer.json --heldout 0.01 -o "$shards"
}

recipe_text() {
  # shellcheck disable=SC2086 # lists of options
  stage "derived text" derived python3 "$US_ROOT/data/recipes/derive_text.py" --text "$text" --out derived ${math:+--math "$math"} \
    ${agent:+--agent "$agent"} --scale "$scale"
  # shellcheck disable=SC2086
  if [ -n "${tokenizer:-}" ]; then
    cp "$tokenizer" tokenizer.json
  else
    stage vocabulary tokenizer.json us-data --text "$text" --text derived --template plain --threads "$threads" $prompts --train-vocab "$vocab" -o tokenizer.json
  fi
  token_shards "${data:-text.h5}" "$text" derived
}

# pretrain NAME OUTPUT OPTION...: a stretch of pretraining, with a log of that name.
pretrain() {
  pretrain_name=$1 pretrain_output=$2 && shift 2
  # shellcheck disable=SC2046,SC2086
  stage "pretraining, $pretrain_name" "$pretrain_output" us-pretrain "$shape" --tokenizer tokenizer.json -o "$pretrain_output" --log "$pretrain_name.tsv" \
    --run "$pretrain_name.h5" --plot "$pretrain_name.png" "$@" $(on_device)
}

recipe_pretrain() {
  # shellcheck disable=SC2086
  pretrain pretrain "$shape.h5" --data text.h5 $pretrain_options
}

recipe_qat() {
  # shellcheck disable=SC2046,SC2086
  stage "quantization-aware finetuning" q.h5 qat-quant "$shape.h5" --data "${data:-text.h5}" -o q.h5 $RECIPE_PRECISION \
    --metrics quality.tsv --report tensors.tsv --log qat.tsv --run qat.h5 --plot qat.png $qat_options $(on_device)
}

# Prompts like those of the scenarios, out of the text.
recipe_prompts() {
  # shellcheck disable=SC2086
  stage "prompts to answer" answer-prompts.jsonl python3 "$US_ROOT/data/recipes/make_prompts.py" --text derived --text "$text" \
    --count "$answer_count" $prompts --out answer-prompts.jsonl
}

# The quantized model answers them, as many as the time allows, as it does where it is measured: greedy, 256 tokens whatever it says. The
# drafter learns these answers and some text.
recipe_draft() {
  recipe_prompts
  # shellcheck disable=SC2046,SC2086
  stage "answers and drafter" draft.h5 dflash-train --target q.h5 --data "${data:-text.h5}" --generate "$answer_count" --prompts answer-prompts.jsonl \
    --max-tokens 256 --temperature 0 --ignore-end --answer-seconds "$answer_seconds" -o draft.h5 --log draft.tsv --run draft-run.h5 --plot draft.png \
    $draft_options $(on_device)
}

# generate RUN OPTION...: answer every prompt set: questions and chats as user turns, code and dialogues as they stand; 256 tokens
# each whatever the model says, cut where it loops.
generate() {
  run=$1 && shift
  # shellcheck disable=SC2046
  set -- --model q.h5 --plain-turns --cut-loops --ignore-end --max-tokens 256 $(on_device) "$@"
  raw='' turns=''
  for set in $prompt_sets; do
    case $set in
    */math.jsonl | */chat.jsonl) turns="$turns $set" ;;
    *) raw="$raw $set" ;;
    esac
  done
  # shellcheck disable=SC2086
  { [ -z "$raw" ] || us-serve "$@" $raw; } >"$run.part" && { [ -z "$turns" ] || us-serve "$@" --chat $turns; } >>"$run.part" &&
    mv "$run.part" "$run"
}

# Speed, and that both give the same tokens, on this project's prompts; acceptance on the sets of --prompts too, if there are any.
recipe_tables() {
  prompt_sets=$(ls "$US_ROOT"/data/prompts/*.jsonl)
  stage "answers, plain" plain.jsonl generate plain.jsonl
  stage "answers, with the drafter" speculative.jsonl generate speculative.jsonl --draft draft.h5
  python3 "$US_ROOT/data/recipes/same_tokens.py" plain.jsonl speculative.jsonl || us_say "plain and speculative tokens differ"
  us-eval plain.jsonl >plain.tsv
  us-eval speculative.jsonl >speculative.tsv
  prompt_sets=$(ls "$sets"/*.jsonl)
  stage "acceptance, greedy" greedy.jsonl generate greedy.jsonl --draft draft.h5
  us-eval greedy.jsonl --plot acceptance.png >greedy.tsv
  prompt_sets=$(ls "$US_ROOT"/data/prompts/*.jsonl)
  stage "acceptance, drawn at temperature 1" sampled.jsonl generate sampled.jsonl --draft draft.h5 --temperature 1
  us-eval sampled.jsonl >sampled.tsv
}

# The pieces of a model that is bundled, beside tables and pictures: quantized model in shards of at most 16 MiB, drafter, and what the original thinks of 8 K
# held-out tokens.
recipe_pack() {
  mkdir -p bundle
  # shellcheck disable=SC2086
  stage "bundle" bundle/model qat-quant q.h5 $RECIPE_PRECISION --shard 16M -o bundle/model
  # shellcheck disable=SC2046
  stage "the original's likeliest tokens" bundle/top64.h5 us-eval --model "$shape.h5" --data "${data:-text.h5}" --windows 16 --length 513 \
    --write-top bundle/top64.h5 $(on_one)
  cp draft.h5 bundle/
}
