#!/bin/sh
# One coordinator and five nodes on this machine, under mutual TLS, training the bundled example.
# One node is killed on the way and comes back. Ends with a report.
#
#   [PORT=7443] [ROUNDS=8] deploy/federation.sh [UMBEL] [FOLDER]
set -eu

umbel=${1:-umbel}
folder=${2:-$(mktemp -d)}
case $umbel in /*) ;; */*) umbel=$PWD/$umbel ;; esac
app=$(cd "$(dirname "$0")/../examples/fashion" && pwd)
port=${PORT:-7443}
rounds=${ROUNDS:-8}

mkdir -p "$folder"
cd "$folder"
echo "everything is in $folder"
trap 'kill $pids 2>/dev/null || true' EXIT
pids=

"$umbel" data fetch fashion-mnist

for i in 1 2 3 4 5; do
    "$umbel" nodes add "node-$i" --state coordinator --address "127.0.0.1:$port" >/dev/null
done
echo "five nodes are invited: node-1.join ... node-5.join"

start_node() {
    "$umbel" client "$app" --join "node-$1.join" --state "node-$1" --once --threads 1 \
        --node-config "partition-id=$(($1 - 1)) num-partitions=5" >>"node-$1.log" 2>&1 &
    eval "node_$1=$!"
    pids="$pids $!"
}

for i in 1 2 3 4 5; do start_node "$i"; done

"$umbel" server "$app" --state coordinator --listen "127.0.0.1:$port" \
    -c "rounds=$rounds cohort=all" &
server=$!
pids="$pids $server"

round() {
    "$umbel" status --state coordinator --json 2>/dev/null |
        sed -n 's/.*"round": \([0-9]*\).*/\1/p'
}

until [ "$(round || echo 0)" -ge 2 ] 2>/dev/null; do
    kill -0 $server 2>/dev/null || break
    sleep 0.5
done
if kill -0 $server 2>/dev/null; then
    echo "node-5 is killed (-9)"
    kill -9 "$node_5"
    wait "$node_5" 2>/dev/null || true
    start_node 5
    echo "node-5 is started again"
fi

status=0
wait $server || status=$?
if [ $status -ne 0 ]; then
    echo "the server has ended with status $status; the nodes' logs are $folder/node-*.log" >&2
    exit $status
fi
"$umbel" status --state coordinator
echo "the report is $(ls "$folder"/coordinator/runs/*/report.html)"
