package main

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	caapi "istio.io/api/security/v1alpha1"
	"istio.io/istio/pkg/workloadapi"
	"istio.io/istio/pkg/workloadapi/security"
	"istio.io/istio/pkg/zdsapi"
)

type goldenMessage struct {
	name  string
	value proto.Message
}

// goldenMessages is every message of the protocols, each field set somewhere. A map has one entry at most, so that the order of a
// deterministic encoding is the same in every language. Addresses come from the documentation ranges.
func goldenMessages() []goldenMessage {
	messages := []goldenMessage{
		{"address-workload", &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: fullWorkload()}}},
		{"address-service", &workloadapi.Address{Type: &workloadapi.Address_Service{Service: fullService()}}},
		{"workload-minimal", &workloadapi.Workload{Uid: "Kubernetes//Pod/default/plain", Addresses: [][]byte{{192, 0, 2, 9}}}},
		{"workload-hostname", hostnameWorkload()},
		{"service-external", externalService()},
		{"authorization-full", fullAuthorization()},
		{"authorization-deny-all", &security.Authorization{Name: "deny-all", Namespace: "default", Scope: security.Scope_NAMESPACE}},
		{"authorization-global-dry-run", dryRunAuthorization()},
		{"certificate-request", certificateRequest()},
		{"certificate-response", &caapi.IstioCertificateResponse{CertChain: []string{"leaf\n", "intermediate\n", "root\n"}}},
	}
	return append(append(messages, zdsMessages()...), discoveryMessages()...)
}

func fullWorkload() *workloadapi.Workload {
	return &workloadapi.Workload{
		Uid:            "Kubernetes//Pod/default/server-1",
		Name:           "server-1",
		Namespace:      "default",
		Addresses:      [][]byte{{192, 0, 2, 7}, documentationV6(7)},
		Hostname:       "server-1.server.default.svc.cluster.local",
		Network:        "net-1",
		TunnelProtocol: workloadapi.TunnelProtocol_HBONE,
		TrustDomain:    "mesh.example",
		ServiceAccount: "server",
		Waypoint: &workloadapi.GatewayAddress{
			Destination: &workloadapi.GatewayAddress_Hostname{Hostname: &workloadapi.NamespacedHostname{
				Namespace: "default", Hostname: "waypoint.default.svc.cluster.local",
			}},
			HboneMtlsPort: 15008,
		},
		NetworkGateway: &workloadapi.GatewayAddress{
			Destination:   &workloadapi.GatewayAddress_Address{Address: &workloadapi.NetworkAddress{Network: "net-1", Address: []byte{198, 51, 100, 1}}},
			HboneMtlsPort: 15443,
		},
		Node:              "node-1",
		CanonicalName:     "server",
		CanonicalRevision: "v1",
		WorkloadType:      workloadapi.WorkloadType_JOB,
		WorkloadName:      "server-job",
		NativeTunnel:      true,
		ApplicationTunnel: &workloadapi.ApplicationTunnel{Protocol: workloadapi.ApplicationTunnel_PROXY, Port: 15088},
		Services: map[string]*workloadapi.PortList{
			"default/server.default.svc.cluster.local": {Ports: []*workloadapi.Port{
				{ServicePort: 80, TargetPort: 8080, AppProtocol: workloadapi.AppProtocol_HTTP2},
				{ServicePort: 5432, TargetPort: 5432, AppProtocol: workloadapi.AppProtocol_TLS},
			}},
		},
		AuthorizationPolicies: []string{"default/allow-client", "istio-system/converted_peer_authentication_strict"},
		Status:                workloadapi.WorkloadStatus_UNHEALTHY,
		ClusterId:             "Kubernetes",
		Locality:              &workloadapi.Locality{Region: "region-1", Zone: "zone-a", Subzone: "rack-3"},
		NetworkMode:           workloadapi.NetworkMode_HOST_NETWORK,
		Extensions:            extensions(),
		Capacity:              wrapperspb.UInt32(300),
	}
}

func hostnameWorkload() *workloadapi.Workload {
	return &workloadapi.Workload{
		Uid:          "Kubernetes/networking.istio.io/ServiceEntry/default/external/api.example.com",
		Name:         "external",
		Namespace:    "default",
		Hostname:     "api.example.com",
		WorkloadType: workloadapi.WorkloadType_POD,
		// Present and zero is not the same as absent.
		Capacity: wrapperspb.UInt32(0),
	}
}

