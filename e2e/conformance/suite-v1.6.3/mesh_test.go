// Package suite runs the mesh part of the Gateway API conformance suite against a cluster in which culvert is installed.
package suite

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
	"sigs.k8s.io/yaml"
)

// The namespace of the suite in which routes are attached to Services.
const namespace = "gateway-conformance-mesh"

// How long a waypoint may take to be there.
const patience = 2 * time.Minute

// Every mesh feature, and those of routes that a mesh test needs, with nothing skipped.
func TestMesh(t *testing.T) {
	options := conformance.DefaultOptions(t)
	options.GatewayClassName = ""
	options.ConformanceProfiles = []suite.ConformanceProfileName{
		suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName,
	}
	options.SupportedFeatures = append(
		features.SetsToNamesSet(features.MeshCoreFeatures, features.MeshExtendedFeatures).UnsortedList(),
		features.SupportHTTPRoute, features.SupportGRPCRoute,
		features.SupportHTTPRouteResponseHeaderModification,
		features.SupportHTTPRouteParentRefPort,
		features.SupportHTTPRoute303RedirectStatusCode,
		features.SupportHTTPRoute307RedirectStatusCode,
		features.SupportHTTPRoute308RedirectStatusCode)
	options.NamespaceLabels = map[string]string{"istio.io/dataplane-mode": "ambient"}
	options.Implementation = confv1.Implementation{
		Organization: "culvert", Project: "culvert", Version: os.Getenv("CULVERT_VERSION"),
		URL: "https://culvert.dev", Contact: []string{"https://culvert.dev/contact"},
	}
	suite, err := suite.NewConformanceTestSuite(options)
	require.NoError(t, err)
	suite.Setup(t, tests.ConformanceTests)
	waypoint(t, suite.Client)
	// Its tests run beside each other, and the last ends after Run has returned.
	t.Cleanup(func() {
		report, err := suite.Report()
		require.NoError(t, err)
		text, err := yaml.Marshal(report)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(os.Getenv("REPORT"), text, 0o644))
	})
	require.NoError(t, suite.Run(t, tests.ConformanceTests))
}

// Binds the namespace to a waypoint, as a user would, and waits until it is there.
func waypoint(t *testing.T, c client.Client) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	gateway := &gatewayv1.Gateway{
		ObjectMeta: metav1.ObjectMeta{Name: "waypoint", Namespace: namespace},
		Spec: gatewayv1.GatewaySpec{
			GatewayClassName: "culvert-waypoint",
			Listeners:        []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: "HBONE"}},
		},
	}
	require.NoError(t, client.IgnoreAlreadyExists(c.Create(ctx, gateway)))
	patch := client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"istio.io/use-waypoint":"waypoint"}}}`))
	require.NoError(t, c.Patch(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, patch))
	programmed := func(ctx context.Context) (bool, error) {
		if err := c.Get(ctx, types.NamespacedName{Namespace: namespace, Name: "waypoint"}, gateway); err != nil {
			return false, err
		}
		for _, condition := range gateway.Status.Conditions {
			if condition.Type == "Programmed" && condition.Status == metav1.ConditionTrue {
				return true, nil
			}
		}
		return false, nil
	}
	require.NoError(t, wait.PollUntilContextCancel(ctx, time.Second, true, programmed), "the waypoint is not programmed")
}
