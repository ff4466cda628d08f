// Interop is the other side of every protocol the mesh speaks, built on Istio's own packages: an xDS server and
// client, a certificate authority and its client, a node agent and its proxy, and both ends of an HBONE tunnel.
// The tests of culvert run it as a process and read the JSON lines it prints, one event a line.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sort"
	"syscall"

	istiolog "istio.io/istio/pkg/log"
)

type command struct {
	summary string
	run     func(ctx context.Context, args []string) error
}

var commands = map[string]command{
	"golden":       {"write the golden messages and their index", runGolden},
	"check-golden": {"compare messages another encoder wrote with the golden ones", runCheckGolden},
	"init-ca":      {"make a test root and a server certificate signed by it", runInitCA},
	"issue":        {"sign a workload certificate with the test root", runIssue},
	"serve-xds":    {"serve delta xDS (and, with a root, certificates) from a manifest", runServeXDS},
	"serve-ca":     {"serve the certificate API", runServeCA},
	"serve-zds":    {"play the node agent for a proxy", runServeZDS},
	"zds-client":   {"play the proxy for a node agent", runZDSClient},
	"xds-client":   {"subscribe to a controller and print what it sends", runXDSClient},
	"ca-client":    {"ask a certificate authority for one identity", runCAClient},
	"hbone-dial":   {"tunnel a payload through an HBONE server", runHBONEDial},
	"hbone-serve":  {"serve HBONE and forward what arrives", runHBONEServe},
	"dial":         {"send a payload over plain TCP, as an unmodified program does", runDial},
	"echo":         {"serve TCP echo", runEcho},
}

func main() {
	args := os.Args[1:]
	if len(args) > 1 && args[0] == "--netns" {
		fail(enterNamespace(args[1], args[2:]))
	}
	if len(args) == 0 {
		usage(os.Stderr)
		os.Exit(2)
	}
	selected, known := commands[args[0]]
	if !known {
		fmt.Fprintf(os.Stderr, "interop: no command %q\n", args[0])
		usage(os.Stderr)
		os.Exit(2)
	}
	// Standard output carries events only.
	options := istiolog.DefaultOptions()
	options.OutputPaths = []string{"stderr"}
	options.SetDefaultOutputLevel(istiolog.DefaultScopeName, istiolog.WarnLevel)
	for _, scope := range istiolog.Scopes() {
		options.SetDefaultOutputLevel(scope.Name(), istiolog.WarnLevel)
	}
	fail(istiolog.Configure(options))

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := selected.run(ctx, args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		emit("error", fields{"command": args[0], "message": err.Error()})
		os.Exit(1)
	}
}

func usage(out io.Writer) {
	fmt.Fprintln(out, "usage: interop [--netns PATH] COMMAND [flags]")
	names := make([]string, 0, len(commands))
	for name := range commands {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Fprintf(out, "  %-13s %s\n", name, commands[name].summary)
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "interop:", err)
		os.Exit(1)
	}
}

// required reports the first of the named flags that was left empty.
func required(set *flag.FlagSet, names ...string) error {
	for _, name := range names {
		if set.Lookup(name).Value.String() == "" {
			return fmt.Errorf("--%s is required", name)
		}
	}
	return nil
}