func fullService() *workloadapi.Service {
	length := uint32(24)
	waypoint := &workloadapi.GatewayAddress{
		Destination:   &workloadapi.GatewayAddress_Address{Address: &workloadapi.NetworkAddress{Address: documentationV6(99)}},
		HboneMtlsPort: 15008,
	}
	return &workloadapi.Service{
		Name:      "server",
		Namespace: "default",
		Hostname:  "server.default.svc.cluster.local",
		Addresses: []*workloadapi.NetworkAddress{
			{Network: "net-1", Address: []byte{198, 51, 100, 5}},
			{Address: documentationV6(5)},
			{Network: "net-1", Address: []byte{203, 0, 113, 0}, Length: &length},
		},
		Ports: []*workloadapi.Port{
			{ServicePort: 80, TargetPort: 8080, AppProtocol: workloadapi.AppProtocol_HTTP11},
			{ServicePort: 81, TargetPort: 8081, AppProtocol: workloadapi.AppProtocol_GRPC},
			{ServicePort: 82, TargetPort: 8082, AppProtocol: workloadapi.AppProtocol_TCP},
			{ServicePort: 65535},
		},
		SubjectAltNames: []string{"spiffe://mesh.example/ns/default/sa/server", "spiffe://mesh.example/ns/default/sa/other"},
		Waypoint:        waypoint,
		LoadBalancing: &workloadapi.LoadBalancing{
			RoutingPreference: []workloadapi.LoadBalancing_Scope{
				workloadapi.LoadBalancing_NETWORK, workloadapi.LoadBalancing_REGION, workloadapi.LoadBalancing_ZONE,
				workloadapi.LoadBalancing_SUBZONE, workloadapi.LoadBalancing_NODE, workloadapi.LoadBalancing_CLUSTER,
			},
			Mode:         workloadapi.LoadBalancing_FAILOVER,
			HealthPolicy: workloadapi.LoadBalancing_ALLOW_ALL,
		},
		IpFamilies:         workloadapi.IPFamilies_DUAL,
		Extensions:         extensions(),
		Canonical:          true,
		IngressUseWaypoint: true,
		WeightedWaypoints: []*workloadapi.WeightedWaypoint{
			{Destination: waypoint, Weight: 90},
			{Weight: 10, Destination: &workloadapi.GatewayAddress{
				Destination: &workloadapi.GatewayAddress_Hostname{Hostname: &workloadapi.NamespacedHostname{
					Namespace: "default", Hostname: "waypoint-2.default.svc.cluster.local",
				}},
			}},
		},
		Visibility: workloadapi.Service_NAMESPACE,
	}
}

func externalService() *workloadapi.Service {
	return &workloadapi.Service{
		Name: "external", Namespace: "default", Hostname: "api.example.com",
		Ports:         []*workloadapi.Port{{ServicePort: 443, TargetPort: 443}},
		LoadBalancing: &workloadapi.LoadBalancing{Mode: workloadapi.LoadBalancing_PASSTHROUGH},
		IpFamilies:    workloadapi.IPFamilies_IPV6_ONLY,
	}
}

func extensions() []*workloadapi.Extension {
	config := &anypb.Any{TypeUrl: "type.googleapis.com/google.protobuf.StringValue", Value: []byte{0x0a, 0x02, 'h', 'i'}}
	return []*workloadapi.Extension{{Name: "example.com/extension", Config: config}}
}

func fullAuthorization() *security.Authorization {
	exact := func(text string) *security.StringMatch {
		return &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: text}}
	}
	prefix := &security.StringMatch{MatchType: &security.StringMatch_Prefix{Prefix: "team-"}}
	suffix := &security.StringMatch{MatchType: &security.StringMatch_Suffix{Suffix: "/sa/client"}}
	presence := &security.StringMatch{MatchType: &security.StringMatch_Presence{Presence: &emptypb.Empty{}}}
	match := &security.Match{
		Namespaces:         []*security.StringMatch{exact("default"), prefix},
		NotNamespaces:      []*security.StringMatch{exact("kube-system")},
		ServiceAccounts:    []*security.ServiceAccountMatch{{Namespace: "default", ServiceAccount: "client"}},
		NotServiceAccounts: []*security.ServiceAccountMatch{{Namespace: "default", ServiceAccount: "stranger"}},
		Principals:         []*security.StringMatch{exact("mesh.example/ns/default/sa/client"), suffix, presence},
		NotPrincipals:      []*security.StringMatch{exact("mesh.example/ns/default/sa/stranger")},
		SourceIps:          []*security.Address{{Address: []byte{192, 0, 2, 0}, Length: 24}},
		NotSourceIps:       []*security.Address{{Address: []byte{192, 0, 2, 13}, Length: 32}},
		DestinationIps:     []*security.Address{{Address: documentationV6(0), Length: 64}},
		NotDestinationIps:  []*security.Address{{Address: documentationV6(66), Length: 128}},
		// More than seven bits, so that each is a varint of two bytes or more inside the packed field.
		DestinationPorts:    []uint32{80, 8080, 65535},
		NotDestinationPorts: []uint32{22},
		Extensions:          extensions(),
	}
	return &security.Authorization{
		Name: "allow-client", Namespace: "default",
		Scope: security.Scope_WORKLOAD_SELECTOR, Action: security.Action_DENY,
		Groups: []*security.Group{
			{Rules: []*security.Rules{{Matches: []*security.Match{match}}, {Matches: []*security.Match{{DestinationPorts: []uint32{443}}, {}}}}},
			{},
		},
		Extensions: extensions(),
	}
}

