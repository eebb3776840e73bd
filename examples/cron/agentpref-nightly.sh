#!/bin/sh
# One update for cron, which mails what a job prints. After a night that went well it prints nothing.
# Every night adds to the log; anything that a person must look at is printed too.

agentpref=/srv/shop/.venv/bin/agentpref # absolute, because cron's PATH is /usr/bin:/bin
home=/srv/shop/.agentpref
model=/srv/models/qwen2.5-0.5b-instruct
log=/srv/shop/agentpref-update.log

date '+== %Y-%m-%d %H:%M:%S' >>"$log" || exit 1 # a log that cannot be written is mailed, too
"$agentpref" update --home "$home" --model "$model" --max-minutes 120 >>"$log" 2>&1 &
update=$!
trap 'kill -TERM "$update" 2>/dev/null' HUP INT TERM # who stops this job stops the update, too
wait "$update"
code=$?
while kill -0 "$update" 2>/dev/null; do # a signal ended the wait; the update ends its step
    wait "$update"
    code=$?
done
case $code in
    0) said='a candidate passed every check' ;;
    3) said='nothing new, or nothing to gain' ;;
    4) said='refused: a check failed, the old revision serves' ;;
    5) said='too little evidence, the old revision serves' ;;
    6) said='none of the new feedback can be trained' ;;
    7) said='cut short by the time limit' ;;
    2) said='bad usage: an option or a setting is wrong' ;;
    75) said='busy: another update or a removal was running' ;;
    126 | 127) said="$agentpref cannot be run" ;;
    137) said='killed, perhaps because memory ran out' ;;
    130 | 143) said='ended by a signal; the next update resumes it' ;;
    *) said='failed' ;;
esac
said="agentpref update: exit code $code: $said"
echo "$said" >>"$log"
case $code in
    0 | 3 | 4 | 5 | 7) ;;
    *)
        echo "$said"
        awk '/^== / { night = "" } { night = night $0 "\n" } END { printf "%s", night }' "$log" | tail -n 40
        exit "$code"
        ;;
esac
