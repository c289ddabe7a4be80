// Command kube is every program of a one-node Kubernetes cluster in one file.
//
// A machine without a container engine cannot pull the usual images, and
// distributions do not package these programs, but all of them are Go modules.
// Linking them together costs a third of the time and space of building them
// one by one. Which of them to be is told by the name it is called by (so that
// symbolic links work: kubectl -> kube) or, called as kube, by its first
// argument.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	_ "time/tzdata" // CronJob time zones

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	"github.com/spf13/cobra"

	// The CoreDNS plugins that the node's Corefile uses.
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"

	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// The programs that run until they are told to stop.
var servers = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-proxy":              proxy.NewProxyCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
}

func runKubectl() {
	logs.GlogSetter(kubectl.GetLogVerbosity(os.Args)) //nolint:errcheck
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
}

func runCoreDNS() {
	// The server refuses to start when its list names a plugin that is not
	// linked in, so the list is cut down to what is, in the original order.
	dnsserver.Directives = []string{"ready", "health", "errors", "cache", "template", "kubernetes"}
	coremain.Run()
}

func main() {
	name := filepath.Base(os.Args[0])
	if name == "kube" && len(os.Args) > 1 {
		name = os.Args[1]
		os.Args = append([]string{name}, os.Args[2:]...)
	}
	switch name {
	case "kubectl":
		runKubectl()
	case "coredns":
		runCoreDNS()
	case "kubelet":
		os.Exit(cli.Run(kubelet.NewKubeletCommand(context.Background())))
	default:
		newCommand, known := servers[name]
		if !known {
			fmt.Fprintf(os.Stderr, "kube: cannot be %q; it can be coredns, kube-apiserver, kube-controller-manager, kube-proxy, kube-scheduler, kubectl or kubelet\n", name)
			os.Exit(2)
		}
		os.Exit(cli.Run(newCommand()))
	}
}