func dryRunAuthorization() *security.Authorization {
	return &security.Authorization{Name: "observe", Namespace: "istio-system", Scope: security.Scope_GLOBAL, DryRun: true}
}

func certificateRequest() *caapi.IstioCertificateRequest {
	identity := structpb.NewStringValue("spiffe://mesh.example/ns/default/sa/client")
	return &caapi.IstioCertificateRequest{
		Csr:              "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
		ValidityDuration: 86400,
		Metadata:         &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": identity}},
	}
}

func zdsMessages() []goldenMessage {
	info := &zdsapi.WorkloadInfo{Name: "server-1", Namespace: "default", ServiceAccount: "server"}
	add := &zdsapi.AddWorkload{Uid: "5f1d6c1e-0000-4000-8000-000000000001", WorkloadInfo: info}

	return []goldenMessage{
		{"zds-hello", &zdsapi.ZdsHello{Version: zdsapi.Version_V1}},
		{"zds-add", &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: add}}},
		{"zds-keep", &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Keep{Keep: &zdsapi.KeepWorkload{Uid: add.Uid}}}},
		{"zds-del", &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Del{Del: &zdsapi.DelWorkload{Uid: add.Uid}}}},
		{"zds-snapshot", &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_SnapshotSent{SnapshotSent: &zdsapi.SnapshotSent{}}}},
		{"zds-ack", &zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: &zdsapi.Ack{}}}},
		{"zds-ack-error", &zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: &zdsapi.Ack{Error: "cannot bind 15008"}}}},
	}
}

func discoveryMessages() []goldenMessage {
	metadata := &structpb.Struct{Fields: map[string]*structpb.Value{"NODE_NAME": structpb.NewStringValue("node-1")}}
	node := &core.Node{Id: "ztunnel~192.0.2.1~ztunnel-1.istio-system~istio-system.svc.cluster.local", Cluster: "ztunnel", Metadata: metadata}
	detail := &anypb.Any{TypeUrl: "type.googleapis.com/google.protobuf.StringValue", Value: []byte{0x0a, 0x02, 'n', 'o'}}
	address, err := proto.MarshalOptions{Deterministic: true}.Marshal(goldenAddress())
	if err != nil {
		panic(err) // a fixed message of valid text always encodes
	}
	resource := &discovery.Resource{
		Name: "Kubernetes//Pod/default/plain", Version: "9f1c", Aliases: []string{"/192.0.2.9", "net-1/192.0.2.9"},
		Resource: &anypb.Any{TypeUrl: addressType, Value: address}, Ttl: durationpb.New(1500000000),
	}
	return []goldenMessage{
		{"delta-request-first", &discovery.DeltaDiscoveryRequest{
			Node: node, TypeUrl: addressType, ResourceNamesSubscribe: []string{"*", "net-1/192.0.2.9"},
			InitialResourceVersions: map[string]string{"Kubernetes//Pod/default/plain": "9f1c"},
		}},
		{"delta-request-nack", &discovery.DeltaDiscoveryRequest{
			TypeUrl: authorizationType, ResourceNamesUnsubscribe: []string{"default/gone"}, ResponseNonce: "nonce-7",
			ErrorDetail: &status.Status{Code: 3, Message: "default/bad: unknown field 99", Details: []*anypb.Any{detail}},
		}},
		{"delta-response", &discovery.DeltaDiscoveryResponse{
			SystemVersionInfo: "generation-12", Resources: []*discovery.Resource{resource}, TypeUrl: addressType, Nonce: "nonce-7",
			RemovedResources: []string{"default/gone.default.svc.cluster.local"},
		}},
	}
}

func goldenAddress() *workloadapi.Address {
	workload := &workloadapi.Workload{Uid: "Kubernetes//Pod/default/plain", Addresses: [][]byte{{192, 0, 2, 9}}}
	return &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: workload}}
}

// documentationV6 is 2001:db8::last.
func documentationV6(last byte) []byte {
	return []byte{0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last}
}
