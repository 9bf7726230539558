#!/bin/sh
# HAProxy as Ray Serve starts it in a pod: with what `serve.haproxy` changes in the configuration that Ray wrote.
set -eu
folder=/tmp/ovt-haproxy
[ -x "$folder/haproxy.sh" ] || python -m serve.environment "$folder"
exec "$folder/haproxy.sh" "$@"
