# shellcheck shell=sh disable=SC2154,SC2034 # sourced: its variables are set and used by others
# stages.sh: the stages that nano.sh and mini.sh are made of; to be sourced after common.sh. Every stage is skipped when its file
# exists, and writes how long it took to stages.tsv.
#
# Set before: $shape $vocab $text $out $device (cpu, cuda, cuda:N), $gpus, $threads, $prompts (options --prompts ...), and the options
# of the tools: $pretrain_options $qat_options $draft_options; $sets, a folder of prompts; $minutes of what trains and answers; $most_seconds, a
# stage's limit, and $answer_seconds; $site and $most, a folder of packages and megabytes of each; $prompt_most, characters of a prompt.
# Optional: $tokenizer, a vocabulary that is there already; $data, the shards for QAT, top64 and the drafter's text (text.h5).

# What is served: MXFP4 experts, FP8 elsewhere; router and norms stay as they are. Powers of two as FP8 scales: the GPU's embedding
# is bf16, which then holds the same values.
RECIPE_PRECISION='--precision all=fp8,experts=mxfp4 --fp8-scale ue8m0'

# recipe_option NAME VALUE: take an option that every recipe has; false for another.
recipe_option() {
  case $1 in
  --text) text=$(realpath "${2:?--text needs a folder}") || exit 2 ;;
  --site) site=$(realpath "${2:?--site needs a folder}") || exit 2 ;;
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
  us_one_word "$1" "$US_ROOT" "$text" "${sets:-}" || exit 2
  [ -n "$text" ] || { us_say "$1: --text is required; see --help" && exit 2; }
  PATH="${US_TOOLS:-$US_ROOT/build/tools}:$PATH"
  ULTRASPEED_DATA=$US_ROOT/data
  export PATH ULTRASPEED_DATA
  mkdir -p "$out"
  cd "$out" || exit 4
}

# part SHARE: so many of the minutes; seconds SHARE: the same in whole seconds.
part() { awk -v m="$minutes" -v s="$1" 'BEGIN { printf "%.3f", m * s }'; }
seconds() { awk -v m="$minutes" -v s="$1" 'BEGIN { printf "%d", 60 * m * s + 1 }'; }

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

