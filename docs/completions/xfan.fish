# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_xfan_global_optspecs
    string join \n h/help V/version
end

function __fish_xfan_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_xfan_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_xfan_using_subcommand
    set -l cmd (__fish_xfan_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c xfan -n "__fish_xfan_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_needs_command" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "run" -d 'Dispatch an interface\'s packets to workers, until SIGINT or SIGTERM'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "check" -d 'Validate the settings that `run` would use, and print them'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "topology" -d 'Show which lane and worker would run on which CPU, and why'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "stats" -d 'Show the counters of a running primary'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "events" -d 'Show what happened to the workers of a running primary, and when'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "workers" -d 'List, add, drain, restart or remove the workers of a running primary'
complete -c xfan -n "__fish_xfan_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xfan -n "__fish_xfan_using_subcommand run" -s i -l interface -d 'The interface whose packets xfan dispatches [required here or in the file]' -r
complete -c xfan -n "__fish_xfan_using_subcommand run" -l queues -d 'The RX queues that get a lane [default: all]' -r -f -a "all\t''"
complete -c xfan -n "__fish_xfan_using_subcommand run" -l pass -d 'Packets that go to the kernel stack instead of the workers, as a list of rules [default: none]' -r
complete -c xfan -n "__fish_xfan_using_subcommand run" -l socket -d 'The control socket, through which workers attach and operators ask [default: /run/xfan/IFACE.sock]' -r
complete -c xfan -n "__fish_xfan_using_subcommand run" -l cores -d 'The CPUs that lanes and workers run on: the first ones for lanes, the next ones for workers [default: the nearest to the interface]' -r
complete -c xfan -n "__fish_xfan_using_subcommand run" -s n -l workers -d 'The number of workers to start [default: 1]' -r
complete -c xfan -n "__fish_xfan_using_subcommand run" -l user -d 'The user that the workers run as [default: the user who called sudo, else nobody]' -r
complete -c xfan -n "__fish_xfan_using_subcommand run" -l log-level -l log -d 'The least important messages that are logged [default: info]' -r -f -a "error\t''
warn\t''
info\t''
debug\t''
trace\t''"
complete -c xfan -n "__fish_xfan_using_subcommand run" -s c -l config -d 'The TOML file with these and more settings; flags win over it' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand run" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand check" -s i -l interface -d 'The interface whose packets xfan dispatches [required here or in the file]' -r
complete -c xfan -n "__fish_xfan_using_subcommand check" -l queues -d 'The RX queues that get a lane [default: all]' -r -f -a "all\t''"
complete -c xfan -n "__fish_xfan_using_subcommand check" -l pass -d 'Packets that go to the kernel stack instead of the workers, as a list of rules [default: none]' -r
complete -c xfan -n "__fish_xfan_using_subcommand check" -l socket -d 'The control socket, through which workers attach and operators ask [default: /run/xfan/IFACE.sock]' -r
complete -c xfan -n "__fish_xfan_using_subcommand check" -l cores -d 'The CPUs that lanes and workers run on: the first ones for lanes, the next ones for workers [default: the nearest to the interface]' -r
complete -c xfan -n "__fish_xfan_using_subcommand check" -s n -l workers -d 'The number of workers to start [default: 1]' -r
complete -c xfan -n "__fish_xfan_using_subcommand check" -l user -d 'The user that the workers run as [default: the user who called sudo, else nobody]' -r
complete -c xfan -n "__fish_xfan_using_subcommand check" -l log-level -l log -d 'The least important messages that are logged [default: info]' -r -f -a "error\t''
warn\t''
info\t''
debug\t''
trace\t''"
complete -c xfan -n "__fish_xfan_using_subcommand check" -s c -l config -d 'The TOML file with these and more settings; flags win over it' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand check" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand check" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand topology" -s i -l interface -d 'The interface whose packets xfan dispatches [required here or in the file]' -r
complete -c xfan -n "__fish_xfan_using_subcommand topology" -l queues -d 'The RX queues that get a lane [default: all]' -r -f -a "all\t''"
complete -c xfan -n "__fish_xfan_using_subcommand topology" -l cores -d 'The CPUs that lanes and workers run on: the first ones for lanes, the next ones for workers [default: the nearest to the interface]' -r
complete -c xfan -n "__fish_xfan_using_subcommand topology" -s n -l workers -d 'The number of workers to start [default: 1]' -r
complete -c xfan -n "__fish_xfan_using_subcommand topology" -s c -l config -d 'The TOML file with these and more settings; flags win over it' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand topology" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand topology" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand stats" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand stats" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand stats" -l watch -d 'Print again every SECONDS, 1 to 3600 [default: 1]' -r
complete -c xfan -n "__fish_xfan_using_subcommand stats" -l json -d 'Print JSON: one object, or one per line with --watch'
complete -c xfan -n "__fish_xfan_using_subcommand stats" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand stats" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand events" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand events" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand events" -l follow -d 'Continue with new events until the primary ends'
complete -c xfan -n "__fish_xfan_using_subcommand events" -l json -d 'Print JSON, one object per line'
complete -c xfan -n "__fish_xfan_using_subcommand events" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand events" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -f -a "list" -d 'List the workers'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -f -a "add" -d 'Start more workers'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -f -a "drain" -d 'Let a worker finish its packets, and stop it'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -f -a "restart" -d 'Drain a worker, and start it again'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -f -a "remove" -d 'Drain a worker, and free its member'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and not __fish_seen_subcommand_from list add drain restart remove help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from list" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from list" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from list" -l json -d 'Print JSON: an array of members, as in `xfan stats --json`'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from list" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from add" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from add" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from add" -l no-wait -d 'Do not wait until it is done'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from add" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from add" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from drain" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from drain" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from drain" -l no-wait -d 'Do not wait until it is done'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from drain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from drain" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from restart" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from restart" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from restart" -l no-wait -d 'Do not wait until it is done'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from restart" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from restart" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from remove" -s i -l interface -d 'The interface of the primary' -r
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from remove" -l socket -d 'The control socket of the primary [default: /run/xfan/IFACE.sock]' -r -F
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from remove" -l no-wait -d 'Do not wait until it is done'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from remove" -s V -l version -d 'Print version'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from help" -f -a "list" -d 'List the workers'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from help" -f -a "add" -d 'Start more workers'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from help" -f -a "drain" -d 'Let a worker finish its packets, and stop it'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from help" -f -a "restart" -d 'Drain a worker, and start it again'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from help" -f -a "remove" -d 'Drain a worker, and free its member'
complete -c xfan -n "__fish_xfan_using_subcommand workers; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "run" -d 'Dispatch an interface\'s packets to workers, until SIGINT or SIGTERM'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "check" -d 'Validate the settings that `run` would use, and print them'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "topology" -d 'Show which lane and worker would run on which CPU, and why'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "stats" -d 'Show the counters of a running primary'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "events" -d 'Show what happened to the workers of a running primary, and when'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "workers" -d 'List, add, drain, restart or remove the workers of a running primary'
complete -c xfan -n "__fish_xfan_using_subcommand help; and not __fish_seen_subcommand_from run check topology stats events workers help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xfan -n "__fish_xfan_using_subcommand help; and __fish_seen_subcommand_from workers" -f -a "list" -d 'List the workers'
complete -c xfan -n "__fish_xfan_using_subcommand help; and __fish_seen_subcommand_from workers" -f -a "add" -d 'Start more workers'
complete -c xfan -n "__fish_xfan_using_subcommand help; and __fish_seen_subcommand_from workers" -f -a "drain" -d 'Let a worker finish its packets, and stop it'
complete -c xfan -n "__fish_xfan_using_subcommand help; and __fish_seen_subcommand_from workers" -f -a "restart" -d 'Drain a worker, and start it again'
complete -c xfan -n "__fish_xfan_using_subcommand help; and __fish_seen_subcommand_from workers" -f -a "remove" -d 'Drain a worker, and free its member'
