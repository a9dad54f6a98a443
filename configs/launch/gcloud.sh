#!/bin/sh
# Creates a TPU slice and trains on all of its hosts:   configs/launch/gcloud.sh [--dry-run]
#
# Called again, it goes on with the run: on the slice that is there, or on a new one where that was taken away.
# The training hangs on this terminal: call it from tmux. A --dry-run prints the commands, to be pasted one by one.
set -eu

: "${NAME:=qmax}" "${ZONE:=us-east5-a}"
: "${TYPE:=v5p-32}" "${IMAGE:=v2-alpha-tpuv5}"          # 4 hosts of 4 chips; the README names other images
: "${REPOSITORY:=https://github.com/OWNER/qmax}"        # where the hosts clone from
: "${SHARE:=10.0.0.2:/runs}"                            # an NFS share (Filestore) for all hosts, with the corpus
: "${TRAIN:=configs/qwen3_30b_a3b.py --data.sources /runs/corpus --data.tokenizer /runs/tokenizer}"

case ${1:-} in
--dry-run) do_it() { printf '%s' "$1" && shift && printf " '%s'" "$@" && echo; } ;;
'') do_it() { "$@"; } ;;
*) echo "usage: gcloud.sh [--dry-run]" >&2 && exit 2 ;;
esac

on_all() { do_it gcloud compute tpus tpu-vm ssh "$NAME" "--zone=$ZONE" --worker=all "--command=$1"; }

if [ "${1:-}" = --dry-run ] || ! gcloud compute tpus tpu-vm describe "$NAME" "--zone=$ZONE" >/dev/null 2>&1; then
    do_it gcloud compute tpus tpu-vm create "$NAME" "--zone=$ZONE" "--accelerator-type=$TYPE" "--version=$IMAGE" --spot
fi
on_all "sudo apt-get update && sudo apt-get install -y nfs-common python3.11-venv && sudo mkdir -p /runs && { mountpoint -q /runs || sudo mount $SHARE /runs; } && { [ -d qmax ] || git clone $REPOSITORY qmax; } && cd qmax && ./run.sh doctor"
# Cloud TPU's metadata tell each host who it is; --resume with nothing to resume starts afresh.
on_all "cd qmax && ./run.sh train $TRAIN --out /runs/a --resume"
