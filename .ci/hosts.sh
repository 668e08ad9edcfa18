#!/usr/bin/env bash
# What the multi-host test needs beside Python: sshd, rsync, iproute2. Installs them where it may; where not, it
# says so, and the test is skipped with the reason.
set -euo pipefail

missing=()
for pair in sshd:openssh-server ssh:openssh-client rsync:rsync ip:iproute2 unshare:util-linux tmux:tmux screen:screen pgrep:procps; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[ "${#missing[@]}" -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "hosts.sh: not installed: ${missing[*]}; the multi-host test will be skipped" >&2
  exit 0
fi

# The hosts of the test run sshd; this machine itself gets no new service.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "${missing[@]}"; } >/dev/null; then
  echo "hosts.sh: cannot install ${missing[*]}; the multi-host test will be skipped" >&2
fi