# Options that say where to compute: on one GPU (the first, or the first but so many), on all.
on_one() {
  printf -- '--threads %s' "$threads"
  case $device in
  cpu) ;;
  cuda) printf -- ' --device cuda:%s' "${1:-0}" ;;
  *) printf -- ' --device cuda:%s' $((${device#cuda:} + ${1:-0})) ;;
  esac
}
on_device() {
  on_one
  [ "$gpus" = 1 ] || [ "$device" = cpu ] || printf -- ' --gpus %s' "$gpus"
}

# token_shards FILE FOLDER...: shards of the text in these folders.
token_shards() {
  shards=$1 all='' && shift
  for folder in "$@"; do all="$all --text $folder"; done
  # shellcheck disable=SC2086
  stage "token shards, $shards" "$shards" us-data $all $prompts --template plain --threads "$threads" --tokenizer tokenizer.json --heldout 0.01 -o "$shards"
}

# recipe_code: sources of the packages of --site.
recipe_code() {
  [ -z "$site" ] || stage "code" site/card.tsv python3 "$US_ROOT/data/recipes/nano_text.py" --site "$site" --debian none --most "$most" --out site
}

recipe_derived() {
  stage "derived text" derived python3 "$US_ROOT/data/recipes/derive_text.py" --text "$text" --out derived ${math:+--math "$math"} \
    ${agent:+--agent "$agent"} --scale "$scale"
}

recipe_vocabulary() {
  # shellcheck disable=SC2086 # lists of options
  if [ -n "${tokenizer:-}" ]; then
    cp "$tokenizer" tokenizer.json
  else
    stage vocabulary tokenizer.json us-data --text "$text" --text derived --template plain --threads "$threads" $prompts --train-vocab "$vocab" -o tokenizer.json
  fi
}

# pretrain NAME OUTPUT OPTION...: a stretch of pretraining, with a log of that name.
pretrain() {
  pretrain_name=$1 pretrain_output=$2 && shift 2
  # shellcheck disable=SC2046,SC2086
  stage "pretraining, $pretrain_name" "$pretrain_output" us-pretrain "$shape" --tokenizer tokenizer.json -o "$pretrain_output" --log "$pretrain_name.tsv" \
    --run "$pretrain_name.h5" --plot "$pretrain_name.png" "$@" ${US_PRETRAIN_OPTIONS:-} $(on_device)
}

# quantize FILE SUFFIX OPTION...: finetune through the rounding into FILE, with metrics and logs of that suffix.
quantize() {
  quantized=$1 suffix=${2:+-$2} && shift 2
  # shellcheck disable=SC2086
  timeout -k 5 "$most_seconds" qat-quant "$shape.h5" --data "${data:-text.h5}" -o "$quantized" $RECIPE_PRECISION --metrics "quality$suffix.tsv" \
    --log "qat$suffix.tsv" --run "qat$suffix.h5" --plot "qat$suffix.png" "$@"
}

recipe_qat() {
  # shellcheck disable=SC2046,SC2086
  stage "quantization-aware finetuning" q.h5 quantize q.h5 '' $qat_options $(on_device)
}

# Prompts like those of the scenarios, out of the text.
recipe_prompts() {
  # shellcheck disable=SC2086
  stage "prompts to answer" answer-prompts.jsonl python3 "$US_ROOT/data/recipes/make_prompts.py" --text derived --text "$text" \
    --count "$answer_count" --most "$prompt_most" $prompts --out answer-prompts.jsonl
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

# generate RUN SETS OPTION...: answer these prompt sets: questions and chats as user turns, code and dialogues as they stand; 256 tokens
# each, cut where it loops.
generate() {
  run=$1 raw='' turns=''
  for set in $2; do
    case $set in
    */math.jsonl | */chat.jsonl) turns="$turns $set" ;;
    *) raw="$raw $set" ;;
    esac
  done
  shift 2
  set -- --model q.h5 --plain-turns --cut-loops --max-tokens 256 "$@"
  # shellcheck disable=SC2086
  { [ -z "$raw" ] || timeout -k 5 "$most_seconds" us-serve "$@" $raw; } >"$run.part" &&
    { [ -z "$turns" ] || timeout -k 5 "$most_seconds" us-serve "$@" --chat $turns; } >>"$run.part" && mv "$run.part" "$run"
}

# measured NAME RUN SETS OPTION...: answers and tables and pictures of them; what fails is said, and noted in the file failed.
measured() {
  measured_name=$1 measured_run=$2 && shift
  stage "$measured_name" "$measured_run" generate "$@" &&
    us-eval "$measured_run" --plot "${measured_run%.jsonl}.png" >"${measured_run%.jsonl}.tsv" || echo "$measured_name" >>failed
}

# Speed, and that both give the same tokens, on this project's prompts, whatever the model says: nothing else may use that GPU. Then the same
# prompts at temperature 1.
recipe_speeds() {
  own=$(ls "$US_ROOT"/data/prompts/*.jsonl)
  # shellcheck disable=SC2046
  measured "answers, plain" plain.jsonl "$own" --ignore-end $(on_one)
  # shellcheck disable=SC2046
  measured "answers, with the drafter" speculative.jsonl "$own" --ignore-end $(on_one) --draft draft.h5
  [ ! -f plain.jsonl ] || [ ! -f speculative.jsonl ] || python3 "$US_ROOT/data/recipes/same_tokens.py" plain.jsonl speculative.jsonl ||
    us_say "plain and speculative tokens differ"
  # shellcheck disable=SC2046
  measured "acceptance, drawn at temperature 1" sampled.jsonl "$own" --ignore-end $(on_one) --draft draft.h5 --temperature 1
}

# recipe_acceptance WHERE: on the sets of --prompts, if there are any; and how long the drafts are where an answer ends as the model ends it.
recipe_acceptance() {
  given=$(ls "$sets"/*.jsonl)
  # shellcheck disable=SC2046
  measured "acceptance, greedy" greedy.jsonl "$given" --ignore-end --draft draft.h5 $(on_one "$1")
  # shellcheck disable=SC2046
  measured "acceptance, greedy, up to the end" ended.jsonl "$given" --draft draft.h5 $(on_one "$1")
}

# Both beside each other where there are two GPUs.
recipe_tables() {
  rm -f failed
  if [ "$gpus" -gt 1 ] && [ "$device" != cpu ]; then
    recipe_acceptance 1 &
    recipe_speeds
    wait $!
  else
    recipe_speeds
    recipe_acceptance 0
  fi
  [ ! -e failed ]
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
