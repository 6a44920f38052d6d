#!/bin/sh
# kill_after.sh TEXT LOG COMMAND...: runs COMMAND until it has said TEXT, then kills it; ends as it did, with 137.
text=$1 log=$2
shift 2
: > "$log"
"$@" > "$log" 2>&1 &
process=$!
until grep -q "$text" "$log"; do
  kill -0 $process 2> /dev/null || break
  sleep 0.02
done
kill -9 $process 2> /dev/null
wait $process
