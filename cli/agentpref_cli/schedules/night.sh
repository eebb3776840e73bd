
# Every night adds to the log; what a person must look at is printed too, and cron mails it.
(umask 077 && mkdir -p "${log%/*}" && date '+== %Y-%m-%d %H:%M:%S %Z' >>"$log") || exit 1
if [ "$1" != --now ]; then
    sleep "$(awk -v most="$delay" -v seed="$$" 'BEGIN { srand(seed + srand()); print int(rand() * most) }')"
fi
(run) >>"$log" 2>&1 &
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
    126 | 127) said='the command cannot be run' ;;
    137) said='killed, perhaps because memory ran out' ;;
    130 | 143) said='ended by a signal; the next update resumes it' ;;
    *) said='failed' ;;
esac
said="agentpref update: exit code $code: $said"
echo "$said" >>"$log"
case $code in
    GOOD) ;;
    *)
        echo "$said"
        awk '/^== / { night = "" } { night = night $0 "\n" } END { printf "%s", night }' "$log" | tail -n 40
        exit "$code"
        ;;
esac
