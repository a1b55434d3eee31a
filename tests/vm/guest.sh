#!/bin/bash
# The guest's second program, in its final root: runs the command and tells the harness how it went.
# Marks in the command's own output say where it starts and ends, so neither can overtake what was printed.
. /run/vm/config

# Through a pipe: the channel can be opened only once, but the command may want to open /dev/stdout anew.
exec 3> >(exec cat > "$channel") || exit

mark() {
	printf '\0%s %s\n' "$token" "$*" >&3
}

# Shortly before the harness loses patience: who is waiting for what?
watchdog() {
	local task line rest words
	sleep "$patience"
	exec > /dev/ttyS0
	printf '\n%s\n' "$watchdog_mark"
	for task in /proc/[0-9]*/task/[0-9]*; do
		{ read -r line < "$task/stat"; } 2> /dev/null || continue
		rest=${line##*) }
		words=
		read -r -d '' words < "$task/cmdline"
		[[ -n $words || $rest == D* ]] || continue
		printf 'task %s: state %s, waits in %s\n' "${line%)*})" "${rest%% *}" "$(< "$task/wchan")"
		[[ $rest != D* ]] || cat "$task/stack"
	done
	echo w > /proc/sysrq-trigger
}

watchdog 3>&- &
cd "$folder" || exit
mark started
bash -c "$command" < /dev/null >&3 2>&1 3>&-
status=$?
# the harness pulls the plug at the next mark
[[ $root != direct ]] || sync -f /
[[ -z $out ]] || sync -f "$out"
# in the order of the kernel log: nothing that it has to say is still to come
echo "$over_mark" > /dev/kmsg
mark "exited $status"
sleep infinity
